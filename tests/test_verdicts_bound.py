"""How wide the judge's bound is: exact ties are decided, a few roundings allowed, a relative error of 1e-5 seen."""

import numpy as np
import pytest

from tests.faulty_neurons import F32, drawn, judged, leaky32, leaky_spec, lif32, lif_spec, noise
from tracetorch import oracle

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
