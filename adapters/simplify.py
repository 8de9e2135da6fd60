"""A spec without the parts that change nothing, and what then only a layer that computes the spec itself can do."""

from __future__ import annotations

import numpy as np

from tracetorch.adapters.base import Building, ConversionError
from tracetorch.adapters.losses import neutral, unneeded
from tracetorch.core.spec import NeuronSpec

# Parameters that no framework's own class has but brainpy.state's, and the number with which they have no part.
_RARE = {"resistance": 1.0, "surrogate_scale": 1.0, "initial_v": 0.0}
# A dt/tau below which 1 - exp(-dt/tau), taken of the rounded exponential, has lost more than 1e-5 of itself in float32.
_SLOW = 0.02


def simplified(spec: NeuronSpec) -> NeuronSpec:
    """The same neuron without a resistance or scale of 1, a start or leak of 0; a reset by theta is called so.

    A threshold that adapts is no constant amount.
    """
    kept = {n: p for n, p in spec.parameters.items() if not (n in _RARE and neutral(spec, n, _RARE[n]))}
    changes = {}
    amount, threshold = kept.get("reset_amount"), kept.get("threshold")
    if spec.reset_amount == "value" and not spec.adaptive and amount is not None and threshold is not None:
        same = not amount.learnable and not threshold.learnable
        if same and bool(np.all(amount.value == threshold.value)) and amount.value.dtype == threshold.value.dtype:
            changes["reset_amount"] = "threshold"
            del kept["reset_amount"]
    return unneeded(spec.replace(parameters=kept, **changes))


def rare(spec: NeuronSpec) -> tuple[str, ...]:
    """Of a simplified spec: what only a layer that computes the spec itself can do."""
    own = spec.form.startswith("tracetorch.")
    smooth = ("spike_count",) if own and spec.spike_count == "smooth" else ()
    if spec.signed:
        return (*smooth, "neg_threshold")
    if own:
        return (*smooth, "bias") if "bias" in spec.parameters else smooth
    if spec.form != "brainpy.LIF":
        return ()
    found = [name for name in (*_RARE, "leak") if name in spec.parameters]
    decay = spec.parameters.get("mem_decay")
    if decay is not None and decay.raw == "exp_dt_tau" and bool(np.any((spec.dt or 1.0) / decay.value < _SLOW)):
        found.append("mem_decay")
    return tuple(found)


def described(spec: NeuronSpec) -> str:
    """Why the spec is computed as it is, for the report."""
    words = [f"{name}={_shown(spec, name)}" for name in rare(spec)]
    return ", ".join([*words, f"reset_timing={spec.reset_timing}"])


def _shown(spec: NeuronSpec, name: str) -> str:
    """A parameter, or a choice."""
    return str(spec.parameters[name] if name in spec.parameters else getattr(spec, name))


def refuse(spec: NeuronSpec, building: Building, name: str) -> ConversionError:
    """The error for `stock=True`."""
    field = rare(spec)[0]
    whys = {
        "mem_decay": "1 - exp(-dt/tau) of the rounded exponential is too far off",
        "spike_count": f"{name} emits whole spikes",
        "neg_threshold": f"the spikes of {name}'s neurons have one sign",
    }
    why = whys.get(field, f"{name} has none")
    return building.impossible(field, _shown(spec, field), why, "stock=False")
