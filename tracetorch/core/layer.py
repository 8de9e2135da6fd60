"""`Layer`: a neuron layer from one step function, with constrained parameters and hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tracetorch.core import recomputation
from tracetorch.core.raw import from_raw, to_raw
from tracetorch.core.trail import Trail, refuse_spent
from tracetorch.fused import layers as fused_layers

Value = float | Sequence[float] | Tensor


_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

# raw form -> what the value must satisfy, in words and as a test
_CONSTRAINTS: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "value": ("finite", torch.isfinite),
    "sigmoid": ("in (0, 1)", lambda value: (value > 0) & (value < 1)),
    "softplus": ("finite and above 0", lambda value: (value > 0) & torch.isfinite(value)),
}


class Layer(nn.Module):
    """Base of every native layer: declare states and parameters, write `step`, and the rest follows.

    One call is one time step; hidden states carry on from call to call until `reset_states`. `unroll` takes a whole
    sequence. States are no part of `state_dict`; they follow `.to()`, and are copied, detached, by `copy.deepcopy` and
    `pickle`.

    Args:
        num_neurons: size of the feature dimension; `None` accepts any shape.
        dim: the feature dimension of the input.
    """

    def __init__(self, num_neurons: int | None = None, dim: int = -1) -> None:
        super().__init__()
        if num_neurons is not None and (not isinstance(num_neurons, int) or num_neurons < 1):
            raise ValueError(
                f"{type(self).__name__}: num_neurons must be an integer of at least 1, not {num_neurons!r}"
            )
        self.num_neurons = num_neurons
        self.dim = dim
        self.raw_forms: dict[str, str] = {}
        self.state_names: tuple[str, ...] = ()
        self.output_names: tuple[str, ...] = ("output",)
        # The parameters' values, between `TTcompile` and `TTdecompile`.
        self.baked: dict[str, Tensor] = {}
        self.trail = Trail()
        # Of the engine: what stands for the parameters' values while a step is traced; the kernels built so far.
        self.overrides: dict[str, Tensor] = {}
        self.kernels: dict[Any, Any] = {}

    # The required arguments of `step`, by name; none where it takes any number.
    _step_takes: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:
            takes = list(inspect.signature(cls.step).parameters.values())[1:]
            kinds = {each.kind for each in takes}
            needed = tuple(each.name for each in takes if each.default is each.empty and each.kind in _BY_PLACE)
            cls._step_takes = () if inspect.Parameter.VAR_POSITIONAL in kinds else needed

    # ---- declaring -----------------------------------------------------------------------------------------------

    def define_state(self, name: str) -> None:
        """Declare a hidden state, zero at the start and of the input's shape. The order is the order in `step`."""
        if name in self.state_names:
            raise ValueError(f"{type(self).__name__}: the state {name!r} is declared twice")
        self.register_buffer(name, None, persistent=False)
        self.state_names = (*self.state_names, name)

    def define_outputs(self, *names: str) -> None:
        """Declare that `step` returns several outputs before the states; a call then returns a tuple of them."""
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{type(self).__name__}: outputs {names}; give at least one name, each once")
        self.output_names = names

    def define_decay(self, name: str, value: Value, rank: int = 1, learnable: bool = True) -> None:
        """A decay in (0, 1): stored as `raw_<name>`, read as `self.<name> = sigmoid(raw_<name>)`."""
        self._define(name, value, rank, learnable, "sigmoid")

    def define_positive(self, name: str, value: Value, rank: int = 1, learnable: bool = True) -> None:
        """A value above 0, such as a threshold: stored as `raw_<name>`, read as `softplus(raw_<name>)`."""
        self._define(name, value, rank, learnable, "softplus")

    def define_parameter(self, name: str, value: Value, rank: int = 1, learnable: bool = True) -> None:
        """An unconstrained value: stored as `raw_<name>`, read as `self.<name>`."""
        self._define(name, value, rank, learnable, "value")

    def _define(self, name: str, value: Value, rank: int, learnable: bool, raw_form: str) -> None:
        where = f"{type(self).__name__}: {name}"
        if hasattr(type(self), name) or name in self.__dict__:
            raise ValueError(f"{where}: the layer has something else of this name; choose another")
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype())
        tensor = tensor.detach().clone()
        if not tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
        if tensor.ndim == 0 and rank == 1 and self.num_neurons is not None and not isinstance(value, Tensor):
            tensor = tensor.repeat(self.num_neurons)
        elif rank not in (0, 1):
            raise ValueError(f"{where}_rank={rank!r}: must be 0 (a scalar) or 1 (one per neuron)")
        if tensor.ndim > 1 or (tensor.ndim == 1 and tensor.shape[0] != self.num_neurons):
            raise ValueError(f"{where} has shape {list(tensor.shape)}; give a scalar or [{self.num_neurons}]")
        if tensor.ndim == 1 and rank == 0:
            raise ValueError(f"{where}_rank=0 is one shared value, but {where} has shape {list(tensor.shape)}")
        words, test = _CONSTRAINTS[raw_form]
        if not bool(test(tensor).all()):
            raise ValueError(f"{where} must be {words}, not {value!r}")
        raw = to_raw(raw_form, tensor)
        if learnable:
            self.register_parameter(f"raw_{name}", nn.Parameter(raw))
        else:
            self.register_buffer(f"raw_{name}", raw)
        self.raw_forms[name] = raw_form

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("raw_forms", {}) and self.raw_attribute(name) != name:
            return self.value(name)
        return super().__getattr__(name)

    def raw_attribute(self, name: str) -> str:
        """The attribute that stores a parameter's raw tensor."""
        return f"raw_{name}"

    def value(self, name: str) -> Tensor:
        """A parameter's value in the equations, computed from its raw tensor."""
        if name in self.overrides:
            return self.overrides[name]
        if name in self.baked:
            return self.baked[name]
        attribute = self.raw_attribute(name)
        raw: Tensor | None = self._parameters.get(attribute)
        if raw is None:
            raw = self._buffers.get(attribute)
        # Else a property of `torch.nn.utils.parametrize`: `getattr` finds all three, and takes longer.
        return from_raw(self.raw_forms[name], cast(Tensor, getattr(self, attribute)) if raw is None else raw)

    def TTcompile(self) -> None:
        """Bake the constrained parameters, for inference: each is computed once, and no longer in every step.

        The raw tensors stay and get no gradients. `load_state_dict` and `.to()` bake anew; after any other change of a
        raw tensor, such as an optimizer's step, call `TTcompile` again.
        """
        self.baked = {}
        self.baked = {name: self.value(name).detach().clone() for name in self.raw_forms}

    def TTdecompile(self) -> None:
        """Back to parameters that are computed from their raw tensors in every step, and trained."""
        self.baked = {}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        module = super()._apply(*args, **kwargs)
        if self.baked:
            self.TTcompile()
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.baked:
            self.TTcompile()

    # ---- running -------------------------------------------------------------------------------------------------

    @property
    def input_names(self) -> tuple[str, ...]:
        """What `step` takes before the states: its required arguments by name; ("x",) where it takes `*states`."""
        names = self._step_takes
        return names[: len(names) - len(self.state_names)] if len(names) > len(self.state_names) else ("x",)

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """One time step, elementwise: `step(x, *states) -> output, *new_states`. Written by the subclass.

        It may take several inputs of one shape, `step(x, gate, *states)`, and return several outputs before the states,
        declared by `define_outputs`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(x, *states) -> output, *new_states")

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        """One time step. x: [B, ...] with `num_neurons` at `dim`; returns the output of the same shape.

        A step of several inputs takes them all, of one shape; one of several outputs returns them as a tuple.
        """
        self.check_input(x)
        self._check_more(x, more)
        recomputation.refuse(type(self).__name__)
        self._follow_states()
        given = [x, *more, *(self.state(name, x) for name in self.state_names)]
        if self.num_neurons is not None and x.ndim > 1:
            given = [tensor.movedim(self.dim, -1) for tensor in given]
        results = self.step(*given)
        outputs = len(self.output_names)
        if not isinstance(results, (tuple, list)) or len(results) != outputs + len(self.state_names):
            found = f"{len(results)} values" if isinstance(results, (tuple, list)) else type(results).__name__
            raise TypeError(f"{type(self).__name__}.step returned {found}; expected a tuple of {self._expected()}")
        if self.num_neurons is not None and x.ndim > 1:
            results = tuple(tensor.movedim(-1, self.dim) for tensor in results)
        for name, state in zip(self.state_names, results[outputs:], strict=True):
            setattr(self, name, state)
        if not torch.compiler.is_compiling():
            self.trail.follow(results)
        return results[0] if outputs == 1 else tuple(results[:outputs])

    # This forward is its step and no more. A subclass's own may be more: then `unroll` calls it for every step.
    forward.elementwise_step = True  # type: ignore[attr-defined]

    def unroll(self, xs: Tensor | Sequence[Tensor], time_dim: int = 0) -> Any:
        """The whole sequence. xs: [T, B, ...] (`time_dim=0`) or [B, T, ...] (`time_dim=1`); same shape back.

        A step of several inputs takes a tuple of sequences of one shape; one of several outputs returns a tuple.

        The states carry on from before and are left as after the last step. T = 0 changes nothing. All steps run as
        one compiled kernel where one fits (see `tt.backend`); a layer with hooks or with a `forward` of its own, and a
        step that no kernel computes, run step by step.
        """
        recomputation.refuse(type(self).__name__)
        self._follow_states()
        fused = fused_layers.attempt(self, (xs,) if isinstance(xs, Tensor) else tuple(xs), time_dim)
        if fused is not None:
            if not torch.compiler.is_compiling():
                self.trail.fused = True
            return fused[0] if len(fused) == 1 else tuple(fused)
        outputs, _ = self.trace(xs, time_dim, states=())
        return outputs

    def kernel_name(self, dtype: str, backward: bool, device: str) -> str:
        """Of the engine, under `torch.compile`: the library's name of this layer's kernel, or "" for the step loop."""
        return fused_layers.handle(self, getattr(torch, dtype), backward, device)

    # What `torch.compiler.assume_constant_result` does (torch 2.6 to 2.13), which would import torch._dynamo: 1 s.
    kernel_name._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def trace(
        self, xs: Tensor | Sequence[Tensor], time_dim: int = 0, states: Sequence[str] | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """`unroll` that also records states: returns the outputs and `{state: its values after every step}`."""
        names = self.state_names if states is None else tuple(states)
        sequences = (xs,) if isinstance(xs, Tensor) else tuple(xs)
        for each in sequences:
            if not -each.ndim <= time_dim < each.ndim:
                raise ValueError(
                    f"{type(self).__name__}: time_dim={time_dim} is out of range for an input of shape "
                    f"{list(each.shape)}; 0 for [T, B, ...], 1 for [B, T, ...]"
                )
        steps = {each.shape[time_dim] for each in sequences}
        if len(steps) != 1:
            shapes = [list(each.shape) for each in sequences]
            raise ValueError(f"{type(self).__name__}: input sequences of different lengths: {shapes}")
        outputs: list[Any] = []
        recorded: dict[str, list[Tensor]] = {name: [] for name in names}
        for given in zip(*(each.unbind(time_dim) for each in sequences), strict=True):
            outputs.append(self(*given))
            for name in names:
                recorded[name].append(getattr(self, name))
        if not outputs:
            empty = tuple(torch.empty_like(sequences[0]) for _ in self.output_names)
            return empty[0] if len(empty) == 1 else empty, {name: torch.empty_like(sequences[0]) for name in names}
        if isinstance(outputs[0], tuple):
            stacked: Any = tuple(torch.stack(series, time_dim) for series in zip(*outputs, strict=True))
        else:
            stacked = torch.stack(outputs, time_dim)
        return stacked, {name: torch.stack(values, time_dim) for name, values in recorded.items()}

    def check_input(self, x: Tensor) -> None:
        """Raises `TypeError` or `ValueError` unless x is floating point with `num_neurons` at `dim`."""
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__}: the input is {x.dtype}; convert it to a floating point type")
        if self.num_neurons is None:
            return
        if not -x.ndim <= self.dim < x.ndim:
            raise ValueError(
                f"{type(self).__name__}: dim={self.dim} is out of range for an input of {x.ndim} dimensions"
            )
        if x.shape[self.dim] != self.num_neurons:
            raise ValueError(
                f"{type(self).__name__}: the input has size {x.shape[self.dim]} at dim={self.dim}, but "
                f"num_neurons={self.num_neurons} (input shape {list(x.shape)})"
            )

    def _expected(self) -> str:
        outputs = "the output" if len(self.output_names) == 1 else f"the outputs {list(self.output_names)}"
        return f"{outputs} and the states {list(self.state_names)}" if self.state_names else f"{outputs} alone"

    def _check_more(self, x: Tensor, more: Sequence[Tensor]) -> None:
        """Raises `TypeError` or `ValueError` unless there are as many inputs as the step takes, of one shape."""
        names = self.input_names
        if 1 + len(more) != len(names):
            raise TypeError(
                f"{type(self).__name__}: {1 + len(more)} inputs given, its step takes {len(names)}: {', '.join(names)}"
            )
        for name, each in zip(names[1:], more, strict=True):
            if each.shape != x.shape:
                raise ValueError(
                    f"{type(self).__name__}: the input {name} has shape {list(each.shape)}, {names[0]} has "
                    f"{list(x.shape)}; expand one of them"
                )

    def state(self, name: str, x: Tensor) -> Tensor:
        """A state before a step with the input x: the kept one, or the first. Raises `ValueError` for another shape."""
        state = getattr(self, name)
        if state is None:
            first = self.first_state(name)
            return torch.zeros_like(x) if first is None else (torch.zeros_like(x) + first).to(x.dtype)
        if state.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__}: the state {name!r} has shape {list(state.shape)} from the last call, the "
                f"input has {list(x.shape)}; call reset_states() before another batch size or shape"
            )
        return state

    def first_state(self, name: str) -> Tensor | None:
        """What a state starts from, a constant that broadcasts against the input; None: zero."""
        return None

    def _follow_states(self) -> None:
        """Before a call: a state whose graph is freed says so when backward reaches it a second time."""
        trail = self.trail
        if not (trail.passed or trail.fused) or torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and not trail.blind:
            for name in self.state_names:
                state = self._buffers[name]
                if state is not None:
                    refuse_spent(type(self).__name__, name, state, whole=trail.passed)
        trail.renew()

    # ---- states --------------------------------------------------------------------------------------------------

    def reset_states(self) -> None:
        """Forget the states; the next step starts from the initial ones, whatever its batch size."""
        if not torch.compiler.is_compiling():
            self.trail.renew()
        self._buffers.update(dict.fromkeys(self.state_names))

    def zero_states(self) -> None:
        """Set the states to zero, keeping their shapes."""
        for name in self.state_names:
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, torch.zeros_like(state))

    def detach_states(self) -> None:
        """Cut the states from the graph that computed them."""
        if not torch.compiler.is_compiling():
            self.trail.renew()
        states = self._buffers
        for name in self.state_names:
            state = states[name]
            if state is not None:
                states[name] = state.detach()

    def save_states(self) -> dict[str, Tensor | None]:
        """`{state: tensor, or None before the first step}`: the tensors themselves, not copies."""
        return {name: getattr(self, name) for name in self.state_names}

    def check_states(self, states: Mapping[str, Tensor | None]) -> None:
        """Raises `ValueError` unless `states` has exactly the states of this layer."""
        if set(states) != set(self.state_names):
            raise ValueError(
                f"{type(self).__name__}: states {sorted(states)} given, this layer has {sorted(self.state_names)}"
            )

    def load_states(self, states: Mapping[str, Tensor | None], strict: bool = True) -> None:
        """Put back what `save_states` gave. With `strict`, states missing on either side raise `ValueError`."""
        if strict:
            self.check_states(states)
        for name in self.state_names:
            if name in states:
                setattr(self, name, states[name])

    def __getstate__(self) -> dict[str, Any]:
        # A state that hangs on a graph can be neither deep-copied nor pickled: the copy gets its value.
        attributes = self.__dict__.copy()
        buffers = dict(attributes["_buffers"])
        for name in self.state_names:
            if buffers[name] is not None:
                buffers[name] = buffers[name].detach()
        attributes["_buffers"] = buffers
        attributes["kernels"], attributes["overrides"], attributes["trail"] = {}, {}, Trail()
        return attributes

    def extra_repr(self) -> str:
        return (
            "" if self.num_neurons is None else f"{self.num_neurons}" + (f", dim={self.dim}" if self.dim != -1 else "")
        )
