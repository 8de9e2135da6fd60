"""The requirements: every named choice of a neuron, each with an id, as data.

Most come from the tables in the code: a choice of a field of `NeuronSpec` is `<field>.<choice>`, a raw form of a
parameter `raw.<form>`, a surrogate gradient `surrogate.<name>`. The rest, in `BEHAVIOURS`, is what a simulator owes
whatever it computes: states that carry on, every element, every length, every number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tracetorch.core.spec import CHOICES, RAW_FORMS
from tracetorch.functional.surrogates import SURROGATES

# Choices whose name is no word, in ids.
_WORDS = {">": "strict", ">=": "inclusive"}

BEHAVIOURS: Mapping[str, str] = MappingProxyType(
    {
        "parameter.per_neuron": "a parameter of shape [N] gives every neuron its own value",
        "parameter.leak": "the membrane decays towards the parameter leak",
        "parameter.bias": "the parameter bias is added to the membrane in the spike test, and only there",
        "parameter.spike_scale": "a spike is emitted as spike_scale; the reset subtracts whole thresholds",
        "parameter.neg_threshold": "spikes have two signs: a negative one where u < -neg_threshold - bias, which adds "
        "neg_threshold to the membrane",
        "parameter.neg_scale": "a negative spike is emitted as -neg_scale, a positive one as spike_scale; the reset "
        "takes whole thresholds",
        "parameter.resistance": "the parameter resistance is a factor of the input gain",
        "parameter.refractory_time": "the membrane is held while t - t_last < refractory_time, in floats: t = k*dt in "
        "step k, t_last that of the last spike",
        "parameter.initial_v": "the parameter initial_v is the membrane before the first step",
        "parameter.adaptation": "the threshold, also as a reset amount, is adapt_scale*n higher; after the step n is "
        "adapt_decay*n + (1-adapt_decay)*s",
        "parameter.surrogate_scale": "the surrogate is that of (u - theta) / surrogate_scale, by the chain rule",
        "gradient.input": "the gradient of the input is that of the equations, spikes replaced by their surrogate",
        "gradient.mem_decay": "so is the gradient of the decay, summed over time, batch and what shares it",
        "gradient.threshold": "so is the gradient of the threshold, through the reset, and through the spikes if "
        "threshold_gradient is true",
        "gradient.no_threshold": "with threshold_gradient false, no gradient reaches the threshold through the spikes",
        "state.carried": "a call goes on from the state in which the last call left the neuron",
        "state.chunks": "a sequence in pieces of any lengths gives what the whole gives",
        "state.fresh": "a run starts from the initial state, whatever ran before it",
        "state.levels": "the states are rounded to the nearest of state_levels before the spike test, of two as near "
        "to the first; the gradient passes as if they were not",
        "state.gradient": "the gradient flows back through the state from call to call",
        "shape.one_sample": "a batch of one",
        "shape.one_neuron": "a single neuron",
        "shape.one_step": "a sequence of one step",
        "shape.every_element": "no neuron, row or step is left out, at sizes that no vector width divides",
        "shape.long": "2,000 steps",
        "number.decay_near_one": "decays within a few roundings of 1 lose next to nothing in a step",
        "number.decay_near_zero": "decays near 0 forget next to everything, and 0 all",
        "number.silence": "a neuron without input goes on decaying, for as long as it lasts",
        "number.denormal": "a membrane decays through the denormal numbers, not past them to 0",
        "number.infinite": "an infinite input fires, and a reset to a value leaves nothing of it",
        "number.double": "a float64 input is computed in float64",
        "number.nan": "a NaN in one neuron's input is that neuron's membrane from then on, no spike, and nobody else's",
    }
)


@dataclass(frozen=True)
class Requirement:
    """One requirement.

    Attributes:
        id: its name in cases, reports and lists, `<group>.<what>`.
        group: the field of `NeuronSpec`, or "raw", "surrogate", "parameter", "gradient", "state", "shape", "number".
        choice: the field's choice, the raw form or the surrogate; None for a behaviour.
        text: what must hold.
    """

    id: str
    group: str
    choice: str | None
    text: str


def _all() -> dict[str, Requirement]:
    found = []
    for field, choices in CHOICES.items():
        found += [Requirement(f"{field}.{_WORDS.get(c, c)}", field, c, text) for c, text in choices.items()]
    found += [Requirement(f"raw.{form}", "raw", form, f"the value is {text}") for form, text in RAW_FORMS.items()]
    for name, kind in SURROGATES.items():
        text = (kind.vjp.__doc__ or "").strip().rstrip(".").partition(": ")[2]
        found.append(Requirement(f"surrogate.{name}", "surrogate", name, f"the surrogate gradient {text}"))
    found += [Requirement(id, id.partition(".")[0], None, text) for id, text in BEHAVIOURS.items()]
    return {requirement.id: requirement for requirement in found}


REQUIREMENTS: Mapping[str, Requirement] = MappingProxyType(_all())
