"""`adapters.convert` leaves the user's network alone; what is shared is shared only if asked for."""

import random

import numpy as np
import pytest
import snntorch as snn
import torch
from torch import nn

from tests.adapter_checks import bits
from tests.converting import B, T, linear, own_run, sample, sinabs_net, snn_net
from tracetorch import adapters

# ---- what is left alone ----------------------------------------------------------------------------------------------


def everything(net):
    """All that a user could notice: tensors by identity and bits, gradients, hidden states, flags, generators."""
    rows = {}
    for path, module in net.named_modules():
        rows[path] = (module.training, sorted(vars(module)), sorted(module._buffers), sorted(module._parameters))
        stores = [module._parameters, module._buffers, {k: v for k, v in vars(module).items() if torch.is_tensor(v)}]
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    grad = None if not tensor.is_leaf or tensor.grad is None else (id(tensor.grad), bits(tensor.grad))
                    rows[path, name] = (id(tensor), bits(tensor), tensor.requires_grad, id(tensor.grad_fn), grad)
    rows["random"] = (bits(torch.get_rng_state()), str(np.random.get_state()), random.getstate())
    return rows


def used(net, x):
    """A network in the middle of its user's work: gradients there, hidden states hanging on a graph."""
    net.train()
    net[0].eval()
    for _ in range(2):  # the second goes on from the first, and its graph hangs on the first's
        outputs = torch.stack([net(step) for step in x]) if isinstance(net[1], snn.Leaky) else net(x)
        outputs.square().sum().backward(retain_graph=True)
    states = [layer.mem if isinstance(layer, snn.Leaky) else layer.v_mem for layer in (net[1], net[3])]
    assert all(state.grad_fn is not None for state in states)
    assert net[0].weight.grad.abs().max() > 0
    return net


SOURCES = {
    "snntorch": (lambda: snn_net(learn_beta=True), {"time_dim": 0}, (T, B, 8)),
    "sinabs": (lambda: sinabs_net(norm_input=False), {}, (B, T, 8)),
    "sinabs, recording": (lambda: sinabs_net(record_states=True, tau_syn=3.0), {}, (B, T, 8)),
}


@pytest.mark.parametrize("to", ["tracetorch", "sinabs", "snntorch"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_users_network_is_left_as_it_was(source, to):
    make, options, shape = SOURCES[source]
    net, x = make(), sample(*shape)
    used(net, x)
    before = everything(net)
    result = adapters.convert(net, to=to, sample=x, **options)
    assert everything(net) == before
    result.run(x)
    assert everything(net) == before
    state = result.model[1].save_states() if to == "tracetorch" else None
    result.verify(x)
    assert everything(net) == before
    if state is not None:
        assert {k: v is state[k] for k, v in result.model[1].save_states().items()} == dict.fromkeys(state, True)
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.mul_(1.01)
    result.verify(x, carry_back=True)
    assert everything(net) == before


def test_nothing_is_left_behind_when_it_is_refused_or_fails():
    net, x = used(snn_net(reset_delay=False), sample()), sample()
    before = everything(net)
    with pytest.raises(adapters.ConversionError, match="reset_timing='same_step_residual'"):
        adapters.convert(net, to="sinabs", sample=x, time_dim=0)
    assert everything(net) == before
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        adapters.convert(net, to="tracetorch", sample=sample(T, B, 9), time_dim=0)
    assert everything(net) == before


def test_the_target_shares_nothing_unless_asked_to():
    for net, x, options in ((snn_net(), sample(), {"time_dim": 0}), (sinabs_net(), sample(B, T, 8), {})):
        theirs = {t.data_ptr() for t in [*net.parameters(), *net.buffers()] if t.numel()}
        for to in ("tracetorch", "sinabs", "snntorch"):
            model = adapters.convert(net, to=to, sample=x, **options).model
            assert not theirs & {t.data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}


# ---- shared weights --------------------------------------------------------------------------------------------------

SHARED = {
    "tracetorch": ("mem_decay", "threshold"),
    "sinabs": ("alpha_mem", "spike_threshold"),
    "snntorch": ("beta", "threshold"),
}


@pytest.mark.parametrize("to", SHARED)
@pytest.mark.parametrize("learn", [True, False])
def test_shared_weights_are_the_same_tensors_and_train_together(to, learn):
    net, xs = snn_net(learn_beta=learn, learn_threshold=learn), sample()
    result = adapters.convert(net, to=to, sample=xs, time_dim=0, share_weights=True)
    model = result.model
    assert model[0].weight is net[0].weight
    assert model[2].bias is net[2].bias
    for k in (1, 3):
        for name, own in zip(("beta", "threshold"), SHARED[to], strict=True):
            assert getattr(model[k], own).data_ptr() == getattr(net[k], name).data_ptr()
            assert getattr(model[k], own).requires_grad == learn
            if learn:
                assert getattr(model[k], own) is getattr(net[k], name)
    before = result.run(xs)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (own_run(net, xs).mean(0) - 1).square().sum().backward()
        optimizer.step()
    after = result.run(xs)
    assert (after != before).any(), "training the source trains the target"
    assert (after != own_run(net, xs)).sum() <= 1
    agreement = result.verify(xs)
    assert agreement.ok
    assert agreement.changed_parameters == ()


@pytest.mark.parametrize("to", SHARED)
def test_integer_thresholds_can_be_shared(to):
    net, xs = snn_net(threshold=1, graded_spikes_factor=1), sample()
    assert net[1].threshold.dtype == torch.int64
    result = adapters.convert(net, to=to, sample=xs, time_dim=0, share_weights=True)
    assert torch.equal(result.run(xs), own_run(net, xs))
    assert result.model[0].weight is net[0].weight


def test_another_raw_form_cannot_be_shared():
    with pytest.raises(adapters.ConversionError) as caught:
        adapters.convert(sinabs_net(), to="snntorch", sample=sample(B, T, 8), share_weights=True)
    assert (caught.value.layer, caught.value.field, caught.value.value) == ("'1'", "tau_mem", "exp_tau")
    assert caught.value.remedy == "share_weights=False"


def test_a_module_used_twice_stays_shared():
    shared = linear(8, 8)
    parts = [shared, snn.Leaky(0.9, init_hidden=True), nn.Sequential(shared), snn.Leaky(0.8, init_hidden=True)]
    net, xs = nn.Sequential(*parts), sample()
    spikes = own_run(net, xs)
    for to in ("tracetorch", "sinabs", "snntorch"):
        result = adapters.convert(net, to=to, sample=xs, time_dim=0)
        assert result.agreement.ok
        assert torch.equal(result.run(xs), spikes)
        assert result.model[0].weight is result.model[2][0].weight


@pytest.mark.parametrize("nested", [False, True])
def test_a_stateless_module_used_twice_stands_in_both_places(nested):
    """`named_children` names a module once, where it stands first."""
    relu = nn.ReLU()
    place = nn.Sequential(relu) if nested else relu
    net = nn.Sequential(relu, linear(8, 12), place, snn.Leaky(0.9, init_hidden=True))
    with torch.no_grad():
        net[1].weight.abs_()
        net[1].bias.abs_()
    xs = sample()  # positive, so that on this sample the second one changes nothing
    result = adapters.convert(net, to="tracetorch", sample=xs, time_dim=0)
    assert [row.source for row in result.report] == ["torch.ReLU", "torch.Linear", "torch.ReLU", "snntorch.Leaky"]
    with torch.no_grad():
        for network in (net, result.model):
            network[1].bias.fill_(-1.0)
    assert torch.equal(result.run(xs), own_run(net, xs))
