"""The seam between torch and JAX: arrays carried by DLPack, and a jitted JAX function as one node of torch's graph.

What is aliased and what is copied. JAX runs behind the caller's back, and a torch tensor can be written at any time: a
buffer that JAX still reads must not be handed out. So `run` waits until JAX has finished before it returns, and until
then nobody but JAX has the buffers. Under that condition a torch tensor enters without a copy where JAX can take it (a
contiguous, 64-byte aligned one; JAX itself copies any other), and a result leaves without one. What backward needs
stays as torch's own saved tensors: writing to an input or to a result in place between forward and backward is then
torch's usual error, and not a wrong gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import torch
import torch.utils.dlpack
from torch import Tensor

from tracetorch.adapters.stateful import SeamError
from tracetorch.core.once import first_only

DTYPES = (torch.float32, torch.float64)
FEW = 1024


def check(where: str, tensor: Tensor) -> None:
    """Raises `SeamError` unless JAX computes in the tensor's own dtype, on its device."""
    if tensor.dtype not in DTYPES:
        raise SeamError(f"{where}: dtype {tensor.dtype}; JAX stages take float32 or float64. Remedy: x.float()")
    if tensor.dtype is torch.float64 and not jax.config.jax_enable_x64:
        raise SeamError(
            f"{where}: dtype torch.float64, but JAX's x64 mode is off, in which it would compute in float32 without a "
            "word. Remedy: jax.config.update('jax_enable_x64', True) before JAX is first used, or x.float() and "
            "stage.float()"
        )
    kinds = _platforms()
    if tensor.device.type not in kinds:
        raise SeamError(
            f"{where}: device {tensor.device}; this JAX has: {', '.join(kinds)}. Remedy: move the data to one of "
            "these, or install JAX for that device"
        )


@functools.cache
def _platforms() -> tuple[str, ...]:
    """Device types of torch that JAX has here too."""
    names = {"cpu"}
    for torch_name, jax_name in (("cuda", "cuda"), ("xpu", "oneapi")):
        try:
            if jax.devices(jax_name):
                names.add(torch_name)
        except RuntimeError:  # no such backend
            continue
    return tuple(sorted(names))


def to_jax(tensor: Tensor) -> Any:
    """A tensor for JAX: the same memory where JAX can alias it, else one copy.

    A few numbers on the CPU go as a NumPy array, of which JAX makes its own copy: that takes 5 us, and DLPack 80 us.
    """
    if tensor.numel() <= FEW and tensor.device.type == "cpu":
        return tensor.detach().resolve_neg().numpy()
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def to_torch(array: Any) -> Tensor:
    """A finished JAX array as a tensor, the same memory. JAX must not use the array any more, but for reading."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor


def aliases(tensor: Tensor, array: Any) -> bool:
    """Whether the two share their memory."""
    return bool(tensor.data_ptr() == array.unsafe_buffer_pointer())


@dataclass
class Program:
    """A pure JAX function `function(*arrays) -> tuple of arrays`, compiled once for each set of shapes and dtypes.

    Args:
        function: traceable by JAX; every array it reads is an argument, but for constants that never change.
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        self._run = jax.jit(self.function)
        self._forward = jax.jit(self._with_vjp, static_argnums=0)
        self._backward = jax.jit(lambda pullback, gradients: pullback(gradients))

    def _with_vjp(self, wanted: tuple[bool, ...], *arrays: Any) -> Any:
        def of_wanted(*some: Any) -> Any:
            rest = iter(some)
            return self.function(*(next(rest) if want else a for a, want in zip(arrays, wanted, strict=True)))

        return jax.vjp(of_wanted, *(a for a, want in zip(arrays, wanted, strict=True) if want))

    def run(self, *tensors: Tensor, kept: Sequence[Any] = ()) -> tuple[Tensor, ...]:
        """The results, differentiable by torch where an argument requires a gradient.

        Args:
            tensors: the arguments.
            kept: what JAX has already of the first of them, such as a `Mirror`'s arrays.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            results: Any = _Call.apply(self, kept, *tensors)
            return tuple(results)
        arrays = [*kept, *(to_jax(tensor) for tensor in tensors[len(kept) :])]
        results = jax.block_until_ready(self._run(*arrays))
        return _own(tensors, kept, results)

    def forward(self, wanted: tuple[bool, ...], arrays: Sequence[Any]) -> Any:
        """Results and the pullback, finished."""
        return jax.block_until_ready(self._forward(wanted, *arrays))

    def backward(self, pullback: Any, gradients: tuple[Any, ...]) -> Any:
        """Gradients of the wanted arguments, finished."""
        return jax.block_until_ready(self._backward(pullback, gradients))


def _own(inputs: Sequence[Tensor], kept: Sequence[Any], arrays: Sequence[Any]) -> tuple[Tensor, ...]:
    """Results as tensors that share memory neither with an input, nor with what is kept of it, nor with each other."""
    taken = {tensor.data_ptr() for tensor in inputs if tensor.numel()}
    taken |= {array.unsafe_buffer_pointer() for array in kept if isinstance(array, jax.Array)}
    results = []
    for array in arrays:
        tensor = to_torch(array)
        if tensor.numel() and tensor.data_ptr() in taken:  # JAX hands an argument through, or one result twice
            tensor = tensor.clone()
        taken.add(tensor.data_ptr())
        results.append(tensor)
    return tuple(results)


class _Call(torch.autograd.Function):
    """One run of a `Program` as a node of torch's graph."""

    @staticmethod
    def forward(ctx: Any, program: Program, kept: Sequence[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        wanted = tuple(ctx.needs_input_grad[2:])
        given = [*kept, *(to_jax(tensor) for tensor in tensors[len(kept) :])]
        arrays, pullback = program.forward(wanted, given)
        results = _own(tensors, kept, arrays)
        leaves, ctx.tree = jax.tree_util.tree_flatten(pullback)
        known = {tensor.data_ptr(): tensor for tensor in (*tensors, *results) if tensor.numel()}
        # A residual that is an input or a result is saved as that very tensor, so that torch sees it written.
        saved = []
        for leaf in leaves:
            tensor = known.get(leaf.unsafe_buffer_pointer()) if leaf.size else None
            if tensor is None or tuple(tensor.shape) != leaf.shape or not tensor.is_contiguous():
                tensor = to_torch(leaf)
            saved.append(tensor)
        ctx.wanted, ctx.program, ctx.count = wanted, program, len(saved)
        ctx.save_for_backward(*saved, *tensors)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _Call.pulled_back(ctx, gradients)
        if not torch.is_grad_enabled():
            return (None, None, *found)
        tensors = ctx.saved_tensors[ctx.count :]
        return (None, None, *first_only("a JAX function in torch", found, [*tensors, *gradients]))

    @staticmethod
    def pulled_back(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors."""
        saved = ctx.saved_tensors
        leaves = [to_jax(tensor) for tensor in saved[: ctx.count]]
        pullback = jax.tree_util.tree_unflatten(ctx.tree, leaves)
        found = iter(_own((), (), ctx.program.backward(pullback, tuple(to_jax(g) for g in gradients))))
        return tuple(next(found) if want else None for want in ctx.wanted)
