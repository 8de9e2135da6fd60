"""Surrogate gradients between brainpy's and ours (braintools 0.3.0).

brainpy.state's argument is scaled, x = (V - V_th) / (V_th - V_reset), so its ds/dV is D(x) / (V_th - V_reset).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from braintools import surrogate as stock
from jax.scipy.special import expit

from tracetorch.core.spec import SpecError
from tracetorch.functional.surrogates import Surrogate

# Class of brainpy -> our name, {our parameter: its attribute}. The functions are the same.
_SAME: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "Sigmoid": ("logistic", {"slope": "alpha"}),
    "PiecewiseQuadratic": ("piecewise_quadratic", {"alpha": "alpha"}),
    "PiecewiseExp": ("piecewise_exponential", {"alpha": "alpha"}),
    "SoftSign": ("soft_sign", {"alpha": "alpha"}),
    "Arctan": ("atan", {"alpha": "alpha"}),
    "ERF": ("erf", {"alpha": "alpha"}),
    "PiecewiseLeakyRelu": ("piecewise_leaky_relu", {"w": "w", "c": "c"}),
    "LeakyRelu": ("leaky_k_relu", {"leak": "alpha", "k": "beta"}),
    "GaussianGrad": ("gaussian", {"sigma": "sigma", "grad_scale": "alpha"}),
    "MultiGaussianGrad": ("multi_gaussian", {"sigma": "sigma", "h": "h", "s": "s", "grad_scale": "scale"}),
    "InvSquareGrad": ("fast_sigmoid", {"slope": "alpha"}),
}


def _normal(x: Any, mu: float, sigma: float) -> Any:
    return jnp.exp(-((x - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


def _multi_gaussian(z: Any, th: Any, mu: float, sigma: float, h: float, s: float, grad_scale: float) -> Any:
    side = _normal(z, sigma, s * sigma) + _normal(z, -sigma, s * sigma)
    return grad_scale * ((1 + h) * _normal(z, mu, sigma) - h * side)


def _single_exponential(z: Any, th: Any, grad_width: float, grad_scale: float) -> Any:
    return grad_scale / (th * grad_width) * jnp.exp(-jnp.abs(z) / (th * grad_width))


# The derivatives ds/du of our surrogates, in JAX: (z, threshold, parameters) with z = u - threshold.
_DERIVATIVES: Mapping[str, Callable[..., Any]] = {
    "atan": lambda z, th, alpha: alpha / 2 / (1 + (math.pi / 2 * alpha * z) ** 2),
    "fast_sigmoid": lambda z, th, slope: 1 / (slope * jnp.abs(z) + 1) ** 2,
    "sigmoid": lambda z, th, slope: slope * expit(slope * z) * expit(-slope * z),
    "logistic": lambda z, th, slope: slope * expit(slope * z) * expit(-slope * z),
    "scaled_sigmoid": lambda z, th, alpha: alpha * expit(alpha * z) * expit(-alpha * z),
    "straight_through": lambda z, th: jnp.ones_like(z),
    "triangular": lambda z, th, scale: jnp.where(z >= 0, -scale, scale),
    "heaviside": lambda z, th: jnp.where(z > 0, 1.0, 0.0),
    "zero": lambda z, th: jnp.zeros_like(z),
    "spike_rate_escape": lambda z, th, beta, slope: slope * jnp.exp(-beta * jnp.abs(z - 1)),
    "sparse_fast_sigmoid": lambda z, th, slope, cutoff: jnp.where(z > cutoff, 1 / (slope * jnp.abs(z) + 1) ** 2, 0.0),
    "single_exponential": _single_exponential,
    "heaviside_window": lambda z, th, window: jnp.where(z >= -window, 1 / th, 0.0),
    "gaussian": lambda z, th, mu, sigma, grad_scale: grad_scale * _normal(z, mu, sigma),
    "multi_gaussian": _multi_gaussian,
    "piecewise_quadratic": lambda z, th, alpha: jnp.maximum(alpha - alpha**2 * jnp.abs(z), 0.0),
    "piecewise_exponential": lambda z, th, alpha: alpha / 2 * jnp.exp(-alpha * jnp.abs(z)),
    "soft_sign": lambda z, th, alpha: alpha / (2 * (1 + alpha * jnp.abs(z)) ** 2),
    "super_spike": lambda z, th, alpha: alpha / (1 + jnp.abs(z)) ** 2,
    "erf": lambda z, th, alpha: alpha / math.sqrt(math.pi) * jnp.exp(-((alpha * z) ** 2)),
    "piecewise_leaky_relu": lambda z, th, w, c: jnp.where(jnp.abs(z) < w, 1 / (2 * w), c),
    "leaky_k_relu": lambda z, th, leak, k: jnp.where(z >= 0, k, leak),
    "rectangle": lambda z, th, alpha: jnp.where(jnp.abs(z) < 0.5 / alpha, alpha, 0.0),
    "triangle": lambda z, th, alpha: alpha * jnp.maximum(1 - jnp.abs(z), 0.0),
    "tanh": lambda z, th, alpha: 1 - jnp.tanh(alpha * z) ** 2,
    "circle": lambda z, th, alpha: alpha**3 / (alpha**2 + z**2) ** 1.5,
    "erfc": lambda z, th, alpha: 2 / math.sqrt(math.pi) * jnp.exp(-((alpha * z) ** 2)),
}


@jax.custom_jvp
def _above(x: Any, slope: Any) -> Any:
    """1 where x > 0, else 0; its derivative is `slope`."""
    return jnp.asarray(x > 0, dtype=x.dtype)


@_above.defjvp
def _above_jvp(primals: Any, tangents: Any) -> Any:
    return _above(*primals), primals[1] * tangents[0]


class SpikeFunction(stock.Surrogate):
    """A `spk_fun` that brainpy has not: a surrogate of another framework, or a spike only above the threshold.

    Args:
        surrogate: as a function of (V - V_th) / inner.
        inner: 1, or the scale of the surrogate's own argument.
        scale: V_th - V_reset of the layer it is for, by which its argument is divided.
        threshold: V_th.
        strict: a spike where V > V_th, not also where V = V_th.
    """

    def __init__(
        self, surrogate: Surrogate, inner: np.ndarray, scale: np.ndarray, threshold: np.ndarray, strict: bool
    ) -> None:
        super().__init__()
        self.surrogate, self.inner, self.strict = surrogate, inner, strict
        self.scale, self.threshold = scale, threshold

    def surrogate_grad(self, x: Any) -> Any:
        """ds/dx at x = (V - V_th) / (V_th - V_reset), any shape."""
        scale, threshold = (jnp.asarray(a, dtype=x.dtype) for a in (self.scale / self.inner, self.threshold))
        slope = _DERIVATIVES[self.surrogate.name](x * scale, threshold, **dict(self.surrogate.parameters))
        return jnp.broadcast_to(slope * scale, x.shape)

    def __call__(self, x: Any) -> Any:
        """Spikes, 0 or 1, of the shape of x."""
        if not self.strict:
            return super().__call__(x)
        return _above(x, self.surrogate_grad(jax.lax.stop_gradient(x)))

    def __repr__(self) -> str:
        return f"SpikeFunction({self.surrogate}, {'>' if self.strict else '>='})"

    def __hash__(self) -> int:
        return hash((self.surrogate, self.inner.tobytes(), self.scale.tobytes(), self.strict))


def known() -> tuple[str, ...]:
    """Our surrogates that a `spk_fun` can have."""
    return tuple(_DERIVATIVES)


def read(function: Any, scale: np.ndarray) -> tuple[Surrogate, np.ndarray, bool]:
    """The surrogate of a `spk_fun`, the scale of its argument, and whether it is strict.

    Args:
        scale: V_th - V_reset.

    Raises:
        SpecError: none of those known here.
    """
    if isinstance(function, SpikeFunction):
        return function.surrogate, function.inner, function.strict
    cls = type(function)
    name = cls.__name__
    if cls is getattr(stock, name, None) and name in _SAME:
        ours, names = _SAME[name]
        return Surrogate(ours, tuple((k, float(getattr(function, own))) for k, own in names.items())), scale, False
    if cls is stock.ReluGrad:  # alpha*max(width - |x|, 0), which is alpha*width^2 * max(1 - |x/width|, 0) / width
        width = float(function.width)
        triangle = Surrogate("triangle", (("alpha", float(function.alpha) * width**2),))
        return triangle, (scale * width).astype(scale.dtype), False
    raise SpecError(
        f"spk_fun={function!r}: only braintools.surrogate's ReluGrad, {', '.join(_SAME)} can be read; JaxStage runs any"
    )


def write(surrogate: Surrogate, scale: np.ndarray, own: np.ndarray, threshold: np.ndarray, strict: bool) -> Any:
    """A `spk_fun` for a spec's surrogate; brainpy's own class where it has it, None where nothing can be said in JAX.

    Args:
        scale: of the spec's surrogate argument.
        own: V_th - V_reset of the layer to be made.
    """
    same = bool(np.all(scale == own))
    width = np.unique(scale / own)
    if not strict and surrogate.name == "triangle" and width.size == 1:
        return stock.ReluGrad(alpha=dict(surrogate.parameters)["alpha"] / float(width[0]) ** 2, width=float(width[0]))
    for name, (ours, names) in _SAME.items():
        values = dict(surrogate.parameters)
        if not strict and same and ours == surrogate.name and values.get("mu", 0.0) == 0.0:
            return getattr(stock, name)(**{theirs: values[k] for k, theirs in names.items()})
    if surrogate.name not in _DERIVATIVES:
        return None
    return SpikeFunction(surrogate, np.asarray(scale), np.asarray(own), np.asarray(threshold), strict)
