"""brainpy.state: `LIF`, `IF`, `LIFRef`, `ALIF` as source and target (brainpy 2.8.2, brainpy_state 0.1.0).

Equations, e = exp(-dt/tau), H(u) = [u >= 0], rho = V_th - V_reset, s' the spikes of the membrane left by the last step:

    soft:  V = V - rho*s'                  hard:  V = V - (stop(V) - V_reset)*s'
    V = e*V + (1 - e)*(V_rest + R*I)       s = H((V - V_th) / rho), its gradient that of spk_fun at that argument

`IF` is the same with V_rest = V_reset = 0: it does leak, with tau. `LIFRef` keeps V as its reset left it while
t - t_last < tau_ref, t the present time and t_last that of the last spike. `ALIF` has a = exp(-dt/tau_a)*(a + s') too,
and fires where V >= V_th + beta*a. A layer is one of brainpy's own, or a `JaxStage` around one; what is built is a
`JaxStage`, whose `to_jax()` is brainpy's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.brainpy.build import build
from tracetorch.adapters.brainpy.read import adaptation, attributes, neuron_of, spec
from tracetorch.adapters.jax.module import is_neuron as is_brainpy_neuron
from tracetorch.adapters.jax.stage import JaxStage
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.modules import chained as assemble

NAME = "brainpy"
STEPPED = False


def is_neuron(module: Any) -> bool:
    """A neuron of brainpy.state, or a `JaxStage` around one."""
    return is_brainpy_neuron(neuron_of(module))


def states(layer: JaxStage) -> tuple[str, ...]:
    """The membrane V; of some the adaptation a, or the time of the last spike and the number of steps."""
    return layer.state_names


def reset(layer: JaxStage) -> None:
    """Back to V_initializer."""
    layer.reset_states()


def trace(layer: JaxStage, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole sequence at once from the initial state, as one compiled scan.

    Of an `ALIF` the spec's own states: the membrane after its reset, and the adaptation after the step's spike.
    """
    layer.reset_states()
    return recorded(layer, xs)


def recorded(layer: JaxStage, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """As `trace`, going on from the present state."""
    outputs, kept = layer.trace(xs)
    if "a" not in kept:
        return outputs, {"v_mem": kept["V"]}
    return outputs, of_spec(layer, outputs, kept["V"], kept["a"])


def of_spec(layer: JaxStage, spikes: Tensor, v: Tensor, a: Tensor) -> dict[str, Tensor]:
    """The spec's states of an `ALIF` that has fired `spikes` and kept V and a; any shape."""
    named: Any = layer
    step = layer.step_length()
    assert step is not None
    v_th, v_reset = named.V_th, named.V_reset
    hard = neuron_of(layer).spk_reset == "hard"
    after = v - ((v.detach() if hard else v_th) - v_reset) * spikes
    lost = torch.from_numpy(adaptation({"tau_a": named.tau_a.detach().cpu().numpy()}, step)).to(a)
    return {"v_mem": after, "adaptation": lost * (a + spikes)}


def wrap(module: nn.Module) -> nn.Module:
    """Linear and elementwise modules as they are, others once per step."""
    return module if type(module) in known.TIMELESS else known.PerStep(module)


__all__ = [
    "NAME",
    "STEPPED",
    "assemble",
    "attributes",
    "build",
    "is_neuron",
    "recorded",
    "reset",
    "spec",
    "states",
    "trace",
    "wrap",
]
