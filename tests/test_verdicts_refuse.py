"""What is no evidence is refused: recordings, gradients and bits of another shape or dtype, empty, poisoned."""

import numpy as np
import pytest

from tests import naive
from tests.faulty_neurons import F32, judged, leaky32, leaky_spec, noise
from tracetorch import oracle

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
