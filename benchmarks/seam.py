"""The seam between torch and JAX: what a call costs, which copies are made, a dispatch a step against a scan."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.measure import medians, per_call, require_same, table


def _aligned(*shape: int) -> torch.Tensor:
    """Memory that JAX can take as it is: 64-byte aligned."""
    size = int(torch.Size(shape).numel())
    memory = torch.zeros(size + 16)
    start = (-memory.data_ptr() // 4) % 16
    return memory[start : start + size].reshape(shape).normal_()


def main() -> dict[str, Any]:
    """Microseconds a call; milliseconds a sequence; which crossings are copies. Empty without brainpy."""
    if find_spec("brainpy") is None:
        print("seam: brainpy is not installed")
        return {}
    torch.set_num_threads(1)
    found = {**_calls(), **_crossings(), **_sequences()}
    print(table("The torch-JAX seam", ("what", "value"), list(found.items())))
    return found


def _calls() -> dict[str, float]:
    import jax

    from tracetorch.adapters.jax.bridge import Program

    x = torch.zeros(2, 1, 4)
    leaf, program = x.clone().requires_grad_(), Program(lambda a: (a * 2.0,))
    alone, array = jax.jit(lambda a: a * 2.0), jax.numpy.zeros((2, 1, 4))
    runs = {
        "JAX's own jitted call, us": lambda: alone(array).block_until_ready(),
        "the same from torch, forward, us": lambda: program.run(x),
        "the same from torch, forward+backward, us": lambda: program.run(leaf)[0].sum().backward(),
    }
    return {name: 1e6 * per_call(run) for name, run in runs.items()}


def _crossings() -> dict[str, str]:
    import jax

    from tracetorch.adapters.jax import bridge as jax_bridge

    aligned, array = _aligned(64, 64), jax.numpy.ones((64, 64))
    odd = torch.randn(5000)[1:4097]
    word = {True: "no copy", False: "one copy"}
    return {
        "torch -> JAX, aligned": word[jax_bridge.aliases(aligned, jax_bridge.to_jax(aligned))],
        "torch -> JAX, not aligned": word[jax_bridge.aliases(odd, jax_bridge.to_jax(odd))],
        "JAX -> torch": word[jax_bridge.aliases(jax_bridge.to_torch(array), array)],
    }


def _sequences() -> dict[str, float]:
    """LIF, T=100, B=16, N=512, forward and backward: brainstate step by step, one scan, and the native twin."""
    import brainpy.state as bp
    import brainstate
    import brainunit as u

    import tracetorch as tt
    from tracetorch import adapters

    layer = bp.LIF(512, R=3.0 * u.ohm, tau=5.0 * u.ms)
    stage = adapters.JaxStage(layer, dt=1.0)
    native = tt.snn.SpecNeuron(adapters.spec(layer, dt=1.0))
    xs = torch.randn(100, 16, 512)
    require_same(stage(xs), native.unroll(xs), "brainpy.state.LIF against its native twin")
    layer.init_state(16)
    step = brainstate.transform.jit(lambda x: layer(x * u.mA))

    def stepwise() -> None:
        with torch.no_grad(), brainstate.environ.context(dt=1.0 * u.ms):
            for x in xs:
                step(x.numpy()).block_until_ready()

    def forward(module: Any) -> None:
        with torch.no_grad():
            tt.reset_states(module)
            module(xs) if module is stage else module.unroll(xs)

    leaf = xs.clone().requires_grad_()

    def both(module: Any) -> None:
        tt.reset_states(module)
        (module(leaf) if module is stage else module.unroll(leaf)).sum().backward()

    runs = {
        "a jitted call for every step, forward, ms": stepwise,
        "JaxStage, one scan, forward, ms": lambda: forward(stage),
        "native twin, forward, ms": lambda: forward(native),
        "JaxStage, one scan, forward+backward, ms": lambda: both(stage),
        "native twin, forward+backward, ms": lambda: both(native),
    }
    return {name: 1e3 * seconds for name, seconds in medians(runs, repeat=7).items()}
