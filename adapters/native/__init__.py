"""traceTorch's own layers as source and target.

`SpecNeuron` holds any spec. Of the 32 layers, a spec can describe those of one branch, one threshold and no recurrence:

    LI      mem = beta*mem + x;            output = mem            LIEMA   mem = beta*mem + (1-beta)*x
    SLI, SLIEMA  syn = alpha*syn + (1-alpha)*x in the place of x
    LIB     z = mem - threshold + bias;    s = spikes(z);          mem = mem - s*threshold       SLIB likewise

The spikes are round(sigmoid(4 z)) (`round_ste`), sigmoid(4 z) itself, or those of a `surrogate_spike`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tracetorch.adapters.base import Building, note_quirks, readable
from tracetorch.adapters.native.build import build_named
from tracetorch.adapters.networks.modules import nested
from tracetorch.core.forms import check_form
from tracetorch.core.forms_native import OF_DISTANCE
from tracetorch.core.layer import Layer
from tracetorch.core.model import Sequential
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.quantizers import round_ste
from tracetorch.functional.spikes import sigmoid4x, surrogate_spike
from tracetorch.functional.surrogates import OpaqueSurrogate, Surrogate
from tracetorch.snn.composed import Composed
from tracetorch.snn.spec_neuron import SpecNeuron

NAME = "tracetorch"
STEPPED = True
_RAW = {"mem_decay": "sigmoid", "syn_decay": "sigmoid", "threshold": "softplus", "bias": "value"}
_NAMES = {"mem_decay": "raw_beta", "syn_decay": "raw_alpha", "threshold": "raw_threshold", "bias": "raw_bias"}
# Forms that another one computes in the order of a step.
_STEPPED_FORMS = {
    ("snntorch.StateLeaky", "spikes"): "snntorch.Leaky",
    ("snntorch.StateLeaky", "membrane"): "tracetorch.LI",
}


def is_neuron(module: nn.Module) -> bool:
    """Any native layer."""
    return isinstance(module, Layer)


def _refuse_parts(layer: Composed) -> None:
    """Raises `SpecError` for what a spec has no field for."""
    parts, name = layer.parts, type(layer).__name__
    if parts.dual:
        raise SpecError(f"{name}: parts D: a pair of traces, one for each sign of the input, has no field in a spec")
    if parts.recurrent:
        raise SpecError(f"{name}: parts R: a trace of the layer's own output has no field in a spec")
    if parts.family not in ("LI", "LIB"):
        raise SpecError(f"{name}: family {parts.family}: a threshold for each sign has no field in a spec")
    if parts.ema and parts.output.fires:
        raise SpecError(f"{name}: ema: an average that is reset has no order of operations here")
    if layer.dim != -1:
        raise SpecError(f"dim={layer.dim}: a spec's parameters broadcast against the last dimension, dim=-1")


def _spike_choices(layer: Composed) -> dict[str, object]:
    """The fields that `spike_fn` and `quant_fn` decide."""
    function, quantizer = layer.spike_fn, layer.quant_fn
    hard = type(quantizer) is round_ste and quantizer.step_size == 1
    if type(function) is surrogate_spike and (hard or type(quantizer) is nn.Identity):
        if function.surrogate.name not in OF_DISTANCE:
            raise SpecError(
                f"spike_fn={function!r}: a surrogate that scales with the threshold sees the number threshold="
                f"{function.threshold:g} there, not the layer's; those that can be read: {', '.join(OF_DISTANCE)}"
            )
        return {"spike_count": "single", "surrogate": function.surrogate}
    if function is not sigmoid4x:
        raise SpecError(f"spike_fn={function!r}: only tt.functional.sigmoid4x and surrogate_spike can be read")
    if type(quantizer) is nn.Identity:
        return {"spike_count": "smooth", "surrogate": Surrogate("logistic")}
    if not hard:
        raise SpecError(
            f"quant_fn={quantizer!r}: only the hard quantizer tt.functional.round_ste() makes spikes, none smooth ones"
        )
    return {"spike_count": "single", "surrogate": Surrogate("logistic")}


def spec(layer: nn.Module, dt: float | None = None) -> NeuronSpec:
    """The spec of a `SpecNeuron`, a `LI`, `LIEMA`, `SLI`, `SLIEMA`, `LIB` or `SLIB`, with the present parameters.

    Raises:
        SpecError: another layer, another `spike_fn` or `quant_fn`, or a feature dimension other than the last.
    """
    if type(layer) is SpecNeuron:
        return layer.spec
    if not isinstance(layer, Composed) or type(layer).__module__.split(".")[0] != "tracetorch":
        raise SpecError(f"{type(layer).__name__}: of the native layers SpecNeuron and those of tt.snn can be read")
    _refuse_parts(layer)
    values = {name: readable(layer, own, _RAW[name]) for name, own in attributes(layer).items()}
    synapse = "moving_average" if layer.parts.synapse else "none"
    if layer.parts.output.fires:
        return NeuronSpec(
            form="tracetorch.LIB",
            synapse=synapse,
            comparison=">",
            parameters=values,
            **_spike_choices(layer),  # type: ignore[arg-type]
        )
    return NeuronSpec(
        form="tracetorch.LI",
        output="membrane",
        synapse=synapse,
        input_gain="one_minus_decay" if layer.parts.ema else "one",
        spike_count="none",
        reset="none",
        threshold_gradient=False,
        parameters=values,
    )


def attributes(layer: nn.Module) -> Mapping[str, str]:
    """The names are the same in a `SpecNeuron`; the others keep `raw_beta`, ..."""
    if isinstance(layer, SpecNeuron):
        return {name: name for name in layer.spec.parameters}
    return {name: own for name, own in _NAMES.items() if hasattr(layer, own)}


def states(layer: nn.Module) -> tuple[str, ...]:
    """The declared states."""
    assert isinstance(layer, Layer)
    return layer.state_names


def reset(layer: nn.Module) -> None:
    """`layer.reset_states()`."""
    assert isinstance(layer, Layer)
    layer.reset_states()


def trace(layer: nn.Module, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Step by step from the initial state."""
    assert isinstance(layer, Layer)
    layer.reset_states()
    outputs, states = layer.trace(xs)
    return outputs, {{"mem": "v_mem", "syn": "i_syn"}.get(name, name): state for name, state in states.items()}


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


def wrap(module: nn.Module) -> nn.Module:
    """Native networks take one step per call, as the module does."""
    return module


def assemble(modules: Mapping[str, nn.Module], emit_state: bool) -> nn.Module:
    """A `tt.Sequential`; the last layer's state is its attribute `v_mem`."""
    return nested(modules, Sequential)
