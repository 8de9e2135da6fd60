"""`JaxStage`: a brainstate module as a torch module over sequences, differentiable from both sides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import brainstate
import jax
import numpy as np
import saiunit
import torch
from torch import Tensor, nn

from tracetorch.adapters.jax.bridge import Program, check
from tracetorch.adapters.jax.mirror import Mirror
from tracetorch.adapters.jax.module import JaxModule, is_neuron, number, quantity, unit_of
from tracetorch.adapters.stateful import SeamError, StateHolder

_CLOCK = "steps"


class JaxStage(StateHolder):
    """A brainstate module, one step a call there, as a `torch.nn.Module` over whole sequences.

    All steps run as one compiled `jax.lax.scan`, compiled once for each shape. Its `ParamState`s are torch parameters,
    the numbers of brainpy.state's neurons are buffers, or parameters if named in `learn`; all are live: what an
    optimizer writes is what the next call computes with. States carry on from call to call and are torch tensors, so
    that gradients flow through them; they are reset, saved and moved like those of native layers.

    Numbers are in the units of the module: voltages in that of V_th, the input in that of V_th over that of R, dt in
    that of tau; `units` lists them.

    Args:
        module: a `brainstate.nn.Module`, such as `brainpy.state.LIF` or a `brainstate.nn.Sequential`. It is copied;
            `to_jax()` gives it back with the present numbers.
        dt: the time step, in the unit of tau or as a quantity; None: `brainstate.environ` has it at every call.
        time_dim: of the input and the output: 0 for [T, B, ...], 1 for [B, T, ...].
        learn: names of neurons' numbers to be trained, such as "R" or "layers_1_tau".
        input_unit: of the input, where the module is no single neuron and wants a quantity.
        dtype: of the parameters; `torch.get_default_dtype()` if None.
        any_size: take inputs of any size, whatever the module's `in_size`: for a neuron whose numbers are scalars.

    Raises:
        TypeError: not a brainstate module.
        SeamError: units that contradict each other, a dtype that JAX would not compute in, a missing dt.
        ValueError: an unknown name in `learn`, another `time_dim`, a state that a reset may not forget (batch norm).
    """

    # Its call takes a whole sequence, as `time_dim` says: for a pipeline around it.
    over_sequences = True

    def __init__(
        self,
        module: Any,
        *,
        dt: Any = None,
        time_dim: int = 0,
        learn: Sequence[str] = (),
        input_unit: Any = None,
        dtype: torch.dtype | None = None,
        any_size: bool = False,
    ) -> None:
        super().__init__()
        if time_dim not in (0, 1):
            raise ValueError(f"JaxStage: time_dim={time_dim!r} must be 0 for [T, B, ...] or 1 for [B, T, ...]")
        self.time_dim, self.dt, self.any_size = time_dim, dt, any_size
        self.held = JaxModule(module)
        self.input_unit = self.held.input_unit if input_unit is None else input_unit
        self.value_names = tuple(slot.name for slot in self.held.slots if slot.kind != "state")
        clock = (_CLOCK,) if self.held.clocked else ()
        self._state_names = (*(slot.name for slot in self.held.kind("state")), *clock)
        self._register(learn, torch.get_default_dtype() if dtype is None else dtype)
        self._programs: dict[Any, Program] = {}
        self._mirror = Mirror()

    def _register(self, learn: Sequence[str], dtype: torch.dtype) -> None:
        constants = {slot.name for slot in self.held.kind("constant")}
        unknown = sorted(set(learn) - constants)
        if unknown:
            raise ValueError(f"JaxStage: learn={unknown!r} not among the neurons' numbers: {sorted(constants)}")
        for name, value in self.held.values().items():
            if hasattr(self, name):
                raise ValueError(f"JaxStage: the module's {name!r} has the name of an attribute of torch modules")
            tensor = torch.tensor(value, dtype=dtype)  # in memory of torch's own, which JAX can alias
            if name in constants and name not in learn:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        for name in self._state_names:
            if hasattr(self, name):
                raise ValueError(f"JaxStage: the module's {name!r} has the name of an attribute of torch modules")
            self.register_buffer(name, None, persistent=False)

    # ---- states --------------------------------------------------------------------------------------------------

    @property
    def state_names(self) -> tuple[str, ...]:
        """The module's states by their paths, and `steps`, the number of steps so far, if a neuron needs the time."""
        return self._state_names

    def get_state(self, name: str) -> Tensor | None:
        """As of a `StateHolder`."""
        return self._buffers[name]

    def set_state(self, name: str, value: Tensor | None) -> None:
        """As of a `StateHolder`."""
        self._buffers[name] = value

    def initial_states(self, xs: Tensor) -> list[Tensor]:
        """The states before the first step over xs [T, B, ...]: what the module's initializers give."""
        if self.any_size:
            self.held.resize(tuple(xs.shape[2:]))
        arrays = self.held.initial(xs.shape[1])
        states = [torch.from_numpy(np.array(array)).to(xs.device, xs.dtype) for array in arrays.values()]
        return [*states, *([torch.zeros((), dtype=xs.dtype, device=xs.device)] if self.held.clocked else [])]

    # ---- units and numbers ---------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Class of the module, for messages."""
        return f"JaxStage({type(self.held.module).__name__})"

    @property
    def stands_for(self) -> tuple[str, ...]:
        """Whose neuron it is, for `adapters.spec` and `convert`."""
        return ("brainpy",) if is_neuron(self.held.module) else ()

    @property
    def units(self) -> dict[str, str]:
        """The unit of every number, by name, and of the "input", of "dt" and, after the first call, of the "output".

        "1" for none, as that of spikes.
        """
        found = {slot.name: str(slot.unit or "1") for slot in self.held.slots}
        found |= {"input": str(self.input_unit or "1"), "dt": str(self.held.time_unit or "1")}
        return {**found, "output": str(self.output_unit or "1")} if self._programs else found

    @property
    def output_unit(self) -> Any:
        """Of what a step returns, as the last call found it; None if it has none."""
        return self.held.output_unit

    def step_length(self) -> float | None:
        """The time step in the unit of tau: the stage's own, else `brainstate.environ`'s; None if neither has one.

        Raises:
            SeamError: a unit where tau has none, or the other way round; not one number above 0.
        """
        unit = self.held.time_unit
        given = self.dt if self.dt is not None else brainstate.environ.get("dt", None)
        if given is None or (self.dt is None and not hasattr(self.held.neuron(), "tau")):
            return None  # a module without neurons reads the environment's itself
        try:
            plain = unit is not None and unit_of(given) is None and self.dt is not None
            step = float(given if plain else number(given, unit))
        except (SeamError, TypeError) as error:
            raise SeamError(f"{self.label}: dt={given!r}: {error}. Remedy: a dt in the unit of tau") from error
        if not 0 < step < float("inf"):
            raise SeamError(f"{self.label}: dt={given!r}. Remedy: a dt above 0, in the unit of tau")
        return step

    def to_jax(self) -> Any:
        """A new brainstate module with the present numbers and, where there are any, the present states."""
        twin = copy.deepcopy(self.held)
        values = {name: jax.numpy.asarray(getattr(self, name).detach().cpu().numpy()) for name in self.value_names}
        for name in self.state_names:
            state = self.get_state(name)
            if state is not None and name != _CLOCK:
                values[name] = jax.numpy.asarray(state.detach().cpu().numpy())
        twin.write(values)
        return twin.module

    def get_spike(self, V: Tensor) -> Tensor:
        """The neuron's own `get_spike`: spikes of a membrane, any shape, with the surrogate gradient.

        Raises:
            AttributeError: the module is no neuron.
        """
        held, names = self.held, self.value_names
        if not hasattr(held.module, "get_spike"):
            raise AttributeError(f"{self.label}: get_spike is of a neuron")
        unit = next(slot.unit for slot in held.slots if slot.name == "V")
        self._check_numbers("get_spike", V)

        def fire(*arrays: Any) -> tuple[Any, ...]:
            with held.traced():
                held.write(dict(zip(names, arrays[:-1], strict=True)))
                return (held.module.get_spike(quantity(arrays[-1], unit)),)

        key = "get_spike"
        self._programs[key] = self._programs.get(key) or Program(fire)
        return self._programs[key].run(*(getattr(self, name) for name in names), V)[0]

    # ---- running -------------------------------------------------------------------------------------------------

    def forward(self, xs: Tensor) -> Tensor:
        """The whole sequence. xs: [T, B, ...] (`time_dim=0`) or [B, T, ...]; float32, or float64 with JAX's x64 mode.

        The states carry on from before and are left as after the last step.
        """
        self.enter_call()
        self._check(xs)
        moved = xs.movedim(self.time_dim, 0)
        batch = moved.shape[1]
        self.check_batch(batch, self.label)
        kept = [self.get_state(name) for name in self.state_names]
        if any(state is None for state in kept):
            kept = list(self.initial_states(moved))
        ys, *states = self._run(moved, [state for state in kept if state is not None])
        for name, state in zip(self.state_names, states, strict=True):
            self.set_state(name, state)
        self.leave_call(ys)
        return ys.movedim(0, self.time_dim)

    def trace(self, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward` over [T, B, ...], with every state after every step, [T, B, ...], by name."""
        self._check(xs.movedim(0, self.time_dim))
        kept = [self.get_state(name) for name in self.state_names]
        if any(state is None for state in kept):
            kept = list(self.initial_states(xs))
        ys, *rest = self._run(xs, [state for state in kept if state is not None], record=True)
        count = len(self.state_names)
        for name, state in zip(self.state_names, rest[:count], strict=True):
            self.set_state(name, state)
        return ys, dict(zip(self.state_names, rest[count:], strict=True))

    def _check(self, xs: Tensor) -> None:
        if not isinstance(xs, Tensor) or xs.ndim < 2:
            shape = list(xs.shape) if isinstance(xs, Tensor) else type(xs).__name__
            raise SeamError(f"{self.label}: input {shape}; needed is a tensor [T, B, ...] or, time_dim=1, [B, T, ...]")
        if xs.shape[self.time_dim] == 0:
            raise SeamError(f"{self.label}: input {list(xs.shape)} has no time step at time_dim={self.time_dim}")
        self._check_numbers("input", xs)
        size = getattr(self.held.module, "in_size", None)
        own = tuple(xs.shape[2:])
        if size is not None and tuple(size) != own and not self.any_size:
            raise SeamError(f"{self.label}: input {list(xs.shape)}; a step of one sample is {list(size)} by in_size")

    def _check_numbers(self, what: str, xs: Tensor) -> None:
        check(f"{self.label}: {what}", xs)
        for name in self.value_names:
            value = getattr(self, name)
            if value.dtype is not xs.dtype or value.device != xs.device:
                raise SeamError(
                    f"{self.label}: the {what} is {xs.dtype} on {xs.device}, its {name} {value.dtype} on "
                    f"{value.device}. Remedy: stage.to({xs.dtype}) or x.to(...)"
                )

    def _run(self, xs: Tensor, states: Sequence[Tensor], record: bool = False) -> tuple[Tensor, ...]:
        program = self._program(self.step_length(), record)
        values = [getattr(self, name) for name in self.value_names]
        same = [state.to(xs) for state in states]
        try:
            return program.run(*values, *same, xs, kept=self._mirror.arrays(values))
        except saiunit.UnitMismatchError as error:
            why = " ".join(str(error).split())
            raise SeamError(
                f"{self.label}: the input has the unit {self.input_unit or 'none'}: {why}. Remedy: "
                "JaxStage(module, input_unit=...), or a module without units"
            ) from error
        except KeyError as error:
            if "'dt'" not in str(error):
                raise
            raise SeamError(
                f"{self.label}: it needs a time step, and neither the stage nor brainstate.environ has one. Remedy: "
                "JaxStage(module, dt=...) or brainstate.environ.set(dt=...)"
            ) from error

    def _program(self, dt: float | None, record: bool) -> Program:
        # A module may read the environment, such as `fit`, while it is compiled.
        found = brainstate.environ.all().items()
        environment = tuple(sorted((name, repr(value)) for name, value in found if name != "dt" or dt is None))
        key = (dt, record, str(self.input_unit), environment)
        if key not in self._programs:
            self._programs[key] = Program(self._function(dt, record))
        return self._programs[key]

    def _function(self, dt: float | None, record: bool) -> Callable[..., Any]:
        held, unit, clocked = self.held, self.input_unit, self.held.clocked
        names = [slot.name for slot in held.kind("state")]
        value_names, time_unit = self.value_names, held.time_unit

        def run(*arrays: Any) -> tuple[Any, ...]:
            values, states, xs = arrays[: len(value_names)], arrays[len(value_names) : -1], arrays[-1]

            # A new function for every trace: JAX remembers a scan's body by its identity, and this one closes over the
            # module, which holds the arrays of one trace.
            def step(states: tuple[Any, ...], x: Any) -> Any:
                environ = {} if dt is None else {"dt": quantity(dt, time_unit)}
                if clocked and dt is not None:
                    environ["t"] = quantity(states[-1] * dt, time_unit)
                with brainstate.environ.context(**environ):
                    y, new = held.step(x, dict(zip(names, states, strict=False)), unit)
                after = [jax.numpy.asarray(new[n]).astype(s.dtype) for n, s in zip(names, states, strict=False)]
                states = (*after, *([states[-1] + 1] if clocked else []))
                return states, (y, states if record else ())

            with held.traced():
                held.write(dict(zip(value_names, values, strict=True)))
                last, (ys, recorded) = jax.lax.scan(step, states, xs)
            return (ys, *last, *recorded)

        return run

    # ---- copies --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A state that hangs on a graph can be neither deep-copied nor pickled: the copy gets its value.
        attributes = self.__dict__.copy()
        buffers = dict(attributes["_buffers"])
        for name in self.state_names:
            state = buffers[name]
            buffers[name] = None if state is None else state.detach()
        attributes["_buffers"], attributes["_programs"] = buffers, {}
        attributes["trail"] = type(self.trail)()
        return attributes

    def __deepcopy__(self, memo: dict[int, Any]) -> JaxStage:
        # A copy shares what is compiled: every array is an argument of it.
        twin: JaxStage = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin.__dict__["_programs"] = dict(self._programs)
        return twin

    def extra_repr(self) -> str:
        name = type(self.held.module).__name__
        return f"{name}, dt={self.dt!r}, time_dim={self.time_dim}, input in {self.input_unit}"
