"""One stage of a pipeline: a module of any framework, run over whole sequences [T, B, ...], its states within reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.fusing.twin import Twin
from tracetorch.adapters.networks.modules import per_step
from tracetorch.adapters.pipelines import states as kept
from tracetorch.adapters.pipelines.conventions import Convention, check_stated, convention, given
from tracetorch.adapters.stateful import SeamError, StateHolder
from tracetorch.core import folding
from tracetorch.core.layer import Layer
from tracetorch.core.model import Model
from tracetorch.core.unrolling import unroll


def stage(
    module: nn.Module, kind: str, time_dim: int | None = None, explicit_state: bool = False
) -> tuple[nn.Module, Convention]:
    """A module for a `Pipeline`, and what a call of it takes, where the pipeline cannot know that.

    Args:
        module: any.
        kind: "step": it takes one time step [B, ...]; "sequence": all steps; "squeezed": all steps as [B*T, ...];
            "stateless": one step, and what it returns depends on that step alone.
        time_dim: with "sequence", 0 for [T, B, ...] or 1 for [B, T, ...].
        explicit_state: its call is `module(x, state) -> (y, state)`, with None for the initial state.

    Raises:
        ValueError: another kind, a time dimension missing or without a meaning.
    """
    return module, given(kind, time_dim, explicit_state)


class Stage(StateHolder):
    """A module and its convention.

    Args:
        module: it stays the user's own: parameters and states are its own.
        how: what a call of it takes; None: found out.
        fold: as of `tt.unroll`.
        what: the stage's name, for messages.
    """

    def __init__(
        self, module: nn.Module, how: Convention | None = None, fold: str = "fast", what: str = "stage"
    ) -> None:
        super().__init__()
        self.module = module
        if how is not None and how.stated:
            check_stated(module, how, what)
        self.convention = convention(module, what) if how is None else how
        self.fold, self.what = fold, what
        # States that go in and out of calls, by path of the module, and what they look like before the first call.
        self.explicit: dict[str, Any] = {}
        self.templates: dict[str, Any] = {}
        self._find_states()

    def _find_states(self) -> None:
        """Where the states are; a module inside may be another than at the last call."""
        self.places = tuple(kept.places(self.module))
        paths = [path for path, part in self._parts() if part.explicit]
        self.explicit = {path: self.explicit.get(path) for path in paths}
        self.templates = {
            path: self.templates[path] if path in self.templates else kept.template(self.module.get_submodule(path))
            for path in paths
        }

    def _parts(self) -> tuple[tuple[str, Convention], ...]:
        return self.convention.parts or (("", self.convention),)

    # ---- states --------------------------------------------------------------------------------------------------

    @property
    def holds_states(self) -> bool:  # type: ignore[override]
        """Whether there are any; native layers and JAX stages inside have their own."""
        return bool(self.places or self.explicit)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The foreign neurons' states by path, and those that the stage keeps for them."""
        passed = [
            f"{path}.state{k}" if path else f"state{k}"
            for path, looks in self.templates.items()
            for k in range(max(1, len(kept.tensors(looks))))
        ]
        return (*(place.name for place in self.places), *passed)

    def get_state(self, name: str) -> Tensor | None:
        """As of a `StateHolder`."""
        for place in self.places:
            if place.name == name:
                return kept.read(self.module, place)
        path, k = self._passed(name)
        found = kept.tensors(self.explicit[path])
        return found[k] if found else None

    def set_state(self, name: str, value: Tensor | None) -> None:
        """As of a `StateHolder`."""
        for place in self.places:
            if place.name == name:
                kept.write(self.module, place, value)
                return
        path, k = self._passed(name)
        if value is None:
            self.explicit[path] = None
            return
        present = self.templates[path] if self.explicit[path] is None else self.explicit[path]
        found = list(kept.tensors(present))
        if k >= len(found):
            raise ValueError(f"{self.what}: what its state looks like is not known before its first call")
        found[k] = value
        fresh = iter(found)
        self.explicit[path] = kept.mapped(present, lambda _: next(fresh))

    def _passed(self, name: str) -> tuple[str, int]:
        path, _, own = name.rpartition(".")
        return path, int(own.removeprefix("state"))

    def check_batch(self, batch: int, what: str, dim: int = 0) -> None:
        """As of a `StateHolder`; a state of torch's recurrent modules has its batch second."""
        super().check_batch(batch, what, self.convention.state_batch_dim)

    def reset_states(self) -> None:
        """As of a `StateHolder`."""
        self._find_states()
        super().reset_states()

    # ---- running -------------------------------------------------------------------------------------------------

    def forward(self, xs: Tensor) -> Tensor:
        """xs: [T, B, ...] -> [T, B, ...]; states carry on."""
        if not self.convention.stated:  # SpikingJelly's step_mode may be another since, or there may be hooks
            self.convention = convention(self.module, self.what)
            self._find_states()
        if self.holds_states:
            self.enter_call()
            self.check_batch(xs.shape[1], self.what)
        for path, part in self._parts():
            xs = self._run(self.module.get_submodule(path), path, part, xs)
        if self.holds_states:
            self.leave_call(xs)
        return xs

    def _run(self, module: nn.Module, path: str, how: Convention, xs: Tensor) -> Tensor:
        if how.kind == "stateless":
            folded = folding.fold(module, xs) if self.fold == "fast" else None
            return per_step(module, xs) if folded is None else folded
        if how.kind == "step":
            return self._steps(module, path, how, xs)
        moved = xs.transpose(0, 1) if how.time_dim == 1 or how.kind == "squeezed" else xs
        if how.kind == "squeezed":
            self._check_squeezed(module, xs)
            return _first(module(moved.flatten(0, 1))).unflatten(0, moved.shape[:2]).transpose(0, 1)
        ys = self._called(module, path, how, moved)
        return ys.transpose(0, 1) if how.time_dim == 1 and ys.ndim > 1 else ys

    def _steps(self, module: nn.Module, path: str, how: Convention, xs: Tensor) -> Tensor:
        if isinstance(module, (Layer, Model)) and not how.explicit:
            return unroll(module, xs, 0, self.fold)
        sequence: Any = getattr(module, "unroll", None) if isinstance(module, Twin) else None
        if sequence is not None:
            if not how.explicit:
                return _first(sequence(xs, 0))
            return self._keep(path, sequence(xs, 0, _copied(self.explicit[path])), module)
        return torch.stack([self._called(module, path, how, x) for x in xs])

    def _called(self, module: nn.Module, path: str, how: Convention, x: Tensor) -> Tensor:
        if not how.explicit:
            return _first(module(x))
        state = _copied(self.explicit[path])
        if state is None:
            return self._keep(path, module(x), module)
        return self._keep(path, module((x, state)) if how.paired else module(x, state), module)

    def _keep(self, path: str, result: Any, module: nn.Module) -> Tensor:
        """The output of `(output, state)`; the state stays here."""
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{type(module).__name__}: a call returned {type(result).__name__}, not (output, state)")
        y, self.explicit[path] = result
        self.templates[path] = kept.mapped(result[1], lambda _: torch.empty(0))
        return y

    def _check_squeezed(self, module: nn.Module, xs: Tensor) -> None:
        for child in module.modules():
            sizes = (("num_timesteps", xs.shape[0], "steps"), ("batch_size", xs.shape[1], "samples"))
            for attribute, size, name in sizes:
                meant = getattr(child, attribute, -1)
                if hasattr(child, "squeeze_forward") and meant not in (-1, None, size):
                    raise SeamError(
                        f"{self.what}: {type(child).__name__} has {attribute}={meant}, the input {size} {name}. "
                        f"Remedy: {attribute}={size}, or the layer without Squeeze"
                    )

    # ---- state_dict without states -------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the module, without hidden states: sinabs has them in it, in the shape of the last batch."""
        found = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for place in self.places:
            found.pop(f"{prefix}module.{place.name}", None)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # A state that the state_dict has not is left as it is: its own value is loaded into it.
        for place in self.places:
            owner: Any = self.module.get_submodule(place.path)
            if place.framework == "sinabs" and owner._buffers.get(place.own) is not None:
                state_dict[f"{prefix}module.{place.name}"] = owner._buffers[place.own].detach()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(fn, *args, **kwargs)
        self.explicit = {path: kept.mapped(state, fn) for path, state in self.explicit.items()}
        return result

    def extra_repr(self) -> str:
        return str(self.convention)


def _copied(state: Any) -> Any:
    """A structure of its own around the same tensors: Norse writes into a list of states."""
    return kept.mapped(state, lambda tensor: tensor)


def _first(result: Any) -> Tensor:
    """The output of a call that may return states beside it (snnTorch)."""
    return result[0] if isinstance(result, (tuple, list)) else result
