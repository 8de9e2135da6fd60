"""What the judge must reject: every fault of a neuron, every single wrong number, another neuron's recording."""

import numpy as np
import pytest
import sinabs.activation as sa
import sinabs.layers as sl
import snntorch
import torch

from tests import naive
from tests.faulty_neurons import F32, drawn, judged, leaky32, leaky_spec, lif32, lif_spec, noise
from tracetorch import oracle

# ---- faults that must be seen ----------------------------------------------------------------------------------------

LEAKY_FAULTS = [
    "state not carried",
    "input gain",
    "reset undecayed",
    "input decays too",
    "no reset",
    "reset a step late",
]


@pytest.mark.parametrize("fault", ["", "another association", *LEAKY_FAULTS])
def test_faults_of_a_leaky(fault):
    xs, beta, theta = noise(1, 60, 4, 7), drawn(2, 7, low=0.5, high=0.99), drawn(3, 7, low=0.5, high=1.5)
    spikes, states = leaky32(xs, beta, theta, fault)
    verdict = judged(leaky_spec(beta, theta), xs, spikes, states)
    assert spikes.sum() > 40
    assert verdict.spikes == spikes.sum()
    assert verdict.slots == xs.size
    assert verdict.ok == (fault not in LEAKY_FAULTS), verdict
    if not verdict.ok:
        assert verdict.state_violations > 50, "seen as often as it happens, not once"
        time, index = verdict.first
        assert time > 0 or fault in ("input decays too", "input gain"), "the first step of these is right"
        assert len(index) == 2


LIF_CASES = {
    "state not carried": {},
    "input gain dropped": {},
    "input decays too": {},
    "round for trunc": {},
    "one spike only": {},
    "reset once": {},
    "reset of theta over alpha": {},
    "reset of theta": {"reset": ("over_alpha", None)},
    "limit ignored": {"limit": 2},
    "clamp before reset": {"min_v_mem": -0.3, "reset": ("subtract", 2.0)},
    "no clamp": {"min_v_mem": -0.3},
    "decay then add": {"syn": 0.6},
    "reset value where it fired only": {"reset": ("reset", 0.25)},
}


@pytest.mark.parametrize("faulty", [True, False])
@pytest.mark.parametrize("fault", sorted(LIF_CASES))
def test_faults_of_a_lif(fault, faulty):
    options = LIF_CASES[fault]
    xs = noise(4, 60, 4, 7, mean=1.5, deviation=5.0)
    alpha, theta = drawn(5, 7, low=0.5, high=0.95), drawn(6, 7, low=0.4, high=1.2)
    outputs, states = lif32(xs, alpha, theta, fault if faulty else "", **options)
    kept = {name: value for name, value in options.items() if name != "limit"}
    spikes = ("limited", options["limit"]) if "limit" in options else ("multiple", None)
    # exp_tau: a decay that is itself rounded, so that no step counts as free of rounding.
    kept |= {"syn": -1 / np.log(kept["syn"])} if "syn" in kept else {}
    spec = lif_spec(-1 / np.log(alpha.astype(np.float64)), theta, spikes=spikes, raw="exp_tau", **kept)
    verdict = judged(spec, xs, outputs, states)
    assert (outputs > 0).sum() > 100
    if fault != "one spike only" or not faulty:
        assert outputs.max() > 1
    if "min_v_mem" in options and not faulty:
        assert (states["v_mem"] == F32(-0.3)).sum() > 20
    assert verdict.ok != faulty, verdict
    if faulty:
        assert verdict.state_violations + verdict.unexplained > 20
    if fault in ("round for trunc", "one spike only", "limit ignored") and faulty:
        assert verdict.unexplained > 20


# ---- single blows ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clean():
    """A right recording: spec, xs, spikes, membranes."""
    xs, beta, theta = noise(7, 40, 3, 7), drawn(8, 7, low=0.5, high=0.95), drawn(9, 7, low=0.6, high=1.4)
    spikes, states = leaky32(xs, beta, theta)
    spec = leaky_spec(beta, theta)
    assert judged(spec, xs, spikes, states).ok
    return spec, xs, spikes, states["v_mem"]


def test_a_wrong_spike_anywhere(clean):
    """Every single spike that is missing, extra, doubled, halved, negative or NaN, one at a time."""
    spec, xs, spikes, mems = clean
    generator = np.random.default_rng(0)
    for _ in range(60):
        index = tuple(int(generator.integers(size)) for size in xs.shape)
        for wrong in (1 - spikes[index], 2.0, 0.5, -1.0, np.nan, np.inf):
            changed = spikes.copy()
            changed[index] = wrong
            with np.errstate(all="ignore"):
                verdict = judged(spec, xs, changed, {"v_mem": mems})
            assert verdict.unexplained >= 1, (index, wrong)
            assert not verdict.ok
            time, place = verdict.first
            assert (time, *place) <= (index[0] + 1, *index[1:])


