"""The checkers are tested: what they must reject, what they must accept, how wide their bound is."""

import numpy as np
import pytest
import sinabs.activation as sa
import sinabs.layers as sl
import snntorch
import torch

import tracetorch as tt
from tests import naive
from tracetorch import oracle
from tracetorch.functional.surrogates import Surrogate

F32 = np.float32


def drawn(seed, *shape, low=0.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(F32)


def noise(seed, *shape, mean=0.2, deviation=1.0):
    return np.random.default_rng(seed).normal(mean, deviation, shape).astype(F32)


# ---- subjects in float32, with faults --------------------------------------------------------------------------------


def leaky32(xs, beta, theta, fault="", reset="subtract"):
    """snnTorch's Leaky with reset_delay=True in NumPy float32; returns (spikes, {"v_mem": mem})."""
    beta, theta = F32(beta), F32(theta)
    mem, spikes, mems = np.zeros_like(xs[0]), [], []
    fires = np.greater_equal if fault == ">= for >" else np.greater
    earlier = np.zeros_like(xs[0])
    for x in xs:
        r = fires(mem, theta).astype(F32)
        if fault == "reset a step late":
            r, earlier = earlier, r
        if fault == "state not carried":
            mem, r = np.zeros_like(mem), np.zeros_like(mem)
        if fault == "input gain":
            x = (F32(1) - beta) * x
        if reset == "zero":
            mem = beta * ((F32(1) - r) * mem) + x
        elif fault == "reset undecayed":
            mem = beta * (mem - r * theta) + x
        elif fault == "another association":
            mem = (x - r * theta) + mem * beta
        elif fault == "input decays too":
            mem = (beta * (mem + x)) - r * theta
        elif fault == "no reset":
            mem = beta * mem + x
        else:
            mem = (beta * mem + x) - r * theta
        spikes.append(fires(mem, theta).astype(F32))
        mems.append(mem)
    return np.stack(spikes), {"v_mem": np.stack(mems)}


def lif32(xs, alpha, theta, fault="", limit=None, reset=("subtract", None), norm_input=True, syn=None, min_v_mem=None):
    """sinabs's LIF in NumPy float32; `limit` None for MultiSpike; returns (spikes, states)."""
    alpha, theta = F32(alpha), F32(theta)
    v, i, outputs, vs, currents = np.zeros_like(xs[0]), np.zeros_like(xs[0]), [], [], []
    for x in xs:
        if fault == "state not carried":
            v, i = np.zeros_like(v), np.zeros_like(v)
        i = x if syn is None else i * F32(syn) + x if fault == "decay then add" else F32(syn) * (i + x)
        drive = (F32(1) - alpha) * i if norm_input and fault != "input gain dropped" else i
        v = alpha * (v + drive) if fault == "input decays too" else alpha * v + drive
        if fault == "round for trunc":
            s = np.where(v > 0, np.round(v / theta), F32(0))
        else:
            s = np.where(v > 0, np.trunc(v / theta), F32(0))
        s = np.minimum(s, F32(limit)) if limit and fault != "limit ignored" else s
        s = np.minimum(s, F32(1)) if fault == "one spike only" else s
        if fault == "clamp before reset" and min_v_mem is not None:
            v = np.maximum(v, F32(min_v_mem))
        if reset[0] == "subtract":
            amount = theta if reset[1] is None else F32(reset[1])
            amount = theta / alpha if fault == "reset of theta over alpha" else amount
            v = v - (np.minimum(s, F32(1)) if fault == "reset once" else s) * amount
        elif reset[0] == "over_alpha":
            v = v - s * (theta if fault == "reset of theta" else theta / alpha)
        else:
            r = F32(reset[1])
            v = np.where(s > 0, r, v) if fault == "reset value where it fired only" else v * (s == 0) + r
        if min_v_mem is not None and fault not in ("clamp before reset", "no clamp"):
            v = np.maximum(v - F32(min_v_mem), F32(0)) + F32(min_v_mem)
        outputs.append(s.astype(F32))
        vs.append(v.astype(F32))
        currents.append(i)
    states = {"v_mem": np.stack(vs)} | ({} if syn is None else {"i_syn": np.stack(currents)})
    return np.stack(outputs), states


def judged(spec, xs, outputs, states, own=None):
    return oracle.judge(spec, oracle.Recording(xs, outputs, states, own or spec))


def leaky_spec(beta, theta, **options):
    return naive.leaky_spec(beta, theta, dtype=F32, **options)


def lif_spec(alpha, theta, **options):
    return naive.lif_spec(alpha, theta, dtype=F32, **options)


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

    "theta, not theta / beta" is trap (a) of SEMANTICS.md: sinabs's MembraneSubtract() mapped naively to snnTorch.
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
    """Free-running, the two part in thousands of spikes (SEMANTICS.md, trap (a)); the verdict must say so."""
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


# ---- exact ties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_tie_on_a_binary_grid_is_decided_as_the_spec_says(reset, strict):
    """x in steps of 1/8, beta 1/2, 16 steps: float32 is exact, the bound is 0, and a tie has one answer."""
    xs = (np.random.default_rng(12).integers(0, 9, (16, 20, 50)) / 8).astype(F32)
    spikes, states = leaky32(xs, 0.5, 1.0, "" if strict else ">= for >", reset)
    ties = states["v_mem"] == 1.0
    assert ties.sum() > 50
    right = leaky_spec(0.5, 1.0, reset=reset, comparison=">" if strict else ">=")
    wrong = leaky_spec(0.5, 1.0, reset=reset, comparison=">=" if strict else ">")
    verdict = judged(right, xs, spikes, states)
    assert verdict.ok
    assert (verdict.mismatches, verdict.max_state_error) == (0, 0.0)
    verdict = judged(wrong, xs, spikes, states)
    assert verdict.mismatches == ties.sum(), "each tie, and nothing else"
    assert verdict.unexplained == ties.sum(), "no rounding is there to explain it"
    assert verdict.explained == 0


def test_a_multiple_tie_on_a_binary_grid():
    xs = (np.random.default_rng(13).integers(0, 33, (14, 20, 50)) / 8).astype(F32)
    outputs, states = lif32(xs, 0.5, 1.0, norm_input=False)
    spec = lif_spec(0.5, 1.0, norm_input=False)
    verdict = judged(spec, xs, outputs, states)
    assert verdict.ok
    assert verdict.mismatches == 0
    before = np.concatenate([np.zeros((1, 20, 50), F32), states["v_mem"][:-1]]) * F32(0.5) + xs
    ties = (before == np.trunc(before)) & (before >= 2)
    assert ties.sum() > 50
    fewer = outputs - ties
    changed = states["v_mem"] + ties
    verdict = judged(spec, xs, fewer, {"v_mem": changed.astype(F32)})
    assert verdict.unexplained >= ties.sum()


def test_near_ties_are_explained_and_only_those():
    """Decimal inputs: the real numbers tie, float32 decides by its roundings, and another association otherwise."""
    xs = (np.random.default_rng(14).integers(0, 1500, (3, 200_000)) / F32(1000)).astype(F32)
    beta, theta = 0.9, 1.0
    spec = leaky_spec(beta, theta)
    explained = 0
    for order in ("", "another association"):
        spikes, states = leaky32(xs, beta, theta, order)
        verdict = judged(spec, xs, spikes, states)
        assert verdict.ok, verdict
        explained += verdict.explained
    assert 0 < explained < 0.01 * xs.size
    # 1e-4 off the threshold is no tie: a subject with another threshold is found out.
    spikes, states = leaky32(xs, beta, theta + 1e-4)
    assert judged(spec, xs, spikes, states).unexplained + judged(spec, xs, spikes, states).state_violations > 100


# ---- the bound -------------------------------------------------------------------------------------------------------


def last_step(seed, count=20_000):
    """A right recording of 6 steps, and by the equations the size of what was added up in its last step."""
    xs = noise(seed, 6, count, mean=0.3)
    beta, theta = drawn(seed + 1, count, low=0.3, high=0.99), drawn(seed + 2, count, low=0.5, high=1.5)
    spikes, states = leaky32(xs, beta, theta)
    mem = states["v_mem"].astype(np.float64)
    magnitude = np.abs(beta * mem[-2]) + np.abs(xs[-1]) + spikes[-2] * theta
    return leaky_spec(beta, theta), xs, spikes, states["v_mem"], magnitude


def violations_of(spec, xs, spikes, mems, error):
    """How many of the neurons are flagged if the last state of every one is off by `error`."""
    changed = mems.copy()
    changed[-1] = (mems[-1].astype(np.float64) + error).astype(F32)
    return judged(spec, xs, spikes, {"v_mem": changed}).state_violations


def test_the_bound_is_a_few_roundings_wide():
    """Measured in roundoffs (2^-24) of the sum of magnitudes: what real arithmetic takes, what the bound lets pass."""
    spec, xs, spikes, mems, magnitude = last_step(20)
    unit = magnitude * 2.0**-24
    _, trace, _ = oracle.trajectory(spec, oracle.Recording(xs, spikes, {"v_mem": mems}, spec))
    actual = (np.abs(mems[-1].astype(np.float64) - trace.step.w[-1]) / unit).max()
    assert 0.5 < actual < 4, "what a right float32 step is off by"
    count = mems[-1].size
    assert violations_of(spec, xs, spikes, mems, 0.0) == 0
    assert violations_of(spec, xs, spikes, mems, 2 * unit) == 0, "4 roundings more are within 8"
    assert violations_of(spec, xs, spikes, mems, 32 * unit) == count, "and 32 are outside for every neuron"
    widths = [w for w in range(1, 33) if violations_of(spec, xs, spikes, mems, w * unit) < count / 2]
    assert 4 <= len(widths) <= 20, f"half of the neurons pass an error of {len(widths)} roundoffs"
    assert len(widths) / actual < 20


@pytest.mark.parametrize("sign", [1, -1])
def test_a_relative_error_of_1e_5_is_seen(sign):
    """Wherever the state is not itself what is left of larger numbers."""
    spec, xs, spikes, mems, magnitude = last_step(23)
    plain = np.abs(mems[-1]) > magnitude / 3
    assert plain.sum() > 5000
    error = np.where(plain, sign * 1e-5 * mems[-1].astype(np.float64), 0.0)
    assert violations_of(spec, xs, spikes, mems, error) == plain.sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_relative_error_of_1e_5_of_a_clamped_multispiking_lif_is_seen(sign):
    xs = noise(26, 6, 20_000, mean=1.0, deviation=3.0)
    tau, theta = drawn(27, 20_000, low=2.0, high=20.0), drawn(28, 20_000, low=0.3, high=1.0)
    alpha = np.exp(-1 / tau.astype(np.float64)).astype(F32)
    outputs, states = lif32(xs, alpha, theta, min_v_mem=-0.5, syn=alpha)
    spec = lif_spec(tau, theta, raw="exp_tau", min_v_mem=-0.5, syn=tau)
    assert judged(spec, xs, outputs, states).ok
    v = states["v_mem"].astype(np.float64)
    plain = (np.abs(v[-1]) > 0.25) & (outputs[-1] <= 1)
    assert plain.sum() > 3000
    changed = states["v_mem"].copy()
    changed[-1] = np.where(plain, v[-1] * (1 + sign * 1e-5), v[-1])
    found = judged(spec, xs, outputs, {**states, "v_mem": changed}).state_violations
    assert found >= 0.8 * plain.sum()


# ---- what must be accepted -------------------------------------------------------------------------------------------

STEPS, BATCH, NEURONS = 200, 4, 600


def snntorch_recording(reset, delay, seed):
    beta = torch.tensor(drawn(seed, NEURONS, low=-0.05, high=1.05))
    layer = snntorch.Leaky(
        beta=beta,
        threshold=torch.tensor(drawn(seed + 1, NEURONS, low=0.3, high=1.5)),
        graded_spikes_factor=torch.tensor(drawn(seed + 2, NEURONS, low=0.1, high=2.0)),
        reset_mechanism=reset,
        reset_delay=delay,
    )
    xs = noise(seed + 3, STEPS, BATCH, NEURONS)
    outputs, mems = [], []
    for x in torch.tensor(xs):
        spikes, mem = layer(x)
        outputs.append(spikes.numpy())
        mems.append(mem.numpy())
    spec = leaky_spec(
        beta.numpy(), layer.threshold.numpy(), g=layer.graded_spikes_factor.numpy(), reset=reset, delay=delay
    )
    return spec, oracle.Recording(xs, np.stack(outputs), {"v_mem": np.stack(mems)}, spec)


SPIKE_FNS = {"single": sa.SingleSpike, "multiple": sa.MultiSpike, "limited": sa.MaxSpike(2)}


def sinabs_recording(spikes, reset, norm_input, syn, min_v_mem, alphas, seed):
    tau = torch.tensor(drawn(seed, NEURONS, low=1.0, high=30.0))
    slow = torch.tensor(drawn(seed + 1, NEURONS, low=1.0, high=10.0)) if syn else None
    theta = torch.tensor(drawn(seed + 2, NEURONS, low=0.3, high=1.5))
    amount = torch.tensor(drawn(seed + 3, NEURONS, low=0.3, high=2.0)) if reset == "subtract a value" else None
    layer = sl.LIF(
        tau_mem=tau,
        tau_syn=slow,
        spike_threshold=theta,
        spike_fn=SPIKE_FNS[spikes],
        reset_fn=sa.MembraneReset(0.2) if reset == "reset" else sa.MembraneSubtract(amount),
        min_v_mem=min_v_mem,
        train_alphas=alphas,
        norm_input=norm_input,
        record_states=True,
    )
    xs = noise(seed + 4, STEPS, BATCH, NEURONS, mean=0.5 if norm_input else 0.1, deviation=4.0 if norm_input else 1.0)
    with torch.no_grad():
        outputs = layer(torch.tensor(xs).transpose(0, 1)).transpose(0, 1).contiguous().numpy()
    states = {name: state.transpose(0, 1).contiguous().numpy() for name, state in layer.recordings.items()}
    spec = lif_spec(
        layer.alpha_mem.detach().numpy() if alphas else tau.numpy(),
        theta.numpy(),
        spikes=(spikes, 2 if spikes == "limited" else None),
        reset=("reset", 0.2) if reset == "reset" else ("subtract", None if amount is None else amount.numpy()),
        norm_input=norm_input,
        syn=None if slow is None else layer.alpha_syn.detach().numpy() if alphas else slow.numpy(),
        min_v_mem=min_v_mem,
        raw="value" if alphas else "exp_tau",
    )
    return spec, oracle.Recording(xs, outputs, states, spec)


SNNTORCH = [(reset, delay) for reset in ("subtract", "zero", "none") for delay in (True, False)]
# spikes, reset, norm_input, synapse, clamp, train_alphas
SINABS = [
    ("single", "subtract", True, False, None, False),
    ("multiple", "subtract", True, False, -1.0, False),
    ("multiple", "subtract a value", False, True, None, False),
    ("limited", "subtract", False, False, -0.3, False),
    ("multiple", "reset", True, True, -0.5, False),
    ("single", "subtract a value", False, False, None, True),
    ("multiple", "subtract", True, True, None, True),
    ("limited", "reset", False, False, None, True),
    ("multiple", "subtract", False, False, -1.0, True),
    ("single", "subtract", True, False, -0.1, True),
]


def test_enough_is_judged():
    assert (len(SNNTORCH) + len(SINABS)) * STEPS * BATCH * NEURONS >= 5_000_000


@pytest.mark.parametrize("case", SNNTORCH, ids=lambda case: f"{case[0]}, delay {case[1]}")
def test_the_real_snntorch_is_accepted(case):
    spec, recording = snntorch_recording(*case, seed=100)
    verdict = oracle.judge(spec, recording)
    assert verdict.slots == STEPS * BATCH * NEURONS
    assert verdict.unexplained == 0, verdict
    assert verdict.state_violations == 0, verdict
    assert verdict.mismatches < 1e-5 * verdict.slots
    assert verdict.spikes > 0.03 * verdict.slots


@pytest.mark.parametrize("case", SINABS, ids=lambda case: ", ".join(map(str, case)))
def test_the_real_sinabs_is_accepted(case):
    spec, recording = sinabs_recording(*case, seed=200)
    verdict = oracle.judge(spec, recording)
    assert verdict.slots == STEPS * BATCH * NEURONS
    assert verdict.unexplained == 0, verdict
    assert verdict.state_violations == 0, verdict
    assert verdict.mismatches < 1e-5 * verdict.slots
    assert verdict.spikes > 0.03 * verdict.slots
    if case[0] != "single":
        assert recording.outputs.max() > 1
    if case[4] is not None:
        assert (recording.states["v_mem"] == F32(case[4])).mean() > 0.01


def test_another_order_of_operations_is_accepted():
    """The same neuron in sinabs's convention, theta / alpha in the spike's own step, against snnTorch's equations."""
    xs = noise(30, STEPS, BATCH, NEURONS)
    beta, theta = drawn(31, NEURONS, low=0.3, high=0.99), drawn(32, NEURONS, low=0.3, high=1.5)
    v, outputs, vs = torch.zeros(BATCH, NEURONS), [], []
    for x in torch.tensor(xs):
        v = x + v * torch.tensor(beta)
        s = (v > torch.tensor(theta)).float()
        v = v - s * (torch.tensor(theta) / torch.tensor(beta))
        outputs.append(s.numpy())
        vs.append(v.numpy())
    outputs, vs = np.stack(outputs), np.stack(vs)
    source = leaky_spec(beta, theta)
    own = lif_spec(beta, theta, spikes=("strict", None), reset=("over_alpha", None), norm_input=False)
    verdict = judged(source, xs, outputs, {"v_mem": vs}, own=own)
    assert verdict.ok, verdict
    assert verdict.max_state_error > 0
    spikes, _ = leaky32(xs, beta, theta)
    assert (spikes != outputs).sum() < 100, "and the free runs hardly part"


@pytest.mark.parametrize("case", SNNTORCH, ids=lambda case: f"{case[0]}, delay {case[1]}")
def test_a_subject_in_float64_is_accepted(case):
    """It rounds as well, only finer; the oracle's own roundings are of that size."""
    reset, delay = case
    layer = snntorch.Leaky(
        beta=torch.tensor(drawn(40, 50)), threshold=torch.tensor(drawn(41, 50)) + 0.3, reset_mechanism=reset
    ).double()
    layer.reset_delay = delay
    xs = noise(42, 100, 10, 50).astype(np.float64)
    outputs, mems = zip(*(layer(x) for x in torch.tensor(xs)), strict=True)
    spec = naive.leaky_spec(layer.beta.numpy(), layer.threshold.numpy(), reset=reset, delay=delay)
    verdict = judged(spec, xs, torch.stack(outputs).numpy(), {"v_mem": torch.stack(mems).numpy()})
    assert verdict.ok, verdict
    assert verdict.spikes > 1000


@pytest.mark.parametrize("alphas", [True, False])
def test_a_clamped_subject_in_float64_is_accepted(alphas):
    layer = sl.LIF(
        tau_mem=torch.tensor(drawn(43, 50, low=1, high=20)), min_v_mem=-1.0, train_alphas=alphas, record_states=True
    ).double()
    xs = noise(44, 100, 10, 50, deviation=4.0).astype(np.float64)
    with torch.no_grad():
        outputs = layer(torch.tensor(xs).transpose(0, 1)).transpose(0, 1).numpy()
    decay = (layer.alpha_mem if alphas else layer.tau_mem).detach().numpy()
    spec = naive.lif_spec(decay, 1.0, min_v_mem=-1.0, raw="value" if alphas else "exp_tau")
    verdict = judged(spec, xs, outputs, {"v_mem": layer.recordings["v_mem"].transpose(0, 1).numpy()})
    assert verdict.ok, verdict


def test_a_float64_fault_is_seen():
    """The bound of float64 is that much finer, too."""
    xs = noise(45, 60, 4, 7).astype(np.float64)
    spec = naive.leaky_spec(0.9, 1.0)
    spikes, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": 0.9, "theta": 1.0})
    mems[30, 2, 3] *= 1 + 1e-13
    assert judged(spec, xs, spikes, {"v_mem": mems}).state_violations >= 1


def test_float32_spikes_of_a_float64_membrane_are_accepted():
    xs = (np.random.default_rng(46).integers(0, 9, (16, 4, 7)) / 8).astype(np.float64)
    spikes, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": 0.5, "theta": 1.0})
    assert judged(naive.leaky_spec(0.5, 1.0), xs, spikes.astype(F32), {"v_mem": mems}).ok


@pytest.mark.parametrize("amount", [None, 0.5])
def test_a_count_at_a_rounded_multiple_of_the_threshold_is_explained(amount):
    """sinabs divides in float32: v = round(k theta) gives k, although k theta itself may lie above v."""
    theta = drawn(47, 4000, low=0.3, high=1.5)
    multiples = np.arange(2, 8, dtype=F32)[:, None]
    xs = (multiples * theta)[None]  # one step: the membrane is the input
    outputs, _ = lif32(xs, 0.9, theta, norm_input=False)
    below = outputs[0] * theta.astype(np.float64) > xs[0]
    assert (outputs[0] == multiples).mean() > 0.9
    assert below.sum() > 1000
    layer = sl.LIF(
        tau_mem=torch.tensor(5.0),
        spike_threshold=torch.tensor(theta),
        reset_fn=sa.MembraneSubtract(amount),
        train_alphas=True,
        norm_input=False,
        record_states=True,
    )
    with torch.no_grad():
        stock = layer(torch.tensor(xs).transpose(0, 1)).transpose(0, 1).numpy()
    np.testing.assert_array_equal(stock, outputs)
    spec = lif_spec(layer.alpha_mem.detach().numpy(), theta, reset=("subtract", amount), norm_input=False)
    verdict = judged(spec, xs, stock, {"v_mem": layer.recordings["v_mem"].transpose(0, 1).numpy()})
    assert verdict.ok, verdict
    assert verdict.explained > 500


@pytest.mark.parametrize("bias", [0.0, 0.3, -5.0, 20.0])
def test_the_native_lib_is_accepted(bias):
    """Through sigmoid and softplus; with a bias, the spike test adds up numbers larger than the membrane."""
    count = 2000
    layer = tt.snn.LIB(
        count,
        beta=torch.tensor(drawn(48, count, low=0.3, high=0.99)),
        threshold=torch.tensor(drawn(49, count, low=0.3, high=1.5)) + max(bias, 0.0),
        bias=bias,
        quant_fn=tt.functional.round_ste(),
    )
    xs = noise(50, 100, 2, count, mean=min(bias, 0.0) * -0.3 + 0.2)
    with torch.no_grad():
        outputs, states = layer.trace(torch.tensor(xs))
    spec = naive.leaky_spec(0.9, 1.0).replace(
        form="tracetorch.LIB",
        reset_timing="same_step",
        reset_gradient="attached",
        surrogate=Surrogate("logistic"),
        parameters={
            "mem_decay": naive.parameter(layer.raw_beta.detach().numpy(), F32, raw="sigmoid"),
            "threshold": naive.parameter(layer.raw_threshold.detach().numpy(), F32, raw="softplus"),
            "bias": naive.parameter(layer.raw_bias.detach().numpy(), F32),
        },
    )
    verdict = judged(spec, xs, outputs.numpy(), {"v_mem": states["mem"].numpy()})
    assert verdict.spikes > 1000
    assert verdict.ok, verdict


def test_underflow_is_accepted():
    """Membranes that die out pass through the subnormal numbers."""
    xs = np.zeros((400, 1, 50), F32)
    xs[0] = drawn(51, 50)
    beta = drawn(52, 50, low=0.3, high=0.8)
    spikes, states = leaky32(xs, beta, 2.0)
    mems = states["v_mem"]
    assert ((np.abs(mems) > 0) & (np.abs(mems) < np.finfo(F32).tiny)).sum() > 100
    assert judged(leaky_spec(beta, 2.0), xs, spikes, states).ok


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (63, 1, 7), (2, 1, 513), (3, 2, 4, 5)])
def test_awkward_shapes_are_judged(shape):
    xs = noise(53, *shape, mean=1.0)
    spikes, states = leaky32(xs, 0.9, 0.2)
    spec = leaky_spec(0.9, 0.2)
    verdict = judged(spec, xs, spikes, states)
    assert verdict.ok
    assert verdict.slots == xs.size
    states["v_mem"].reshape(-1)[-1] += F32(1e-3)
    assert judged(spec, xs, spikes, states).first == (shape[0] - 1, tuple(size - 1 for size in shape[1:]))


