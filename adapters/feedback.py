"""The connection of a recurrent layer in float64, for the oracle: the oracle has its neuron, and no torch."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from tracetorch.adapters.networks import recurrent

# Linear in what they take, with the magnitudes of their weights as the bound of what an error in it becomes.
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Sequential)
_LINEAR_NAMES = ("RecurrentOneToOne",)  # snnTorch's, a number per neuron


class Feedback:
    """What comes back of a layer's outputs, and its vector-Jacobian product, step by step.

    With c the connection, the neuron of step t received x(t) + c(o(t-1)), o its outputs; so dL/do(t-1) gets, of
    dL/d(that sum), its product with dc/do at o(t-1).

    Args:
        source: the recurrent layer whose connection it is.
        target: the one whose weights it has, where it has the same.
        outputs: [T, B, ...], of the target.
    """

    def __init__(self, source: nn.Module, target: nn.Module, outputs: Tensor) -> None:
        self.connection = copy.deepcopy(recurrent.connection(source)).cpu().double().requires_grad_()
        weights = recurrent.connection(target).state_dict()
        if weights.keys() == self.connection.state_dict().keys():
            self.connection.load_state_dict(weights)
        self.from_start = recurrent.from_start(source)
        self.before = torch.cat([torch.zeros_like(outputs[:1]), outputs[:-1]]).detach().cpu().double()
        self._sized = _sized(self.connection)

    @property
    def bounded(self) -> bool:
        """Whether it is known to be linear, so that errors in what it takes have a bound."""
        return self._sized is not None

    def backward(self, t: int, grad: np.ndarray) -> np.ndarray:
        """What dL/do(t-1) gets of dL/d(the sum) of step t, [B, ...]."""
        return _product(self.connection, self.before[t], grad) if t > 0 else np.zeros_like(grad)

    def magnitudes(self, t: int, error: np.ndarray) -> np.ndarray:
        """What dL/do(t-1) is off where dL/d(the sum) of step t is off by that much, [B, ...]."""
        if self._sized is None:
            return np.full_like(error, np.inf)
        # An infinite error would be NaN where a weight is 0.
        finite = np.where(np.isfinite(error), error, 0.0)
        if t == 0 or not np.isfinite(error).all():
            return np.zeros_like(error) if t == 0 else np.full_like(error, np.inf)
        return np.abs(_product(self._sized, self.before[t], finite))

    def parameters(self, grads: np.ndarray) -> dict[str, np.ndarray]:
        """Gradients of its parameters as "connection.<name>", from dL/d(the sum) of all steps, [T, B, ...]."""
        return self._of_parameters(self.connection, self.before, grads)

    def parameter_bounds(self, grads: np.ndarray, errors: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
        """What these may be off where dL/d(the sum) is off by `errors`: that, and what their sum rounds.

        Args:
            dtype: in which they were computed.
        """
        assert self._sized is not None
        if not np.isfinite(errors).all():
            return {name: np.full_like(size, np.inf) for name, size in self.parameters(grads).items()}
        sizes, off = (self._of_parameters(self._sized, self.before.abs(), np.abs(a)) for a in (grads, errors))
        unit = torch.finfo(dtype).eps / 2 * (grads.size**0.5 + 16)
        return {name: off[name] + unit * size for name, size in sizes.items()}

    def _of_parameters(self, module: nn.Module, before: Tensor, grads: np.ndarray) -> dict[str, np.ndarray]:
        named = dict(module.named_parameters())
        if not named:
            return {}
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        for t in range(0 if self.from_start else 1, len(before)):
            with torch.enable_grad():
                back = module(before[t])
            found = torch.autograd.grad(back, list(named.values()), _like(grads[t], back), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                total[name] += 0 if gradient is None else gradient
        return {f"connection.{name}": gradient.numpy() for name, gradient in total.items()}


def _like(grad: np.ndarray, back: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(grad, dtype=np.float64)).reshape(back.shape)


def _product(module: nn.Module, at: Tensor, grad: np.ndarray) -> np.ndarray:
    point = at.clone().requires_grad_()
    with torch.enable_grad():
        back = module(point)
    if not back.requires_grad:
        return np.zeros_like(grad)
    (found,) = torch.autograd.grad(back, point, _like(grad, back), allow_unused=True)
    return np.zeros_like(grad) if found is None else np.asarray(found.numpy())


def _sized(connection: nn.Module) -> nn.Module | None:
    """The connection with the magnitudes of its weights; None where it is not known to be linear."""
    if not all(type(m) in _LINEAR or type(m).__name__ in _LINEAR_NAMES for m in connection.modules()):
        return None
    sized = copy.deepcopy(connection)
    with torch.no_grad():
        for parameter in sized.parameters():
            parameter.abs_()
    return sized
