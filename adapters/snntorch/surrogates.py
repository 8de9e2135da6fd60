"""snnTorch: the surrogate gradients of its neurons (snntorch 1.0.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import snntorch
from snntorch import surrogate as stock_surrogates

from tracetorch.adapters.snntorch.layers import SpikeGrad
from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import OpaqueSurrogate, Surrogate

# snntorch.surrogate function -> (our name, {its argument: our parameter})
SURROGATES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "atan": ("atan", {"alpha": "alpha"}),
    "fast_sigmoid": ("fast_sigmoid", {"slope": "slope"}),
    "sigmoid": ("sigmoid", {"slope": "slope"}),
    "straight_through_estimator": ("straight_through", {}),
    "triangular": ("triangular", {"threshold": "scale"}),
    "heaviside": ("heaviside", {}),
    "spike_rate_escape": ("spike_rate_escape", {"beta": "beta", "slope": "slope"}),
    "SFS": ("sparse_fast_sigmoid", {"slope": "slope", "B": "cutoff"}),
}


def surrogate_of(layer: Any) -> tuple[Surrogate, bool]:
    """The surrogate of a layer and whether its comparison is strict."""
    function = layer.spike_grad
    if isinstance(function, SpikeGrad):
        return function.surrogate, function.strict
    if getattr(function, "__self__", None) is snntorch.LeakyParallel.ATan:  # its own default, with alpha=2
        return Surrogate("atan", (("alpha", 2.0),)), True
    if getattr(function, "__name__", "") == "_surrogate_bypass":  # surrogate_disable, at construction
        return Surrogate("zero"), True
    if getattr(function, "__module__", None) == stock_surrogates.__name__:
        name = function.__qualname__.split(".")[0]
        closure = function.__closure__
        cells = {} if closure is None else dict(zip(function.__code__.co_freevars, closure, strict=True))
        if name == "custom_surrogate" and set(cells) == {"func"} and callable(cells["func"].cell_contents):
            return OpaqueSurrogate(function=cells["func"].cell_contents, kind="gradient"), True
        if name in SURROGATES and set(cells) == set(SURROGATES[name][1]):
            ours, names = SURROGATES[name]
            return Surrogate(ours, tuple((names[k], float(cells[k].cell_contents)) for k in names)), True
    raise SpecError(
        f"spike_grad={function!r}: only snntorch.surrogate's {', '.join(SURROGATES)} and custom_surrogate can be read; "
        "a function of your own decides the spikes too, which no other framework knows: tt.fuse traces it as it is"
    )


def without_reset(layer: Any) -> dict[str, Any]:
    """The fields of a spec whose neuron fires as the layer does, and is never reset."""
    surrogate, strict = surrogate_of(layer)
    return {
        "comparison": ">" if strict else ">=",
        "reset": "none",
        "reset_timing": "next_step_after_decay",
        "reset_gradient": "detached",
        "surrogate": surrogate,
    }
