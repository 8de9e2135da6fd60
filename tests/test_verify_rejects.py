"""`verify` must reject: a target that was damaged after the conversion does not agree, and the right layer is named."""

import pytest
import sinabs.layers as sl
import snntorch as snn
import torch
from sinabs import activation
from snntorch import surrogate
from torch import nn

from tracetorch import adapters

T, B = 40, 5


def linear(inputs, outputs, seed=0):
    layer = nn.Linear(inputs, outputs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # eighths, so that sums are exact and meet the threshold
        layer.weight.copy_(torch.randint(-4, 9, (outputs, inputs), generator=generator) / 8.0)
        layer.bias.zero_()
    return layer


def network(**options):
    parts = [linear(8, 12), snn.Leaky(**{"beta": 0.5, "init_hidden": True, **options})]
    return nn.Sequential(*parts, linear(12, 6, 1), snn.Leaky(beta=torch.full((6,), 0.9), init_hidden=True))


def sample():
    return (torch.rand(T, B, 8, generator=torch.Generator().manual_seed(2)) < 0.3).float()


def converted(to, **options):
    result = adapters.convert(network(**options), to=to, sample=sample(), time_dim=0)
    assert result.agreement.ok
    assert result.agreement.rows[1].spikes > 100
    assert result.agreement.rows[3].spikes > 100
    assert result.verify(sample()).ok
    return result


def wrong(agreement, what="forward"):
    """Names of the layers that the agreement finds wrong."""
    if what == "gradient":
        return [row.name for row in agreement.rows if row.unexpected]
    return [row.name for row in agreement.rows if row.forward == "approximate"]


ATTRIBUTES = {
    "sinabs": {"threshold": "spike_threshold", "decay": "alpha_mem"},
    "tracetorch": {"threshold": "threshold", "decay": "mem_decay"},
    "snntorch": {"threshold": "threshold", "decay": "beta"},
}
SOURCE = {"threshold": "threshold", "decay": "beta"}


@pytest.mark.parametrize("to", ATTRIBUTES)
@pytest.mark.parametrize("name", ["threshold", "decay"])
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("change", [1e-4, -1e-4, 0.1])
def test_a_parameter_of_a_neuron(to, name, layer, change):
    result = converted(to)
    with torch.no_grad():
        value = getattr(result.model[layer], ATTRIBUTES[to][name])
        value.reshape(-1)[-1].add_(change)  # of one neuron, where each has its own
    agreement = result.verify(sample(), grad=False)
    assert not agreement.ok
    assert agreement.changed_parameters == (f"{layer}.{SOURCE[name]}",)
    assert f"{layer}.{SOURCE[name]}" in str(agreement)
    assert "DO NOT AGREE" in str(agreement)
    assert wrong(agreement) == [str(layer)]
    row = agreement.rows[layer]
    assert row.state_violations + row.unexplained_mismatches > 0
    assert row.first_violation is not None
    if change == 0.1 and name == "threshold":
        assert agreement.unexplained_mismatches > 0


@pytest.mark.parametrize("to", ATTRIBUTES)
@pytest.mark.parametrize("name", ["threshold", "decay"])
def test_a_parameter_that_is_not_a_number(to, name):
    result = converted(to)
    with torch.no_grad():
        getattr(result.model[3], ATTRIBUTES[to][name]).fill_(float("nan"))
    with pytest.raises(adapters.ConversionError, match="not finite") as caught:
        result.verify(sample())
    assert caught.value.layer == "'3'"


@pytest.mark.parametrize("to", ATTRIBUTES)
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_weight(to, name, change):
    result = converted(to)
    with torch.no_grad():
        getattr(result.model[2], name).view(-1)[1] += change
    agreement = result.verify(sample(), grad=False)
    assert not agreement.ok
    assert wrong(agreement) == ["2"]
    assert agreement.changed_parameters == (f"2.{name}",)


def test_a_parameter_of_the_source_changed_since():
    result = converted("sinabs")
    with torch.no_grad():
        result._source.root[0].weight[0, 0] += 0.25
        result._source.root[3].threshold += 0.25
    agreement = result.verify(sample(), grad=False)
    assert not agreement.ok
    assert wrong(agreement) == ["0", "3"]
    assert agreement.changed_parameters == ("0.weight", "3.threshold")


def test_a_change_that_the_sample_does_not_show():
    result = converted("sinabs")
    with torch.no_grad():
        result.model[0].weight[0, 0] += 1
    silent = torch.zeros(T, B, 8)
    agreement = result.verify(silent)
    assert wrong(agreement) == []
    assert not agreement.ok
    assert agreement.changed_parameters == ("0.weight",)
    assert result.verify(silent, carry_back=True).ok


def replace_reset(model):
    model[1].reset_fn = activation.MembraneSubtract()


def zero_reset(model):
    model[1].reset_fn = activation.MembraneReset()


def add_clamp(model):
    model[1].min_v_mem = nn.Parameter(torch.tensor(-0.1), requires_grad=False)


def norm_input(model):
    model[1].norm_input = True


def not_strict(model):
    model[1].spike_fn = activation.SingleSpike


def several(model):
    model[1].spike_fn = activation.MultiSpike


def delay_spikes(model):
    old = model[1].forward

    def forward(x):
        spikes = old(x)
        return torch.cat([torch.zeros_like(spikes[:, :1]), spikes[:, :-1]], 1)

    model[1].forward = forward


def one_spike_less(model):
    old = model[1].forward

    def forward(x):
        spikes = old(x)
        place = tuple(spikes.nonzero()[-1])
        return spikes.index_put(tuple(p.reshape(1) for p in place), torch.zeros(1))

    model[1].forward = forward


def half_spikes(model):
    old = model[1].forward
    model[1].forward = lambda x: old(x) * 0.5


def nan_once(model):
    old = model[1].forward

    def forward(x):
        spikes = old(x).clone()
        spikes[0, 3, 0] = float("nan")
        return spikes

    model[1].forward = forward


BROKEN = [replace_reset, zero_reset, add_clamp, norm_input, not_strict, several, delay_spikes, one_spike_less]
BROKEN += [half_spikes, nan_once]


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_semantics_changed_in_a_sinabs_target(change):
    result = converted("sinabs")
    change(result.model)
    agreement = result.verify(sample(), grad=False)
    assert not agreement.ok
    assert wrong(agreement) == ["1"], str(agreement)
    assert agreement.changed_parameters == ()
    row = agreement.rows[1]
    assert row.first_violation is not None
    assert "outside the rounding bound, first at" in row.reason
    if change in (not_strict, delay_spikes, one_spike_less, half_spikes, nan_once):
        assert row.unexplained_mismatches > 0


def test_a_tie_decided_otherwise_is_unexplained_where_nothing_was_rounded():
    """Everything is a multiple of 2^-k here, and the membrane meets the threshold exactly."""
    result = converted("sinabs")
    not_strict(result.model)
    agreement = result.verify(sample(), grad=False)
    with torch.no_grad():
        first = result._source.root[0](sample()[0])
    ties = int((first == 1).sum())
    assert ties > 0
    assert agreement.rows[1].unexplained_mismatches >= ties


def unknown_reset(model):
    model[1].reset_fn = lambda spikes, state, threshold: state


def unknown_spike(model):
    model[1].spike_fn = type("Mine", (activation.SingleSpike,), {})


def hook(model):
    model[1].register_forward_hook(lambda module, inputs, output: output)


@pytest.mark.parametrize("change", [unknown_reset, unknown_spike, hook])
def test_a_target_that_can_no_longer_be_read_or_hides_something(change):
    result = converted("sinabs")
    change(result.model)
    if change is hook:
        assert result.verify(sample()).ok, "a hook that changes nothing passes"
        return
    with pytest.raises(adapters.ConversionError, match="can be read") as caught:
        result.verify(sample())
    assert caught.value.layer == "'1'"


def test_a_network_around_the_layers_that_does_something_else():
    result = converted("tracetorch")
    model = result.model
    model.register_forward_hook(lambda module, inputs, output: 1 - output)
    with pytest.raises(adapters.ConversionError, match="its own forward differs"):
        result.verify(sample())


@pytest.mark.parametrize("to", ["tracetorch", "snntorch"])
def test_a_step_that_computes_something_else(to):
    result = converted(to)
    layer = result.model[3]
    old = layer.forward
    layer.forward = lambda x: old(x * 1.001)
    agreement = result.verify(sample(), grad=False)
    assert wrong(agreement) == ["3"]
    assert not agreement.ok


def other_surrogate(model):
    model[1].surrogate_grad_fn = activation.SingleExponential()


def attached_reset(model):
    model[1].reset_fn.gradient = "attached"


def detached_output(model):
    old = model[1].forward
    model[1].forward = lambda x: old(x).detach() + 0 * x


def scaled_gradient(model):
    model[1].register_full_backward_hook(lambda module, inputs, outputs: tuple(g * 1.01 for g in inputs))


@pytest.mark.parametrize("change", [other_surrogate, attached_reset, detached_output, scaled_gradient])
def test_a_gradient_that_differs_though_nothing_said_so(change):
    result = converted("sinabs", learn_beta=True)
    change(result.model)
    agreement = result.verify(sample())
    assert wrong(agreement) == []
    assert "1" in wrong(agreement, "gradient"), str(agreement)
    assert agreement.rows[1].gradient == "differs"
    assert agreement.rows[1].gradient_error > 1e-3
    assert "measured" in agreement.rows[1].reason
    assert not agreement.ok
    assert result.verify(sample(), grad=False).ok, "forward, they agree"


def test_a_stateless_gradient_that_differs():
    result = converted("sinabs")
    result.model[2].register_full_backward_hook(lambda module, inputs, outputs: tuple(g * 1.01 for g in inputs))
    agreement = result.verify(sample())
    assert wrong(agreement, "gradient") == ["2"]
    assert not agreement.ok


def test_shared_weights_do_not_hide_a_semantic_change():
    result = adapters.convert(network(), to="sinabs", sample=sample(), time_dim=0, share_weights=True)
    with torch.no_grad():
        result.model[1].alpha_mem.mul_(1.5)
    agreement = result.verify(sample())
    assert agreement.ok, "the source has it too"
    replace_reset(result.model)
    agreement = result.verify(sample(), grad=False)
    assert wrong(agreement) == ["1"]
    assert not agreement.ok


def test_carry_back_does_not_hide_a_semantic_change():
    result = converted("sinabs")
    with torch.no_grad():
        result.model[0].weight.mul_(1.25)
        result.model[3].spike_threshold.mul_(0.5)
    assert result.verify(sample(), carry_back=True).ok
    replace_reset(result.model)
    agreement = result.verify(sample(), carry_back=True, grad=False)
    assert wrong(agreement) == ["1"]
    assert not agreement.ok


def test_a_beta_trained_to_zero_is_not_called_equal():
    """threshold / alpha has no value there. (A decay of 0 is refused in the conversion.)"""
    result = converted("sinabs", learn_beta=True)
    with torch.no_grad():
        result.model[1].alpha_mem.fill_(-0.1)
    agreement = result.verify(sample(), carry_back=True, grad=False)
    assert not agreement.ok
    assert wrong(agreement) == ["1"]


def test_a_wrong_target_of_a_sinabs_source():
    x = sample().transpose(0, 1)
    layer = sl.LIF(5.0, spike_threshold=torch.tensor(1.0), norm_input=False)
    for to, attribute in (("tracetorch", "mem_decay"), ("snntorch", "beta")):
        result = adapters.convert(nn.Sequential(linear(8, 12), layer), to=to, sample=x)
        assert result.agreement.ok
        with torch.no_grad():
            getattr(result.model[1], attribute).mul_(1.001)
        agreement = result.verify(x, grad=False)
        assert wrong(agreement) == ["1"]
        assert agreement.changed_parameters == ("1.tau_mem",)
        assert result.verify(x, carry_back=True).ok


def test_carry_back_touches_only_the_layer_that_changed():
    """sinabs 3.1.3: layers made with the default threshold share one tensor, with all layers of the process."""
    net = nn.Sequential(linear(8, 12), sl.LIF(5.0, norm_input=False), linear(12, 6), sl.LIF(5.0, norm_input=False))
    assert net[1].spike_threshold.data_ptr() == net[3].spike_threshold.data_ptr()
    x = sample().transpose(0, 1)
    result = adapters.convert(net, to="tracetorch", sample=x)
    with torch.no_grad():
        result.model[1].threshold.fill_(1.5)
    agreement = result.verify(x, carry_back=True)
    assert sl.LIF(5.0).spike_threshold == 1
    assert (net[1].spike_threshold, net[3].spike_threshold) == (1, 1)
    assert agreement.ok, str(agreement)


# ---- what proves nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ATTRIBUTES)
def test_a_silent_sample_is_said_to_prove_nothing(to):
    result = adapters.convert(network(), to=to, sample=torch.zeros(T, B, 8), time_dim=0)
    for row in result.report:
        if row.neuron:
            assert row.spikes == 0
            assert "no spike in the sample: it shows nothing of spikes and resets" in row.reason
    assert "no spike" in str(result.report)
    agreement = result.verify(sample())
    assert agreement.ok
    assert not any("no spike" in row.reason for row in agreement.rows)


def test_what_cannot_be_verified():
    result = converted("sinabs")
    for x, field in ((torch.zeros(0, B, 8), "sample"), (sample().int(), "sample"), (sample()[:, :0], "sample")):
        with pytest.raises(adapters.ConversionError) as caught:
            result.verify(x)
        assert caught.value.field == field


def test_the_report_is_json_ready_and_complete():
    import json

    result = converted("sinabs")
    data = json.loads(json.dumps(result.agreement.to_dict()))
    assert data["ok"] is True
    assert data["spike_slots"] == T * B * 18
    assert [row["name"] for row in data["layers"]] == ["0", "1", "2", "3"]
    assert {"forward", "gradient", "reason", "spikes", "unexplained_mismatches"} <= set(data["layers"][1])


@pytest.mark.parametrize(("steps", "judged"), [(20, 20), (54, 27), (400, 25)])
def test_gradients_that_overflow_in_the_source_are_no_difference(steps, judged):
    """A reset to zero that keeps its gradient: the gradient grows manyfold at each step near the threshold."""
    neuron = snn.Leaky(
        0.9, init_hidden=True, reset_mechanism="zero", reset_delay=False, spike_grad=surrogate.spike_rate_escape()
    )
    net = nn.Sequential(neuron)
    x = torch.full((steps, 1, 1), 0.95)
    result = adapters.convert(net, to="sinabs", sample=x, time_dim=0)
    row = result.agreement.rows[0]
    assert result.agreement.ok
    assert row.spikes >= 0.5 * steps
    plain = x.clone().requires_grad_()
    sum(net(step)[0] for step in plain).sum().backward()
    assert bool(plain.grad.isfinite().all()) == (steps < 54)
    named = f"overflows on this input: judged are those of the outputs of the first {judged} of {steps} steps"
    assert (named in row.reason) == (judged < steps)
    assert row.gradient in ("exact", "rounding")
    assert row.gradient_error < 1e-4
    result.model[0].surrogate_grad_fn = activation.SingleExponential()
    assert wrong(result.verify(x), "gradient") == ["0"]