# ---- recordings ------------------------------------------------------------------------------------------------------

SPEC = leaky_spec(0.9, 1.0)
X = noise(60, 5, 8, 1)
ZERO = np.zeros_like(X)


@pytest.mark.parametrize(
    ("x", "outputs", "states", "named"),
    [
        (X, ZERO.reshape(5, 1, 8), {"v_mem": ZERO}, "outputs"),
        (X, ZERO, {"v_mem": ZERO.reshape(5, 1, 8)}, "v_mem"),
        (X, ZERO[:, :, 0], {"v_mem": ZERO}, "outputs"),
        (X, ZERO, {"v_mem": ZERO[0]}, "v_mem"),
        (X, ZERO[:4], {"v_mem": ZERO}, "outputs"),
        (X, ZERO, {"v_mem": ZERO[:, :, :1][:, :1]}, "v_mem"),
        (X, np.zeros((), F32), {"v_mem": ZERO}, "outputs"),
        (X, ZERO.astype(np.float64), {"v_mem": ZERO}, "float64"),
        (X, ZERO, {"v_mem": ZERO.astype(np.float64)}, "float64"),
        (X, ZERO, {"v_mem": ZERO.astype(np.float16)}, "float16"),
        (X, ZERO.astype(bool), {"v_mem": ZERO}, "bool"),
        (X, ZERO.astype(np.int64), {"v_mem": ZERO}, "int64"),
        (X.astype(np.float16), ZERO.astype(np.float16), {"v_mem": ZERO.astype(np.float16)}, "float16"),
        (X.astype(np.int64), ZERO.astype(np.int64), {"v_mem": ZERO.astype(np.int64)}, "int64"),
        (X.astype(np.float64), ZERO, {"v_mem": ZERO}, "float32"),
        (X, ZERO, {}, "v_mem"),
        (X, ZERO, {"v_mem": ZERO, "i_syn": ZERO}, "i_syn"),
        (X, ZERO, {"mem": ZERO}, "mem"),
        (X[:0], ZERO[:0], {"v_mem": ZERO[:0]}, "empty"),
        (X[:, :0], ZERO[:, :0], {"v_mem": ZERO[:, :0]}, "empty"),
        (X[:, :, :0], ZERO[:, :, :0], {"v_mem": ZERO[:, :, :0]}, "empty"),
        (np.float32(1)[...], np.float32(1)[...], {"v_mem": np.float32(1)[...]}, "empty"),
    ],
)
def test_recordings_that_are_no_evidence_are_refused(x, outputs, states, named):
    oracle.Recording(X, ZERO, {"v_mem": ZERO}, SPEC)
    with pytest.raises(oracle.OracleError, match=named):
        oracle.Recording(x, outputs, states, SPEC)


