"""traceTorch's own layers as source and target.

`SpecNeuron` holds any spec. Of the 32 layers, a spec can describe those of one branch that take no trace of themselves:

    LI      mem = beta*mem + x;            output = mem            LIEMA   mem = beta*mem + (1-beta)*x
    SLI, SLIEMA  syn = alpha*syn + (1-alpha)*x in the place of x
    LIB     z = mem - threshold + bias;    s = spikes(z);          mem = mem - s*threshold       SLIB likewise
    LIT     p = spikes(mem - pos_threshold + bias);    n = -spikes(-neg_threshold - mem - bias);   output = p + n
            mem = mem - p*pos_threshold - n*neg_threshold          LITS: p*pos_scale + n*neg_scale       SLIT, SLITS

The spikes are round(sigmoid(4 z)) (`round_ste`), sigmoid(4 z) itself, or those of a `surrogate_spike`. The others, with
a D or an R in their names, are converted to native networks alone: copied, and judged by their own equations.

Reading is in `native.read`, the named layers from specs in `native.build`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from tracetorch.adapters.base import Building, ConversionError, note_quirks
from tracetorch.adapters.native.build import build_named
from tracetorch.adapters.native.read import EQUATIONS, attributes, described, spec, states
from tracetorch.adapters.networks.modules import as_it_is as wrap
from tracetorch.adapters.networks.modules import nested
from tracetorch.core.composition import SPEC_STATES, Composition
from tracetorch.core.forms import check_form
from tracetorch.core.layer import Layer
from tracetorch.core.model import Sequential
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.surrogates import OpaqueSurrogate
from tracetorch.snn.composed import Composed
from tracetorch.snn.spec_neuron import SpecNeuron

NAME = "tracetorch"
STEPPED = True
# Forms that another one computes in the order of a step.
_STEPPED_FORMS = {
    ("snntorch.StateLeaky", "spikes"): "snntorch.Leaky",
    ("snntorch.StateLeaky", "membrane"): "tracetorch.LI",
}


def is_neuron(module: nn.Module) -> bool:
    """Any native layer."""
    return isinstance(module, Layer)


def reset(layer: nn.Module) -> None:
    """`layer.reset_states()`."""
    assert isinstance(layer, Layer)
    layer.reset_states()


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Step by step from the initial state."""
    assert isinstance(layer, Layer)
    layer.reset_states()
    own = layer.spec_states if isinstance(layer, SpecNeuron) else None
    outputs, states = layer.trace(xs, states=own)
    return outputs, {SPEC_STATES.get(name, name): state for name, state in states.items()}


def build(spec: NeuronSpec, building: Building) -> nn.Module:
    """A `SpecNeuron`: the same form, so the same bits. With `stock`, one of the 32 layers."""
    note_quirks(spec, building)
    if isinstance(spec.surrogate, OpaqueSurrogate):
        building.note("surrogate", f"{spec.surrogate}: your own callable, carried as it is", gradient="opaque")
    if building.stock:
        return build_named(spec, building)
    form = _STEPPED_FORMS.get((spec.form, spec.output), spec.form)
    spec = spec.replace(form=form)
    try:
        check_form(spec)
    except SpecError as error:
        raise building.impossible("form", spec.form, str(error), "another source layer") from error
    return SpecNeuron(spec)


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """A `tt.Sequential`; the last layer's state is its attribute `v_mem`."""
    return nested(modules, Sequential)


# What a framework has in the place of a part.
_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "R": {
        "snntorch": "snntorch.RLeaky returns the spikes of the step before, and no trace of them",
        "sinabs": "sinabs.layers.LIFRecurrent returns the spikes of the step before, and no trace of them",
    },
}
_WITHOUT = {
    "D": "the layer without D, which with two equal decays is the same but for roundings",
    "R": "the layer without R, which is the same where rec_weight is 0 and not learnable",
    "EMA": "the layer without the average",
}


def copied(layer: nn.Module) -> nn.Module:
    """A copy of a layer in its initial state, that computes with its parameters and not with what was baked of them."""
    twin = copy.deepcopy(layer)
    assert isinstance(twin, Layer)
    twin.reset_states()
    twin.TTdecompile()
    return twin


def refusal(whole: Composition, building: Building) -> ConversionError:
    """Why a layer with the letters D or R is not converted to another framework."""
    letter = "D" if whole.dual else "R" if whole.recurrent else "EMA"
    nothing = f"no neuron of {building.framework} does so"
    why = f"{EQUATIONS[letter]}: {_ELSEWHERE.get(letter, {}).get(building.framework, nothing)}"
    remedy = f"to='tracetorch'; or {_WITHOUT[letter]}"
    return building.impossible("parts", f"{letter} of {whole.name}", why, remedy)


def carries(layer: nn.Module, stock: bool) -> bool:
    """Whether a native target is a copy of this native layer: one of the 32, and with `stock=False` any."""
    return isinstance(layer, Composed) or (isinstance(layer, SpecNeuron) and not stock)


__all__ = [
    "NAME",
    "STEPPED",
    "assemble",
    "attributes",
    "build",
    "carries",
    "copied",
    "described",
    "is_neuron",
    "refusal",
    "reset",
    "spec",
    "states",
    "trace",
    "wrap",
]
