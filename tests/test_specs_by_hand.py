"""Specs at the edges of what a framework's own class is: a decay of 1, raw numbers that only look neutral, rare pairs.

Each is built in every framework and judged by its own equations, or refused.
"""

import numpy as np
import pytest
import sinabs.layers as sl
import torch
from norse.torch.functional.iaf import IAFParameters
from norse.torch.module.iaf import IAFCell
from sinabs import activation
from torch import nn

from tests.layer_grid import Found, Seen, check_target
from tracetorch import adapters, oracle
from tracetorch.core.spec import NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import Surrogate

TARGETS = ("tracetorch", "sinabs", "snntorch", "spikingjelly", "norse")


def number(value, learnable=False, raw="value"):
    """A parameter."""
    return Parameter(np.float32(value), learnable, raw)


def made(parameters, **choices):
    """A spec of the form `sinabs.LIF` with a threshold of 1, unless told otherwise."""
    fields = {"form": "sinabs.LIF", "comparison": ">", "surrogate": Surrogate("fast_sigmoid"), **choices}
    if fields.get("output") == "membrane":
        fields |= {"surrogate": None, "spike_count": "none", "reset": "none", "threshold_gradient": False}
        return NeuronSpec(parameters=parameters, **fields)
    return NeuronSpec(parameters={"threshold": number(1), **parameters}, **fields)


ONE = {"mem_decay": number(1)}
AFTER = {"reset_timing": "next_step_after_decay"}
SPECS = {
    "no loss, subtracted": made(ONE),
    "no loss, to a value": made({**ONE, "reset_value": number(0.3)}, reset="value"),
    "no loss, no spikes": made(ONE, output="membrane"),
    "tau of 1": made({"mem_decay": number(1, raw="exp_tau")}, comparison=">="),
    "tau of 1, to zero": made({"mem_decay": number(1, raw="exp_tau"), "reset_value": number(0)}, reset="value"),
    "tau and a clamped alpha": made(
        {"mem_decay": number(5.76, raw="exp_tau"), "syn_decay": number(0.9, True, "clamped")},
        output="membrane",
        synapse="add_then_decay",
    ),
    "softplus(0), to a value": made(
        {"mem_decay": number(0.9), "reset_value": number(0, raw="softplus"), "threshold": number(2)}, reset="value"
    ),
    "softplus(0), a bound": made(
        {"mem_decay": number(0.9), "min_v_mem": number(0, raw="softplus"), "threshold": number(2)}, clamp="after_reset"
    ),
    "a value, after the decay": made(
        {"mem_decay": number(0.5), "reset_amount": number(0.8)}, reset_amount="value", comparison=">=", **AFTER
    ),
    "a lower bound of what is emitted": made(
        {"mem_decay": number(0.9), "min_v_mem": number(0)}, output="membrane", clamp="before_spikes"
    ),
    "no synapse to keep a gain": made(
        {"mem_decay": number(0.9)}, form="snntorch.Lapicque", input_gain="one_minus_decay_kept", **AFTER
    ),
    "a residual reset to a value": made(
        {"mem_decay": number(0.9), "reset_value": number(-0.3)}, reset="value", reset_timing="same_step_residual"
    ),
    "a winner, reset at once": made(
        {"mem_decay": number(0.9), "reset_value": number(0)}, reset="value", inhibition="winner", comparison=">="
    ),
    "smooth, from a value": made(
        {"mem_decay": number(0.9), "reset_value": number(-0.3)},
        spike_count="smooth",
        initial_state="reset_value",
        surrogate=Surrogate("logistic"),
    ),
    "the form brainpy.LIF, no decay": made({}, form="brainpy.LIF", decay="none"),
}
# Which frameworks build it, beside those that refuse it.
BUILT = {
    "no loss, subtracted": {"tracetorch", "sinabs", "snntorch", "spikingjelly", "norse"},
    "no loss, to a value": {"tracetorch", "sinabs", "snntorch", "spikingjelly", "norse"},
    "tau of 1": {"tracetorch", "sinabs", "snntorch", "spikingjelly", "norse"},
    "tau of 1, to zero": {"tracetorch", "sinabs", "snntorch", "spikingjelly", "norse"},
    "tau and a clamped alpha": {"tracetorch", "sinabs", "snntorch", "spikingjelly", "norse"},
    "a lower bound of what is emitted": {"tracetorch", "snntorch", "spikingjelly", "norse"},
}


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_built_computes_the_spec(name, stock):
    """The oracle judges every target by the spec itself; all else is a refusal with field, value and remedy."""
    spec, found = SPECS[name], Found()
    xs = 1.2 * torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(3)) + 0.3
    recording = oracle.Recording(
        xs.numpy(), np.zeros(xs.shape, np.float32), dict.fromkeys(spec.states, xs.numpy()), spec
    )
    built = set()
    for to in TARGETS:
        layer = check_target(found, Seen(spec, recording, {}), to, stock, xs, torch.ones_like(xs))
        built |= set() if layer is None else {to}
    assert not found.faults, "\n".join(found.faults)
    if not stock and name in BUILT:
        assert built == BUILT[name]


def test_a_frozen_tau_of_one_is_a_decay():
    """Not the raw number 1 of a neuron that keeps all of its membrane."""
    layer = sl.LIF(1.0, spike_fn=activation.SingleSpike, norm_input=False).requires_grad_(False)
    xs = torch.rand(30, 2, 5, generator=torch.Generator().manual_seed(0))
    expected = layer(xs.transpose(0, 1)).transpose(0, 1)
    node = adapters.build(adapters.spec(layer), "spikingjelly")
    assert expected.sum() > 20
    assert torch.equal(torch.stack([node(x) for x in xs]), expected)


def test_neutral_is_a_value_in_the_equations_and_not_a_raw_number():
    assert number(1).fixed_at(1)
    assert number(1, raw="clamped").fixed_at(1)
    assert Parameter(np.zeros(3, np.float32)).fixed_at(0)
    assert not number(1, learnable=True).fixed_at(1)
    assert not Parameter(np.array([1, 0.5], np.float32)).fixed_at(1)
    assert not any(
        number(1, raw=raw).fixed_at(1) for raw in ("exp_tau", "one_minus_inverse_tau", "softplus", "sigmoid")
    )


def test_a_gain_of_the_decay_needs_one():
    with pytest.raises(SpecError, match=r"input_gain='one_minus_decay'.*decay"):
        made({}, decay="none", input_gain="one_minus_decay")


def test_an_iaf_cell_that_learns_its_reset_is_refused():
    """Its initial state is the same tensor, so that its gradient is that of both."""
    with pytest.raises(SpecError, match="v_reset"):
        adapters.spec(IAFCell(IAFParameters(v_reset=nn.Parameter(torch.tensor(0.2)))))


def test_a_reset_that_is_learned_is_no_stock_iaf_cell_unnamed():
    parameters = {"threshold": number(1), "reset_value": number(0.2, learnable=True)}
    spec = made(parameters, form="norse.LIFBox", decay="none", reset="value", initial_state="reset_value")
    assert not isinstance(adapters.build(spec, "norse"), IAFCell)
    building = adapters.base.Building("layer", "norse", stock=True)
    assert isinstance(adapters.norse.build(spec, building), IAFCell)
    assert [note.gradient for note in building.notes if note.field == "reset_value"] == ["differs"]
