"""One parameter in several neuron layers stays one in the target, trains as one, or is named."""

import copy

import pytest
import snntorch
import torch
from torch import nn

import tracetorch as tt
from tracetorch.adapters.base import described, parameters
from tracetorch.adapters.registry import adapter
from tracetorch.functional import round_ste
from tracetorch.snn import DSRLITS, LIB, LITS, SLIEMA

N = 5


def native(kind, other=None):
    hard = {"quant_fn": round_ste()}
    first, second = (cls(N, **(hard if cls.parts.output.fires else {})) for cls in (kind, other or kind))
    name = "raw_pos_beta" if kind.parts.dual else "raw_beta"
    setattr(second, name, getattr(first, name))
    return nn.Sequential(first, nn.Linear(N, N), second), name


def samples():
    return 2 * torch.randn(25, 3, N, generator=torch.Generator().manual_seed(1))


def neurons(model, to):
    return [module for module in model.modules() if adapter(to).is_neuron(module)]


@pytest.mark.parametrize(
    ("to", "kind", "other", "shared"),
    [
        *(
            (to, kind, None, shared)
            for to in ("tracetorch", "sinabs", "snntorch")
            for kind in (LIB, LITS)
            for shared in (False, True)
        ),
        ("tracetorch", DSRLITS, None, False),
        ("sinabs", LIB, LITS, False),
        ("sinabs", SLIEMA, None, False),
        ("snntorch", SLIEMA, None, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_decay_of_two_layers_stays_one_and_trains_as_one(to, kind, other, shared):
    torch.manual_seed(0)
    (source, own), xs = native(kind, other), samples()
    before = copy.deepcopy(source)
    result = tt.convert(source, to=to, sample=xs, time_dim=0, share_weights=shared)
    name = next(n for n, a in adapter("tracetorch").attributes(source[0]).items() if a == own)
    one, two = (parameters(adapter(to), layer)[name] for layer in neurons(result.model, to))
    assert one is two
    assert not any("trains its own" in row.reason for row in result.report)
    count = sum(p.numel() for p in before.parameters())
    assert sum(p.numel() for p in result.model.parameters() if p.requires_grad) == count
    # The gradient is the sum over both places, as in the source.
    tt.reset_states(before)
    theirs = torch.stack([before(x) for x in xs])
    (mine,) = torch.autograd.grad(result.run(xs).square().sum(), one)
    (expected,) = torch.autograd.grad(theirs.square().sum(), getattr(before[0], own))
    if described(adapter(to), neurons(result.model, to)[0]).parameters[name].raw == "sigmoid":
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert mine.abs().sum() > 0


def test_what_is_kept_in_two_forms_is_named():
    """Of a membrane sinabs trains alpha, of spikes with a bias our layer the source's own raw number."""
    (source, _), xs = native(SLIEMA, LIB), samples()
    result = tt.convert(source, to="sinabs", sample=xs, time_dim=0)
    first, second = (parameters(adapter("sinabs"), layer)["mem_decay"] for layer in neurons(result.model, "sinabs"))
    assert first is not second
    assert (
        "one parameter with mem_decay of the layer '0' in the source; here each trains its own"
        in result.report[2].reason
    )
    assert "trains its own" not in result.report[0].reason


@pytest.mark.parametrize("to", ["tracetorch", "sinabs"])
def test_one_decay_of_two_layers_of_snntorch(to):
    first, second = (snntorch.Leaky(0.9, init_hidden=True, learn_beta=True) for _ in range(2))
    second.beta = first.beta
    source, xs = nn.Sequential(first, nn.Linear(N, N), second), samples()
    result = tt.convert(source, to=to, sample=xs, time_dim=0)
    one, two = (parameters(adapter(to), layer)["mem_decay"] for layer in neurons(result.model, to))
    assert one is two
    with torch.no_grad():
        one.sub_(0.05)
    assert result.verify(xs, carry_back=True).ok


def test_a_constant_of_two_layers_is_not_looked_at():
    """sinabs's default threshold is one tensor of all layers, which nobody trains."""
    (source, _), xs = native(LIB), samples()
    for layer in (source[0], source[2]):
        layer.raw_beta = nn.Parameter(layer.raw_beta.detach().clone())
        layer.raw_threshold.requires_grad_(False)
    source[2].raw_threshold = source[0].raw_threshold
    result = tt.convert(source, to="sinabs", sample=xs, time_dim=0)
    assert not any("trains its own" in row.reason for row in result.report)