@pytest.mark.parametrize("shape", [(5, 1), (5, 8), (5, 1, 1), (5, 8, 1)])
def test_a_parameter_does_not_spread_over_time(shape):
    """T, neurons = [5], [8]: a parameter with a dimension for each would be another neuron at every step."""
    spec = leaky_spec(0.9, np.full(shape, 1.0))
    xs = noise(61, 5, 8)
    spikes, states = leaky32(xs, 0.9, 1.0)
    with pytest.raises(ValueError, match=r"shape|broadcast|threshold"):
        judged(spec, xs, spikes, states)


def test_a_parameter_of_another_number_of_neurons_is_refused():
    xs = noise(62, 5, 8)
    spikes, states = leaky32(xs, 0.9, 1.0)
    with pytest.raises(ValueError, match=r"shape|broadcast"):
        judged(leaky_spec(0.9, np.ones(7)), xs, spikes, states)


# ---- gradients and bits ----------------------------------------------------------------------------------------------


def test_gradient_error_is_relative_to_the_largest():
    truth = np.array([1.0, -4.0, 0.5])
    assert oracle.gradient_error(truth.astype(F32), truth) == 0.0
    assert oracle.gradient_error(np.array([1.0, -4.0, 0.9], F32), truth) == pytest.approx(0.1)
    assert oracle.gradient_error(np.array([1.0, 4.0, 0.5]), truth) == 2.0
    assert oracle.gradient_error(np.zeros(3), truth) == 1.0
    assert oracle.gradient_error(np.zeros(3), np.zeros(3)) == 0.0
    assert oracle.gradient_error(np.array([1e-30, 0, 0]), np.zeros(3)) == np.inf
    assert oracle.gradient_error(np.array(2.0, F32), np.array(2.0)) == 0.0


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_poisoned_gradient_is_infinitely_wrong(poison, place):
    truth = np.array([1.0, -4.0, 0.5])
    subject = truth.astype(F32)
    subject[place] = poison
    assert oracle.gradient_error(subject, truth) == np.inf
    poisoned = truth.copy()
    poisoned[place] = poison
    assert oracle.gradient_error(truth.astype(F32), poisoned) == np.inf, "never NaN, which passes any comparison"
    if np.isnan(poison):
        assert oracle.gradient_error(subject, poisoned) == 0.0
        wrong = subject.copy()
        wrong[(place + 1) % 3] += 1
        assert oracle.gradient_error(wrong, poisoned) > 0.2


