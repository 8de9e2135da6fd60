"""libdevice for Triton's interpreter, which has none: the same functions, computed by NumPy.

Kernels rendered for the device "cpu" import it, in a process started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def _pointwise(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(block: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        # In float64 and rounded: NumPy's own float32 functions are up to 4 ulp off.
        data = block.handle.data
        result = function(data.astype(np.float64)).astype(data.dtype)
        return tl.core.tensor(TensorHandle(result, block.handle.dtype), block.type)

    return call


class libdevice:
    """The functions of `triton.language.extra.libdevice` that the renderer uses."""

    exp = staticmethod(_pointwise(np.exp))
    log = staticmethod(_pointwise(np.log))
    tanh = staticmethod(_pointwise(np.tanh))
    trunc = staticmethod(_pointwise(np.trunc))
    rint = staticmethod(_pointwise(np.rint))
