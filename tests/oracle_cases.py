"""The neurons that the oracle is tried on, its own runs of them, and how two float64 results are compared."""

import itertools

import numpy as np
import sinabs.activation as sa
import sinabs.layers as sl
import torch

from tests import naive
from tracetorch import oracle
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.surrogates import Surrogate

CLOSE = 1e-12


def stimulus(seed, shape=(60, 2, 3), mean=0.3, deviation=0.8):
    return np.random.default_rng(seed).normal(mean, deviation, shape)


def ran(spec, xs):
    """The oracle's own run: outputs, the membrane as the spec stores it, the synaptic current."""
    eq = oracle.equations(spec)
    step = oracle.run(eq, xs).step
    outputs = step.w if spec.output == "membrane" else np.broadcast_to(eq.g, xs.shape[1:]) * step.s
    return outputs, step.w if spec.stores_before_reset else step.v, step.i


def assert_same(found, truth, tolerance=CLOSE):
    assert found.shape == truth.shape, (found.shape, truth.shape)
    assert found.dtype == truth.dtype == np.float64
    assert np.isfinite(truth).all()
    assert found.size
    error = np.abs(found - truth).max()
    assert error <= tolerance * max(1.0, np.abs(truth).max()), error


BETAS, THETAS = np.array([0.5, 0.83, 0.97]), np.array([0.7, 1.0, 1.3])

SPIKES = [("single", None), ("strict", None), ("multiple", None), ("limited", 2)]
RESETS = [
    ("subtract", None),
    ("subtract", np.array([0.4, 0.9, 1.5])),
    ("over_alpha", None),
    ("reset", 0.0),
    ("reset", 0.25),
    ("value", 0.0),
    ("value", np.array([-0.4, 0.1, 0.3])),
    ("none", None),
]
WAYS = [
    {"norm_input": True},
    {"norm_input": False, "min_v_mem": -0.3},
    {"norm_input": True, "syn": 0.6, "min_v_mem": np.array([-0.5, -0.1, 0.0])},
    {"norm_input": False, "syn": np.array([0.3, 0.6, 0.9])},
]


def integrator_spec(numbers):
    names = {"decay": "mem_decay", "gain": "input_gain", "leak": "leak", "syn": "syn_decay", "min_v_mem": "min_v_mem"}
    return NeuronSpec(
        form="anything",
        output="membrane",
        spike_count="none",
        reset="none",
        threshold_gradient=False,
        synapse="add_then_decay" if "syn" in numbers else "none",
        input_gain="value",
        clamp="after_reset" if "min_v_mem" in numbers else "none",
        parameters={names[n]: naive.parameter(p) for n, p in numbers.items()},
    )


def lib_spec(beta, theta, bias, raws=("value", "value")):
    return NeuronSpec(
        form="tracetorch.LIB",
        comparison=">",
        surrogate=Surrogate("logistic"),
        parameters={
            "mem_decay": naive.parameter(beta, raw=raws[0]),
            "threshold": naive.parameter(theta, raw=raws[1]),
            "bias": naive.parameter(bias),
        },
    )


def snntorch_run(layer, xs):
    outputs, mems = [], []
    for x in xs:
        spikes, mem = layer(x)
        outputs.append(spikes)
        mems.append(mem)
    return torch.stack(outputs), torch.stack(mems)


SPIKE_FNS = {"single": sa.SingleSpike, "multiple": sa.MultiSpike, "limited": sa.MaxSpike(2)}


def sinabs_layer(tau, theta, spikes, reset, norm_input, syn=None, min_v_mem=None):
    """A sinabs LIF in float64; `tau` and `syn` are time constants."""
    amount = torch.tensor(reset[1]) if isinstance(reset[1], np.ndarray) else reset[1]
    layer = sl.LIF(
        tau_mem=1.0,
        tau_syn=None if syn is None else 1.0,
        spike_threshold=torch.tensor(theta),
        spike_fn=SPIKE_FNS[spikes[0]],
        reset_fn=sa.MembraneSubtract(amount) if reset[0] == "subtract" else sa.MembraneReset(reset[1]),
        min_v_mem=None if min_v_mem is None else torch.tensor(min_v_mem, dtype=torch.float64),
        norm_input=norm_input,
        record_states=True,
    ).double()
    layer.tau_mem = torch.nn.Parameter(torch.tensor(tau))
    if syn is not None:
        layer.tau_syn = torch.nn.Parameter(torch.tensor(syn, dtype=torch.float64))
    return layer


SINABS_SPIKES = [s for s in SPIKES if s[0] in SPIKE_FNS]
SINABS_RESETS = [r for r in RESETS if r[0] in ("subtract", "reset")]
SINABS_WAYS = [
    {"norm_input": True},
    {"norm_input": False, "min_v_mem": -0.3},
    {"norm_input": True, "syn": 2.5, "min_v_mem": np.array([-0.5, -0.1, 0.0])},
    {"norm_input": False, "syn": np.array([0.8, 2.0, 9.0])},
]
TAUS = np.array([1.5, 4.0, 15.0])

# (spikes, reset, threshold_gradient, detached, way), the ways in turn
CASES = [
    (*case, WAYS[(k + k // 4) % len(WAYS)])
    for k, case in enumerate(itertools.product(SPIKES, RESETS, (True, False), (True, False)))
]


def case_name(case):
    spikes, reset, threshold_gradient, detached, way = case
    words = [spikes[0], f"{reset[0]} {np.ndim(reset[1])}" if reset[1] is not None else reset[0], *way]
    return ", ".join([*words, *(["threshold"] if threshold_gradient else []), *(["detached"] if detached else [])])


def case_spec(case):
    """The `naive.lif_spec` of a case."""
    spikes, reset, threshold_gradient, detached, way = case
    alpha, options = np.array([0.6, 0.8, 0.9]), {"detached": detached, "threshold_gradient": threshold_gradient}
    return naive.lif_spec(alpha, THETAS, spikes, reset, **way, **options)