def test_a_gradient_that_is_nan_throughout_is_judged_without_a_warning():
    nothing = np.full(3, np.nan)
    assert oracle.gradient_error(nothing.astype(F32), nothing) in (0.0, np.inf)


@pytest.mark.parametrize(
    ("subject", "truth"),
    [((8, 1), (1, 8)), ((8,), (8, 1)), ((), (1,)), ((3,), ()), ((2, 3), (3, 2)), ((1, 3), (3,)), ((6,), (2, 3))],
)
def test_a_gradient_of_another_shape_is_refused(subject, truth):
    with pytest.raises(oracle.OracleError, match="shape"):
        oracle.gradient_error(np.ones(subject, F32), np.ones(truth))
    with pytest.raises(oracle.OracleError, match="shape"):
        oracle.same_bits(np.ones(subject), np.ones(truth))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_comparisons_are_refused(shape):
    with pytest.raises(oracle.OracleError, match="empty"):
        oracle.gradient_error(np.ones(shape, F32), np.ones(shape))
    with pytest.raises(oracle.OracleError, match="empty"):
        oracle.same_bits(np.ones(shape), np.ones(shape))


def test_same_bits():
    a = noise(70, 8, 3)
    assert oracle.same_bits(a, a.copy())
    assert oracle.same_bits(a, np.asfortranarray(a)), "another layout in memory, the same numbers"
    assert oracle.same_bits(a[:, ::-1], a[:, ::-1].copy())
    for index in np.ndindex(*a.shape):
        b = a.copy()
        b[index] = np.nextafter(b[index], F32(9))
        assert not oracle.same_bits(a, b)
        b[index] = np.nan
        assert not oracle.same_bits(a, b)
        assert oracle.same_bits(b, b.copy())
    assert not oracle.same_bits(np.zeros(1), -np.zeros(1))
    with pytest.raises(oracle.OracleError, match="float64"):
        oracle.same_bits(a, a.astype(np.float64))
    with pytest.raises(oracle.OracleError, match="int32"):
        oracle.same_bits(a, a.view(np.int32))


