"""Four spiking layers by hand in float64 NumPy, forward and backward, one framework's equations each."""

from __future__ import annotations

import numpy as np


def relu_grad(z, alpha=0.3):
    """braintools 0.3.0 `ReluGrad`."""
    return np.maximum(alpha - alpha * np.abs(z), 0.0)


def sinabs_forward(x, p):
    """v = a*v + x; s = [v >= 1]; v = v - s, with a = exp(-1/tau)."""
    a, v = np.exp(-1 / p["tau"]), np.zeros(x.shape[1:])
    u, s = np.zeros_like(x), np.zeros_like(x)
    for t in range(len(x)):
        u[t] = a * v + x[t]
        s[t] = u[t] >= 1.0
        v = u[t] - s[t]
    return s, u


def sinabs_backward(x, s, u, p, grad):
    """d/du of a spike: exp(-|u-1| / .5) / .5; the reset is attached."""
    a, l, d_a, gx = np.exp(-1 / p["tau"]), 0.0, 0.0, np.zeros_like(x)  # noqa: E741
    for t in range(len(x) - 1, -1, -1):
        k = l + (grad[t] - l) * np.exp(-np.abs(u[t] - 1) / 0.5) / 0.5
        before = u[t - 1] - s[t - 1] if t else np.zeros_like(u[0])
        d_a += (k * before).sum()
        gx[t], l = k, a * k  # noqa: E741
    return gx, {"tau_mem": d_a * a / p["tau"] ** 2}


def snntorch_forward(x, p):
    """r = [mem > 1] of the last step; mem = b*mem + x - r; s = [mem > 1]."""
    mem = np.zeros(x.shape[1:])
    u, s = np.zeros_like(x), np.zeros_like(x)
    for t in range(len(x)):
        mem = p["beta"] * mem + x[t] - (mem > 1.0)
        u[t], s[t] = mem, mem > 1.0
    return s, u


def snntorch_backward(x, s, u, p, grad):
    """d/du of a spike: 1 / (1 + (pi (u-1))^2); the reset is detached."""
    l, gx = 0.0, np.zeros_like(x)  # noqa: E741
    for t in range(len(x) - 1, -1, -1):
        k = l + grad[t] / (1 + (np.pi * (u[t] - 1)) ** 2)
        gx[t], l = k, p["beta"] * k  # noqa: E741
    return gx, {}


def native_forward(x, p):
    """mem = b*mem + x; s = [mem - th + bias > 0]; mem = mem - s*th."""
    mem = np.zeros(x.shape[1:])
    u, s = np.zeros_like(x), np.zeros_like(x)
    for t in range(len(x)):
        u[t] = p["beta"] * mem + x[t]
        s[t] = u[t] - p["threshold"] + p["bias"] > 0
        mem = u[t] - s[t] * p["threshold"]
    return s, u


def native_backward(x, s, u, p, grad):
    """d/du of a spike: 4 g (1 - g), g = sigmoid(4 (u - th + bias)); the reset is attached. Raw: beta (1 - beta)."""
    l, gx, d_beta, d_bias = 0.0, np.zeros_like(x), 0.0, 0.0  # noqa: E741
    for t in range(len(x) - 1, -1, -1):
        g = 1 / (1 + np.exp(-4 * (u[t] - p["threshold"] + p["bias"])))
        through = (grad[t] - l * p["threshold"]) * 4 * g * (1 - g)
        k = l + through
        before = u[t - 1] - s[t - 1] * p["threshold"] if t else np.zeros_like(u[0])
        d_beta = d_beta + (k * before).sum(0)
        d_bias = d_bias + through.sum(0)
        gx[t], l = k, p["beta"] * k  # noqa: E741
    return gx, {"raw_beta": d_beta * p["beta"] * (1 - p["beta"]), "raw_bias": d_bias}


def brainpy_forward(x, p):
    """V = V - rho*[V >= th]; V = e*V + (1-e)*(rest + R*x); s = [V >= th]; rho = th - reset, e = exp(-dt/tau)."""
    e, rho = np.exp(-p["dt"] / p["tau"]), p["V_th"] - p["V_reset"]
    v = np.zeros(x.shape[1:])
    u, s = np.zeros_like(x), np.zeros_like(x)
    for t in range(len(x)):
        v = v - rho * (v >= p["V_th"])
        v = e * v + (1 - e) * (p["V_rest"] + p["R"] * x[t])
        u[t], s[t] = v, v >= p["V_th"]
    return s, u


def brainpy_backward(x, s, u, p, grad):
    """d/dV of a spike: ReluGrad((V - th) / rho) / rho, also of the one that resets in the next step."""
    e, rho = np.exp(-p["dt"] / p["tau"]), p["V_th"] - p["V_reset"]
    l, gx, d_r = 0.0, np.zeros_like(x), 0.0  # noqa: E741
    for t in range(len(x) - 1, -1, -1):
        k = l + (grad[t] - l * rho) * relu_grad((u[t] - p["V_th"]) / rho) / rho
        d_r += (k * (1 - e) * x[t]).sum()
        gx[t], l = (1 - e) * p["R"] * k, e * k  # noqa: E741
    return gx, {"R": d_r}


LAYERS = {
    "sinabs": (sinabs_forward, sinabs_backward),
    "snntorch": (snntorch_forward, snntorch_backward),
    "native": (native_forward, native_backward),
    "brainpy": (brainpy_forward, brainpy_backward),
}


def run(x, layers, cotangent):
    """Matrix and layer in turn. layers: (name, weight, bias, parameters); the outputs of all, and all gradients."""
    kept = []
    for name, weight, bias, p in layers:
        drive = x @ weight.T + bias
        s, u = LAYERS[name][0](drive, p)
        kept.append((x, drive, s, u))
        x = s
    gradients = [{} for _ in layers]
    grad = cotangent
    for k in range(len(layers) - 1, -1, -1):
        name, weight, _, p = layers[k]
        entered, drive, s, u = kept[k]
        grad_drive, own = LAYERS[name][1](drive, s, u, p, grad)
        own["weight"] = np.einsum("tbo,tbi->oi", grad_drive, entered)
        own["bias"] = grad_drive.sum((0, 1))
        gradients[k], grad = own, grad_drive @ weight
    return [k[2] for k in kept], gradients, grad
