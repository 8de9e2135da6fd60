"""The online layers in float64 NumPy, from their equations, step by step, with derivatives worked out by hand.

`LIF` in one step: u = m*dm + W i + b, s = [u > theta], m = u - s*theta; the trace t = t*d + i. Shapes: x [B, T, in],
signal [B, T, out]. Gradients are those of sum(signal * outputs), with respect to the values d, dm and theta, not to
the raw parameters.
"""

import numpy as np


def atan_slope(z, alpha=2.0):
    return alpha / 2 / (1 + (np.pi / 2 * alpha * z) ** 2)


def forward(p, x, m=None):
    """Outputs, the membrane before each step, u - theta at each step, the last membrane. Without theta: no spikes."""
    steps = x.shape[1]
    m = np.zeros((x.shape[0], len(p["weight"]))) if m is None else m
    outputs, before, distance = [], [], []
    for k in range(steps):
        before.append(m)
        u = m * p["mem_decay"] + x[:, k] @ p["weight"].T + p.get("bias", 0.0)
        if "threshold" in p:
            z = u - p["threshold"]
            s = (z > 0).astype(float)
            m = u - s * p["threshold"]
            outputs.append(s)
            distance.append(z)
        else:
            m = u
            outputs.append(m)
            distance.append(np.zeros_like(m))
    stacked = (
        np.stack(a, 1) if a else np.zeros((x.shape[0], 0, len(p["weight"]))) for a in (outputs, before, distance)
    )
    return (*stacked, m)


def traces(d, x, t=None, s=None):
    """The trace after the last step and its derivative with respect to d."""
    t = np.zeros_like(x[:, 0]) if t is None else t
    s = np.zeros_like(t) if s is None else s
    for k in range(x.shape[1]):
        s = s * d + t
        t = t * d + x[:, k]
    return t, s


# ---- average ---------------------------------------------------------------------------------------------------------


def soft(z, w):
    """q(z) = (z + sqrt(z^2 + w^2))/2 and its derivative."""
    root = np.sqrt(z * z + w * w)
    q = np.where(z > 0, (z + root) / 2, w * w / (2 * (root + np.abs(z))))
    return q, q / root


def rate(current, dm, theta, w=0.05):
    """The stationary rate and its derivatives with respect to current, dm and theta."""
    z = (current / theta - (1 - dm)) / dm
    low = z <= 0.5
    y = np.where(low, z, 1 - z)
    q, dq = soft(y, w)
    r, dr = soft(1 - y, w)
    share = q / (q + r)
    d_share = (dq * r + q * dr) / (q + r) ** 2
    rate_of_decay = -np.log(dm)
    grown = np.expm1(2 * rate_of_decay)
    bottom = np.log1p(grown / (2 * share))
    value = rate_of_decay / bottom
    by_y = rate_of_decay / bottom**2 / (1 + grown / (2 * share)) * grown / (2 * share**2) * d_share
    by_decay_rate = 1 / bottom - rate_of_decay / bottom**2 / (1 + grown / (2 * share)) * (grown + 1) / share
    sign = np.where(low, 1.0, -1.0)
    by_z = by_y  # twice a sign: of 1 - z, and of 1 - rate
    by_dm = by_z * (1 - z) / dm + sign * by_decay_rate * (-1 / dm)
    return np.where(low, value, 1 - value), by_z / (theta * dm), by_dm, by_z * -current / (theta**2 * dm)


def average(p, x, signal, w=0.05, t=None, s=None):
    """The gradients of `rule="average"` of one call, and the last trace and sensitivity."""
    g = signal.sum(1)
    t, s = traces(p["trace_decay"], x, t, s)
    d = p["trace_decay"]
    mean = t * (1 - d)
    current = mean @ p["weight"].T + p.get("bias", 0.0)
    if "threshold" in p:
        _, by_current, by_dm, by_theta = rate(current, p["mem_decay"], p["threshold"], w)
    else:
        leak = 1 - p["mem_decay"]
        by_current, by_dm = 1 / leak + 0 * current, current / leak**2
        by_theta = 0 * current
    arrived = g * by_current
    below = arrived @ p["weight"]
    grads = {
        "weight": arrived.T @ mean,
        "bias": arrived.sum(0),
        "trace_decay": (below * (s * (1 - d) - t)).sum(0),
        "mem_decay": (g * by_dm).sum(0),
        "threshold": (g * by_theta).sum(0),
        "x": np.repeat((below / x.shape[1])[:, None], x.shape[1], 1),
    }
    return grads, t, s


# ---- ottt and bptt ---------------------------------------------------------------------------------------------------


def ottt(p, x, signal, slope=atan_slope):
    """Forward in time, with a trace for each synapse; the spikes of the resets are constants."""
    outputs, before, distance, _ = forward(p, x)
    size, steps, _ = outputs.shape
    dm, theta = p["mem_decay"], p.get("threshold")
    by_weight = np.zeros((size, *p["weight"].shape))
    by_bias, by_decay, by_theta = (np.zeros((size, len(p["weight"]))) for _ in range(3))
    names = ("weight", "bias", "mem_decay", "threshold")
    grads = dict.fromkeys(names, 0.0)
    below = []
    for k in range(steps):
        by_weight = by_weight * dm[:, None] + x[:, k][:, None]
        by_bias = by_bias * dm + 1
        by_decay = by_decay * dm + before[:, k]
        g = signal[:, k] * (slope(distance[:, k]) if theta is not None else 1.0)
        grads["weight"] = grads["weight"] + np.einsum("bo,boi->oi", g, by_weight)
        grads["bias"] = grads["bias"] + (g * by_bias).sum(0)
        grads["mem_decay"] = grads["mem_decay"] + (g * by_decay).sum(0)
        grads["threshold"] = grads["threshold"] + (g * (by_theta * dm - 1)).sum(0)
        below.append(g @ p["weight"])
        by_theta = by_theta * dm - outputs[:, k]  # of the membrane after the reset
    return {**grads, "x": np.stack(below, 1)}


def bptt(p, x, signal, slope=atan_slope):
    """Backward in time, through the resets."""
    outputs, before, distance, _ = forward(p, x)
    dm, theta = p["mem_decay"], p.get("threshold")
    grads = dict.fromkeys(("weight", "bias", "mem_decay", "threshold"), 0.0)
    below = np.zeros_like(x)
    by_mem = np.zeros_like(outputs[:, 0])  # of the membrane after the step
    for k in reversed(range(x.shape[1])):
        if theta is None:
            by_u = by_mem + signal[:, k]
        else:  # m = u - s*theta
            by_spike = signal[:, k] - by_mem * theta
            by_z = by_spike * slope(distance[:, k])
            by_u = by_mem + by_z
            grads["threshold"] = grads["threshold"] - (by_z + by_mem * outputs[:, k]).sum(0)
        grads["weight"] = grads["weight"] + by_u.T @ x[:, k]
        grads["bias"] = grads["bias"] + by_u.sum(0)
        grads["mem_decay"] = grads["mem_decay"] + (by_u * before[:, k]).sum(0)
        below[:, k] = by_u @ p["weight"]
        by_mem = by_u * dm
    return {**grads, "x": below}
