"""Subjects for the judge in NumPy float32, right or with one fault of a given name; and the specs they claim."""

import numpy as np

from tests import naive
from tracetorch import oracle

F32 = np.float32


def drawn(seed, *shape, low=0.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(F32)


def noise(seed, *shape, mean=0.2, deviation=1.0):
    return np.random.default_rng(seed).normal(mean, deviation, shape).astype(F32)


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