def test_a_wrong_state_anywhere(clean):
    spec, xs, spikes, mems = clean
    generator = np.random.default_rng(1)
    for _ in range(60):
        index = tuple(int(generator.integers(size)) for size in xs.shape)
        for wrong in (mems[index] + F32(1e-4), -mems[index], 0.0, np.nan, np.inf, -np.inf):
            changed = mems.copy()
            changed[index] = wrong
            with np.errstate(all="ignore"):
                verdict = judged(spec, xs, spikes, {"v_mem": changed})
            assert verdict.state_violations >= 1, (index, wrong)
            assert verdict.first == (index[0], index[1:])


def test_a_spike_shifted_by_one_step(clean):
    spec, xs, spikes, mems = clean
    places = np.argwhere((spikes[:-1] == 1) & (spikes[1:] == 0))
    assert len(places) > 50
    for time, *place in places[:: len(places) // 30]:
        changed = spikes.copy()
        changed[(time, *place)], changed[(time + 1, *place)] = 0, 1
        assert judged(spec, xs, changed, {"v_mem": mems}).unexplained >= 1
    assert judged(spec, xs, np.roll(spikes, 1, 0), {"v_mem": mems}).unexplained > 100


@pytest.mark.parametrize("kind", ["spikes", "states", "both"])
@pytest.mark.parametrize("place", [np.s_[:, :, -1], np.s_[:, -1], np.s_[-1], np.s_[-1, -1, -1]])
def test_the_last_element_skipped(clean, kind, place):
    """A kernel that leaves out its last neuron, row or step, its memory zero or NaN."""
    spec, xs, spikes, mems = clean
    fired = np.argwhere(spikes[-1] == 1)[0]
    move = tuple(-1 - fired)  # so that the last element of the last step has fired
    xs, spikes, mems = (np.roll(array, move, (1, 2)) for array in (xs, spikes, mems))
    spec = spec.replace(
        parameters={
            name: p if p.value.ndim == 0 else naive.parameter(np.roll(p.value, move[1]), F32, raw=p.raw)
            for name, p in spec.parameters.items()
        }
    )
    assert judged(spec, xs, spikes, {"v_mem": mems}).ok
    assert spikes[-1, -1, -1] == 1
    for poison in (0.0, np.nan):
        s, v = spikes.copy(), mems.copy()
        if kind != "states":
            s[place] = poison
        if kind != "spikes":
            v[place] = poison
        assert not judged(spec, xs, s, {"v_mem": v}).ok


def test_a_wrong_spec(clean):
    """The right recording against another neuron."""
    spec, xs, spikes, mems = clean
    for name, parameter in spec.parameters.items():
        other = naive.parameter(parameter.value * F32(1.001), F32, raw=parameter.raw)
        wrong = spec.replace(parameters={**spec.parameters, name: other})
        verdict = judged(wrong, xs, spikes, {"v_mem": mems}, own=spec)
        assert not verdict.ok, name


OTHERS = {
    "reset to zero": lambda beta, theta: leaky_spec(beta, theta, reset="zero"),
    "no reset": lambda beta, theta: leaky_spec(beta, theta, reset="none"),
    "theta, not theta / beta": lambda beta, theta: lif_spec(beta, theta, spikes=("strict", None), norm_input=False),
    "reset value in the same step": lambda beta, theta: lif_spec(
        beta, theta, spikes=("strict", None), reset=("value", 0.0), norm_input=False
    ),
    "a reset amount": lambda beta, theta: lif_spec(
        beta, theta, spikes=("strict", None), reset=("subtract", 0.8), norm_input=False
    ),
    "reset in the residual": lambda beta, theta: leaky_spec(beta, theta, delay=False),
    "several spikes": lambda beta, theta: lif_spec(
        beta, theta, spikes=("multiple", None), reset=("over_alpha", None), norm_input=False
    ),
    "normalised input": lambda beta, theta: lif_spec(
        beta, theta, spikes=("strict", None), reset=("over_alpha", None), norm_input=True
    ),
    "a clamp": lambda beta, theta: lif_spec(
        beta, theta, spikes=("strict", None), reset=("over_alpha", None), norm_input=False, min_v_mem=-0.1
    ),
}


@pytest.mark.parametrize("other", sorted(OTHERS))
def test_another_neuron(clean, other):
    """snnTorch's right recording is not a recording of these; the recording says truly how it stores its membrane.

    "theta, not theta / beta" is the usual trap: sinabs's MembraneSubtract() mapped naively to snnTorch.
    """
    spec, xs, spikes, mems = clean
    beta, theta = (spec.parameters[name].value for name in ("mem_decay", "threshold"))
    assert not judged(OTHERS[other](beta, theta), xs, spikes, {"v_mem": mems}, own=spec).ok


def test_the_same_neuron_in_another_convention(clean):
    spec, xs, spikes, mems = clean
    beta, theta = (spec.parameters[name].value for name in ("mem_decay", "threshold"))
    right = lif_spec(beta, theta, spikes=("strict", None), reset=("over_alpha", None), norm_input=False)
    assert judged(right, xs, spikes, {"v_mem": mems}, own=spec).ok


@pytest.mark.parametrize("delay", [True, False])
def test_a_real_snntorch_is_no_sinabs(delay):
    """Free-running, the two part in thousands of spikes (the usual trap); the verdict must say so."""
    xs = noise(15, 200, 4, 100, mean=0.12, deviation=0.5)
    layer = snntorch.Leaky(beta=0.9, reset_delay=delay)
    outputs, mems = zip(*(layer(x) for x in torch.tensor(xs)), strict=True)
    outputs, mems = torch.stack(outputs).numpy(), torch.stack(mems).numpy()
    stock = sl.LIF(tau_mem=-1 / np.log(0.9), spike_fn=sa.SingleSpike, norm_input=False)
    with torch.no_grad():
        others = stock(torch.tensor(xs).transpose(0, 1)).transpose(0, 1).numpy()
    assert (others != outputs).sum() > 100
    source = lif_spec(-1 / np.log(0.9), 1.0, spikes=("single", None), norm_input=False, raw="exp_tau")
    verdict = judged(source, xs, outputs, {"v_mem": mems}, own=leaky_spec(0.9, 1.0, delay=delay))
    assert not verdict.ok, verdict


def test_other_states_are_refused(clean):
    spec, xs, spikes, mems = clean
    other = lif_spec(0.9, 1.0, syn=0.5)
    with pytest.raises(oracle.OracleError, match="i_syn"):
        judged(other, xs, spikes, {"v_mem": mems}, own=spec)


def test_a_synaptic_current_is_judged_too():
    xs = noise(10, 40, 3, 7, mean=1.0, deviation=4.0)
    outputs, states = lif32(xs, 0.8, 1.0, syn=0.6)
    spec = lif_spec(-1 / np.log(0.8), 1.0, syn=-1 / np.log(0.6), raw="exp_tau")
    assert judged(spec, xs, outputs, states).ok
    for index in ((0, 0, 0), (20, 1, 3), (39, 2, 6)):
        changed = states["i_syn"].copy()
        changed[index] *= F32(1 + 1e-5)
        verdict = judged(spec, xs, outputs, {**states, "i_syn": changed})
        assert verdict.first == (index[0], index[1:])
    shifted = {**states, "i_syn": np.roll(states["i_syn"], 1, 0)}
    assert judged(spec, xs, outputs, shifted).state_violations > 100


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["x", "spikes", "states"])
def test_a_poisoned_recording_gets_a_verdict_and_no_warning(clean, kind, poison):
    spec, xs, spikes, mems = clean
    arrays = {"x": xs.copy(), "spikes": spikes.copy(), "states": mems.copy()}
    arrays[kind][20, 1, 3] = poison
    assert not judged(spec, arrays["x"], arrays["spikes"], {"v_mem": arrays["states"]}).ok


