"""torch's operations as the tracer knows them."""

from __future__ import annotations

import torch

aten = torch.ops.aten

# aten operation -> graph operation with the same arguments
SAME = {
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.sign.default: "sign",
    aten.sgn.default: "sign",
    aten.reciprocal.default: "reciprocal",
    aten.sqrt.default: "sqrt",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.floor.default: "floor",
    aten.ceil.default: "ceil",
    aten.trunc.default: "trunc",
    aten.round.default: "round",
    aten.relu.default: "relu",
    aten.minimum.default: "minimum",
    aten.maximum.default: "maximum",
    aten.clamp_min.default: "maximum",
    aten.clamp_max.default: "minimum",
    aten.pow.Tensor_Scalar: "pow",
    aten.sigmoid_backward.default: "sigmoid_backward",
    aten.tanh_backward.default: "tanh_backward",
    aten.threshold_backward.default: "threshold_backward",
    aten.gt.Tensor: "gt",
    aten.gt.Scalar: "gt",
    aten.ge.Tensor: "ge",
    aten.ge.Scalar: "ge",
    aten.lt.Tensor: "lt",
    aten.lt.Scalar: "lt",
    aten.le.Tensor: "le",
    aten.le.Scalar: "le",
    aten.eq.Tensor: "eq",
    aten.eq.Scalar: "eq",
    aten.ne.Tensor: "ne",
    aten.ne.Scalar: "ne",
    aten.logical_and.default: "and",
    aten.logical_or.default: "or",
    aten.logical_not.default: "not",
    aten.bitwise_and.Tensor: "and",
    aten.bitwise_or.Tensor: "or",
    aten.bitwise_not.default: "not",
}
# Views and copies of a whole tensor: the value passes through.
IDENTITY = {
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
}
SINGLE = {
    aten.unbind.int,
    aten.stack.default,
    aten.cat.default,
    aten.select.int,
    aten.select_backward.default,
    aten.slice.Tensor,
    aten.slice_backward.default,
    aten.split.Tensor,
}
FILL = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
}
# In-place operations whose functional form has another overload's name.
FUNCTIONAL = {aten.pow_.Scalar: aten.pow.Tensor_Scalar}
# The operations that draw random numbers and are traced: each takes as many from [0, 1) as the input has elements.
DRAWS = {aten.rand_like.default: "draw", aten.bernoulli.default: "chance"}
# A tensor's value asked for by Python: an `if`, an `int()`, an `item()`.
VALUE = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default}
BITWISE = {aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default}
# What arithmetic is between two tensors of bool.
OF_BOOLS = {"add": "or", "maximum": "or", "mul": "and", "minimum": "and"}
DTYPES = (torch.float32, torch.float64, torch.bool)  # in which a kernel computes
