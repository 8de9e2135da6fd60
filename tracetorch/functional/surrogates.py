"""Surrogate gradients: what stands in for the derivative of a spike in the backward pass.

Each entry of `SURROGATES` is a vector-Jacobian product, `vjp(grad, z, threshold, **parameters)`, written with the
operations of the framework it comes from, in its order, so that gradients of a converted layer can be bit-identical.
`z` is `v - threshold`; `threshold` is used only by surrogates whose width scales with it. Some are written in the
membrane `v` itself (`of_membrane`): in floating point, `z + threshold` is not always `v`. The float64 counterpart of
each entry, written as a derivative, is in `tracetorch.oracle.surrogates`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Vjp = Callable[..., Tensor]


def _atan(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """snnTorch 1.0.0 `surrogate.atan`: (alpha/2) / (1 + (pi/2 alpha z)^2)."""
    return alpha / 2 / (1 + (torch.pi / 2 * alpha * z).pow(2)) * grad


def _fast_sigmoid(grad: Tensor, z: Tensor, threshold: Tensor, *, slope: float) -> Tensor:
    """snnTorch 1.0.0 `surrogate.fast_sigmoid`: 1 / (slope |z| + 1)^2 (Zenke and Ganguli 2018)."""
    return grad / (slope * torch.abs(z) + 1.0) ** 2


def _sigmoid(grad: Tensor, z: Tensor, threshold: Tensor, *, slope: float) -> Tensor:
    """snnTorch 1.0.0 `surrogate.sigmoid`: k e^{-kz} / (e^{-kz} + 1)^2; NaN where e^{-kz} overflows, as there."""
    return grad * slope * torch.exp(-slope * z) / ((torch.exp(-slope * z) + 1) ** 2)


def _logistic(grad: Tensor, z: Tensor, threshold: Tensor, *, slope: float) -> Tensor:
    """traceTorch `sigmoid4x` with a hard quantizer: k s (1 - s), s = sigmoid(k z); never overflows."""
    s = torch.sigmoid(slope * z)
    return grad * ((1 - s) * s) * slope


def _straight_through(grad: Tensor, z: Tensor, threshold: Tensor) -> Tensor:
    """snnTorch 1.0.0 `surrogate.straight_through_estimator`: 1."""
    return grad.clone()


def _triangular(grad: Tensor, z: Tensor, threshold: Tensor, *, scale: float) -> Tensor:
    """snnTorch 1.0.0 `surrogate.triangular`: +scale below the threshold, -scale at and above it."""
    scaled = grad * scale
    return torch.where(z >= 0, -scaled, scaled)


def _heaviside(grad: Tensor, z: Tensor, threshold: Tensor) -> Tensor:
    """snnTorch 1.0.0 `surrogate.heaviside`: 1 where z > 0."""
    return grad * (z > 0).float()


def _zero(grad: Tensor, z: Tensor, threshold: Tensor) -> Tensor:
    """snnTorch 1.0.0 `surrogate_disable=True`: no gradient passes a spike."""
    return torch.zeros_like(grad)


def _spike_rate_escape(grad: Tensor, z: Tensor, threshold: Tensor, *, beta: float, slope: float) -> Tensor:
    """snnTorch 1.0.0 `surrogate.spike_rate_escape`: slope e^{-beta |z - 1|}."""
    return grad * slope * torch.exp(-beta * torch.abs(z - 1))


def _sparse_fast_sigmoid(grad: Tensor, z: Tensor, threshold: Tensor, *, slope: float, cutoff: float) -> Tensor:
    """snnTorch 1.0.0 `surrogate.SFS`: the fast sigmoid where z > cutoff (`B` there), else 0."""
    return grad / (slope * torch.abs(z) + 1.0) ** 2 * (z > cutoff).float()


def _single_exponential(grad: Tensor, z: Tensor, threshold: Tensor, *, grad_width: float, grad_scale: float) -> Tensor:
    """sinabs 3.1.3 `SingleExponential`: scale e^{-|z|/w} / w, w = grad_width threshold (Shrestha, Orchard 2018)."""
    width = threshold * grad_width
    return grad * (grad_scale / width * torch.exp(-torch.abs(z) / width))


def _heaviside_window(grad: Tensor, z: Tensor, threshold: Tensor, *, v: Tensor, window: float) -> Tensor:
    """sinabs 3.1.3 `Heaviside`: 1 / threshold where v >= threshold - window."""
    return grad * ((v >= (threshold - window)).float() / threshold)


def _normal(x: Tensor, mu: float, sigma: float) -> Tensor:
    return torch.exp(-((x - mu) ** 2) / (2 * sigma**2)) / (sigma * torch.sqrt(2 * torch.tensor(math.pi)))


def _gaussian(grad: Tensor, z: Tensor, threshold: Tensor, *, mu: float, sigma: float, grad_scale: float) -> Tensor:
    """sinabs 3.1.3 `Gaussian`: scale times the normal density N(mu, sigma) of z."""
    return grad * (_normal(z, mu, sigma) * grad_scale)


def _multi_gaussian(
    grad: Tensor, z: Tensor, threshold: Tensor, *, mu: float, sigma: float, h: float, s: float, grad_scale: float
) -> Tensor:
    """sinabs 3.1.3 `MultiGaussian` (Yin et al. 2021): (1+h) N(mu, w) - h N(w, s w) - h N(-w, s w), w = sigma."""
    value = (1 + h) * _normal(z, mu, sigma) - h * _normal(z, sigma, s * sigma) - h * _normal(z, -sigma, s * sigma)
    return grad * (value * grad_scale)


def _periodic_exponential(
    grad: Tensor, z: Tensor, threshold: Tensor, *, v: Tensor, grad_width: float, grad_scale: float
) -> Tensor:
    """sinabs 3.1.3 `PeriodicExponential` (Weidel and Sheik 2021): e^{-|p(v)|/w}, p periodic above the threshold."""
    phase = v / threshold - 0.5
    above = threshold * (2 * (phase - torch.floor(phase)) - 1) * (v >= threshold)
    return grad * (grad_scale * torch.exp(-torch.abs(above + z * (v < threshold)) / grad_width))


def _scaled_sigmoid(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """SpikingJelly 2.0.0 `Sigmoid`: alpha s (1 - s), s = sigmoid(alpha z)."""
    s = torch.sigmoid(alpha * z)
    return grad * ((1 - s) * s * alpha)


def _piecewise_quadratic(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """SpikingJelly 2.0.0 `PiecewiseQuadratic`: max(0, alpha - alpha^2 |z|)."""
    return grad * (alpha - alpha * alpha * z.abs()).clamp_min(0)


def _piecewise_exponential(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """SpikingJelly 2.0.0 `PiecewiseExp`: (alpha/2) e^{-alpha |z|}."""
    return grad * ((alpha / 2) * torch.exp(-alpha * z.abs()))


def _soft_sign(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """SpikingJelly 2.0.0 `SoftSign`: 1 / (2 alpha (1/alpha + |z|)^2)."""
    shifted = 1 / alpha + z.abs()
    return grad * (1 / (2 * alpha * shifted * shifted))


def _super_spike(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """SpikingJelly 2.0.0 `SuperSpike`: alpha / (1 + |z|)^2 (Zenke and Ganguli 2018)."""
    shifted = 1 + z.abs()
    return grad * (alpha / (shifted * shifted))


def _erf(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """SpikingJelly 2.0.0 `Erf`: (alpha / sqrt(pi)) e^{-(alpha z)^2}."""
    scaled = alpha * z
    return grad * ((alpha / math.sqrt(math.pi)) * torch.exp(-scaled * scaled))


def _piecewise_leaky_relu(grad: Tensor, z: Tensor, threshold: Tensor, *, w: float, c: float) -> Tensor:
    """SpikingJelly 2.0.0 `PiecewiseLeakyReLU`: 1 / (2 w) where |z| < w, else c."""
    return grad * torch.where(z.abs() < w, torch.full_like(z, 1 / (2 * w)), torch.full_like(z, c))


def _leaky_k_relu(grad: Tensor, z: Tensor, threshold: Tensor, *, leak: float, k: float) -> Tensor:
    """SpikingJelly 2.0.0 `LeakyKReLU`: k where z >= 0, else leak."""
    above = (z >= 0.0).to(z)
    return grad * (above * k + (1.0 - above) * leak)


def _rectangle(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """SpikingJelly 2.0.0 `Rect`: alpha where |z| < 1 / (2 alpha), else 0."""
    return alpha * (z.abs() < 0.5 / alpha).to(z) * grad


def _triangle(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """Norse 1.1.0 method "triangle": alpha max(0, 1 - |z|) (Esser et al. 2016, Bellec et al. 2020)."""
    return grad * alpha * torch.relu(1 - z.abs())


def _tanh(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """Norse 1.1.0 method "tanh": 1 - tanh(alpha z)^2."""
    return grad * (1 - (z * alpha).tanh().pow(2))


def _circle(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """Norse 1.1.0 method "circ": alpha^3 / (alpha^2 + z^2)^1.5."""
    square = alpha**2 + z.pow(2)
    return grad * (-(z.pow(2) / (2 * square.pow(1.5))) + 1 / (2 * square.sqrt())) * 2 * alpha


def _erfc(grad: Tensor, z: Tensor, threshold: Tensor, *, alpha: float) -> Tensor:
    """Norse 1.1.0 method "heavi_erfc": (2 / sqrt(pi)) e^{-(alpha z)^2}."""
    return (2 * torch.exp(-(alpha * z).pow(2))) / torch.tensor(math.pi).sqrt() * grad


@dataclass(frozen=True)
class SurrogateKind:
    """One row of the table: the backward rule and its parameters with the source framework's defaults.

    With `of_membrane` the rule takes the membrane too, as `v`.
    """

    vjp: Vjp
    defaults: Mapping[str, float] = field(default_factory=dict)
    of_membrane: bool = False


SURROGATES: Mapping[str, SurrogateKind] = MappingProxyType(
    {
        "atan": SurrogateKind(_atan, {"alpha": 2.0}),
        "fast_sigmoid": SurrogateKind(_fast_sigmoid, {"slope": 25.0}),
        "sigmoid": SurrogateKind(_sigmoid, {"slope": 25.0}),
        "logistic": SurrogateKind(_logistic, {"slope": 4.0}),
        "straight_through": SurrogateKind(_straight_through),
        "triangular": SurrogateKind(_triangular, {"scale": 1.0}),
        "heaviside": SurrogateKind(_heaviside),
        "zero": SurrogateKind(_zero),
        "spike_rate_escape": SurrogateKind(_spike_rate_escape, {"beta": 1.0, "slope": 25.0}),
        "sparse_fast_sigmoid": SurrogateKind(_sparse_fast_sigmoid, {"slope": 25.0, "cutoff": 1.0}),
        "single_exponential": SurrogateKind(_single_exponential, {"grad_width": 0.5, "grad_scale": 1.0}),
        "heaviside_window": SurrogateKind(_heaviside_window, {"window": 1.0}, of_membrane=True),
        "gaussian": SurrogateKind(_gaussian, {"mu": 0.0, "sigma": 0.5, "grad_scale": 1.0}),
        "multi_gaussian": SurrogateKind(
            _multi_gaussian, {"mu": 0.0, "sigma": 0.5, "h": 0.15, "s": 6.0, "grad_scale": 1.0}
        ),
        "periodic_exponential": SurrogateKind(
            _periodic_exponential, {"grad_width": 0.5, "grad_scale": 1.0}, of_membrane=True
        ),
        "scaled_sigmoid": SurrogateKind(_scaled_sigmoid, {"alpha": 4.0}),
        "piecewise_quadratic": SurrogateKind(_piecewise_quadratic, {"alpha": 1.0}),
        "piecewise_exponential": SurrogateKind(_piecewise_exponential, {"alpha": 1.0}),
        "soft_sign": SurrogateKind(_soft_sign, {"alpha": 2.0}),
        "super_spike": SurrogateKind(_super_spike, {"alpha": 1.0}),
        "erf": SurrogateKind(_erf, {"alpha": 2.0}),
        "piecewise_leaky_relu": SurrogateKind(_piecewise_leaky_relu, {"w": 1.0, "c": 0.01}),
        "leaky_k_relu": SurrogateKind(_leaky_k_relu, {"leak": 0.0, "k": 1.0}),
        "rectangle": SurrogateKind(_rectangle, {"alpha": 1.0}),
        "triangle": SurrogateKind(_triangle, {"alpha": 0.3}),
        "tanh": SurrogateKind(_tanh, {"alpha": 1.0}),
        "circle": SurrogateKind(_circle, {"alpha": 1.0}),
        "erfc": SurrogateKind(_erfc, {"alpha": 1.0}),
    }
)


@dataclass(frozen=True)
class Surrogate:
    """A named surrogate gradient with its parameters; missing parameters take the source framework's defaults.

    Args:
        name: a key of `SURROGATES`.
        parameters: `(name, value)` pairs or a mapping.

    Raises:
        ValueError: an unknown name or parameter, or a value that is not a finite number.
    """

    name: str
    parameters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in SURROGATES:
            raise ValueError(
                f"surrogate {self.name!r} is not known; the known ones are {', '.join(sorted(SURROGATES))}"
            )
        given = dict(self.parameters)
        defaults = SURROGATES[self.name].defaults
        for key, value in given.items():
            if key not in defaults:
                known = ", ".join(defaults) or "none"
                raise ValueError(f"surrogate {self.name!r} has no parameter {key!r}; it has: {known}")
            try:
                finite = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
            except OverflowError:
                finite = False
            if not finite:
                raise ValueError(f"surrogate {self.name!r}: {key}={value!r} is not a finite number")
        merged = tuple((key, float(given.get(key, default))) for key, default in defaults.items())
        object.__setattr__(self, "parameters", merged)

    @property
    def of_membrane(self) -> bool:
        """Whether the surrogate is written in `v`, not in `v - threshold`."""
        return SURROGATES[self.name].of_membrane

    def vjp(self, grad: Tensor, z: Tensor, threshold: Tensor, v: Tensor | None = None) -> Tensor:
        """`grad` times the surrogate derivative at `z = v - threshold`, elementwise; without `v`, `z + threshold`."""
        kind = SURROGATES[self.name]
        if kind.of_membrane:
            return kind.vjp(grad, z, threshold, v=z + threshold if v is None else v, **dict(self.parameters))
        return kind.vjp(grad, z, threshold, **dict(self.parameters))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v:g}' for k, v in self.parameters)})"


@dataclass(frozen=True)
class OpaqueSurrogate(Surrogate):
    """A surrogate gradient of the user's own: a callable without a name, carried as it is.

    It copies and pickles as the callable does; JSON and `tt.save` cannot hold it.

    Args:
        function: elementwise, in torch operations.
        kind: how it is called: "membrane", `function(v, threshold) -> ds/dv` (a `surrogate_grad_fn` of sinabs); or
            "gradient", `function(z, grad, spikes) -> grad * ds/dz`, z = v - threshold (snnTorch's `custom_surrogate`).

    Raises:
        ValueError: no callable, or another kind.
    """

    name: str = "opaque"
    function: Callable[..., Tensor] | None = None
    kind: str = "membrane"

    def __post_init__(self) -> None:
        if not callable(self.function) or self.kind not in ("membrane", "gradient"):
            raise ValueError(
                f"function={self.function!r}, kind={self.kind!r}: needs a callable, kind 'membrane' or 'gradient'"
            )
        if self.name != "opaque" or self.parameters:
            raise ValueError(f"name={self.name!r}, parameters={self.parameters!r}: an opaque surrogate has neither")

    @property
    def of_membrane(self) -> bool:
        """Whether it is written in `v`."""
        return self.kind == "membrane"

    def vjp(self, grad: Tensor, z: Tensor, threshold: Tensor, v: Tensor | None = None) -> Tensor:
        """As of a named surrogate."""
        assert self.function is not None
        if self.kind == "gradient":
            return self.function(z, grad.clone(), (z > 0).float())
        return grad * self.function(z + threshold if v is None else v, threshold)

    def derivative(self, v: Any, threshold: Any) -> Any:
        """ds/dv in float64 for the oracle: NumPy arrays of a membrane and its threshold, one array back."""
        shape = np.broadcast_shapes(np.shape(v), np.shape(threshold))
        at, theta = (torch.tensor(np.broadcast_to(a, shape), dtype=torch.float64) for a in (v, threshold))
        with torch.no_grad():
            found = self.vjp(torch.ones_like(at), at - theta, theta, at)
        return np.broadcast_to(found.to(torch.float64).numpy(), shape)

    def __str__(self) -> str:
        return f"opaque({getattr(self.function, '__qualname__', None) or repr(self.function)})"