def test_an_infinite_state_does_not_excuse_a_finite_one():
    """NaN and infinity must agree in place and kind, and so must what is not."""
    xs = noise(11, 5, 1, 3)
    xs[2, 0, 1] = np.inf
    with np.errstate(invalid="ignore"):
        spikes, states = leaky32(xs, 0.9, 1.0)
    spec = leaky_spec(0.9, 1.0)
    mems = states["v_mem"]
    assert np.isinf(mems[2, 0, 1])
    changed = mems.copy()
    for wrong in (3.0, -np.inf, np.nan):
        changed[2, 0, 1] = wrong
        with np.errstate(all="ignore"):
            assert judged(spec, xs, spikes, {"v_mem": changed}).first == (2, (0, 1)), wrong


@pytest.mark.parametrize("state", ["v_mem", "i_syn"])
def test_an_infinite_bound_allows_nothing(state):
    """Where the truth is infinite, so is the size of its rounding; a finite state is wrong there all the same."""
    xs = noise(16, 5, 1, 3)
    xs[2, 0, 1] = np.inf
    with np.errstate(all="ignore"):
        outputs, states = lif32(xs, 0.8, 1.0, syn=0.6, limit=1)
    tau = -1 / np.log(np.array([0.8, 0.6]))
    spec = lif_spec(tau[0], 1.0, spikes=("single", None), syn=tau[1], raw="exp_tau")
    changed = {name: array.copy() for name, array in states.items()}
    assert np.isinf(states[state][2, 0, 1])
    changed[state][2, 0, 1] = 3.0
    with np.errstate(all="ignore"):
        assert judged(spec, xs, outputs, changed).first == (2, (0, 1))
