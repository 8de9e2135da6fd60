"""Surrogate gradients in float64, as derivatives: `DERIVATIVES[name](z, threshold, **parameters)`, z = v - threshold.

`PRIMITIVES[name](z, **parameters)` are the smooth spikes that some of them are the derivatives of.

Written from the equations (see the docstrings of `tracetorch.functional.surrogates` for sources); no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from tracetorch.oracle.raw import Array


def _normal(x: Array, mu: float, sigma: float) -> Array:
    return np.exp(-((x - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


def _sigmoid(z: Array, threshold: Array, slope: float) -> Array:
    shrunk = np.exp(-slope * np.abs(z))
    return slope * shrunk / (1 + shrunk) ** 2


def _single_exponential(z: Array, threshold: Array, grad_width: float, grad_scale: float) -> Array:
    width = threshold * grad_width
    return grad_scale / width * np.exp(-np.abs(z) / width)


def _multi_gaussian(
    z: Array, threshold: Array, mu: float, sigma: float, h: float, s: float, grad_scale: float
) -> Array:
    side = _normal(z, sigma, s * sigma) + _normal(z, -sigma, s * sigma)
    return grad_scale * ((1 + h) * _normal(z, mu, sigma) - h * side)


def _periodic_exponential(z: Array, threshold: Array, grad_width: float, grad_scale: float) -> Array:
    phase = (z + threshold) / threshold - 0.5
    above = threshold * (2 * (phase - np.floor(phase)) - 1)
    return grad_scale * np.exp(-np.abs(np.where(z >= 0, above, z)) / grad_width)


def _fast_sigmoid(z: Array, slope: float) -> Array:
    return 1 / (slope * np.abs(z) + 1) ** 2


DERIVATIVES: Mapping[str, Callable[..., Array]] = MappingProxyType(
    {
        "atan": lambda z, th, alpha: alpha / 2 / (1 + (math.pi / 2 * alpha * z) ** 2),
        "fast_sigmoid": lambda z, th, slope: _fast_sigmoid(z, slope),
        "sigmoid": _sigmoid,
        "logistic": _sigmoid,
        "straight_through": lambda z, th: np.ones_like(z),
        "triangular": lambda z, th, scale: np.where(z >= 0, -scale, scale),
        "heaviside": lambda z, th: (z > 0) * 1.0,
        "zero": lambda z, th: np.zeros_like(z),
        "spike_rate_escape": lambda z, th, beta, slope: slope * np.exp(-beta * np.abs(z - 1)),
        "sparse_fast_sigmoid": lambda z, th, slope, cutoff: _fast_sigmoid(z, slope) * (z > cutoff),
        "single_exponential": _single_exponential,
        "heaviside_window": lambda z, th, window: (z >= -window) / th,
        "gaussian": lambda z, th, mu, sigma, grad_scale: grad_scale * _normal(z, mu, sigma),
        "multi_gaussian": _multi_gaussian,
        "periodic_exponential": _periodic_exponential,
        "scaled_sigmoid": lambda z, th, alpha: _sigmoid(z, th, alpha),
        "piecewise_quadratic": lambda z, th, alpha: np.maximum(alpha - alpha**2 * np.abs(z), 0.0),
        "piecewise_exponential": lambda z, th, alpha: alpha / 2 * np.exp(-alpha * np.abs(z)),
        "soft_sign": lambda z, th, alpha: alpha / (2 * (1 + alpha * np.abs(z)) ** 2),
        "super_spike": lambda z, th, alpha: alpha / (1 + np.abs(z)) ** 2,
        "erf": lambda z, th, alpha: alpha / math.sqrt(math.pi) * np.exp(-((alpha * z) ** 2)),
        "piecewise_leaky_relu": lambda z, th, w, c: np.where(np.abs(z) < w, 1 / (2 * w), c * 1.0),
        "leaky_k_relu": lambda z, th, leak, k: leak + (k - leak) * (z >= 0),
        "rectangle": lambda z, th, alpha: np.where(np.abs(z) < 0.5 / alpha, alpha, 0.0),
        "triangle": lambda z, th, alpha: alpha * np.maximum(1 - np.abs(z), 0.0),
        "tanh": lambda z, th, alpha: 1 - np.tanh(alpha * z) ** 2,
        "circle": lambda z, th, alpha: alpha**3 / (alpha**2 + z**2) ** 1.5,
        "erfc": lambda z, th, alpha: 2 / math.sqrt(math.pi) * np.exp(-((alpha * z) ** 2)),
    }
)

# The functions of z that have these derivatives, of range 1 where they have limits: smooth spikes.
PRIMITIVES: Mapping[str, Callable[..., Array]] = MappingProxyType(
    {
        "atan": lambda z, alpha: np.arctan(math.pi / 2 * alpha * z) / math.pi + 0.5,
        "logistic": lambda z, slope: 0.5 * (1 + np.tanh(slope * z / 2)),
        "scaled_sigmoid": lambda z, alpha: 0.5 * (1 + np.tanh(alpha * z / 2)),
        "soft_sign": lambda z, alpha: 0.5 * (alpha * z / (1 + np.abs(alpha * z)) + 1),
    }
)