def test_gradients_see_a_wrong_trajectory():
    """Along the subject's own trajectory: another spike, another gradient."""
    xs = noise(71, 30, 2, 3).astype(np.float64)
    spikes, mems = naive.columns(naive.snntorch_leaky, xs, {"beta": 0.9, "theta": 1.0})
    spec, weights = naive.leaky_spec(0.9, 1.0), np.ones_like(xs)
    truth = oracle.gradients(spec, oracle.Recording(xs, spikes, {"v_mem": mems}, spec), weights)
    shifted = oracle.gradients(spec, oracle.Recording(xs, spikes, {"v_mem": np.roll(mems, 1, 0)}, spec), weights)
    for name in ("x", "mem_decay", "threshold"):
        assert oracle.gradient_error(np.asarray(shifted[name]), np.asarray(truth[name])) > 1e-3
    earlier = oracle.gradients(spec, oracle.Recording(xs[:-1], spikes[:-1], {"v_mem": mems[:-1]}, spec), weights[:-1])
    assert earlier["x"].shape == (29, 2, 3)
    assert oracle.gradient_error(earlier["x"], truth["x"][:-1]) > 1e-6


@pytest.mark.parametrize("shape", [(5, 1, 8), (5, 1, 1), (5,), (), (5, 8), (7, 8, 1), (4, 8, 1), (0, 8, 1)])
def test_the_gradient_of_the_output_has_the_output_s_shape(shape):
    """Nothing is broadcast, nothing cut off."""
    xs = noise(72, 5, 8, 1)
    spikes, states = leaky32(xs, 0.9, 1.0)
    recording = oracle.Recording(xs, spikes, states, SPEC)
    with pytest.raises(oracle.OracleError, match="shape"):
        oracle.gradients(SPEC, recording, np.ones(shape, F32))
