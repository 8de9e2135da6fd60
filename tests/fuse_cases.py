"""Layers of every framework for the tests of `tt.fuse`, and how each is run over a sequence [T, B, N]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import norse.torch as no
import numpy as np
import snntorch as snn
import torch
from norse.torch.functional.izhikevich import tonic_spiking
from norse.torch.functional.reset import reset_subtract
from sinabs import activation as sa
from sinabs import layers as sl
from snntorch import surrogate as sg
from spikingjelly.activation_based import neuron as sn
from spikingjelly.activation_based import surrogate as ss
from torch import Tensor, nn


@dataclass(frozen=True)
class Run:
    """What a run left: outputs (one tensor, or all that the calls returned), and the states by name."""

    outputs: tuple[Tensor, ...]
    states: dict[str, Tensor]


def run_sinabs(layer: Any, xs: Tensor, state: Any) -> tuple[Run, Any]:
    ys = layer(xs.transpose(0, 1).contiguous())
    return Run((ys.transpose(0, 1),), dict(layer.named_buffers())), None


def run_squeeze(layer: Any, xs: Tensor, state: Any) -> tuple[Run, Any]:
    flat = xs.transpose(0, 1).flatten(0, 1)
    ys = layer(flat).unflatten(0, (xs.shape[1], xs.shape[0]))
    return Run((ys.transpose(0, 1),), dict(layer.named_buffers())), None


def run_snntorch(layer: Any, xs: Tensor, state: Any) -> tuple[Run, Any]:
    if hasattr(layer, "unroll"):
        results = layer.unroll(xs)
        outputs = results if isinstance(results, tuple) else (results,)
    else:
        each = [layer(x) for x in xs]
        each = [r if isinstance(r, tuple) else (r,) for r in each]
        outputs = tuple(torch.stack(series) for series in zip(*each, strict=True))
    names = [name for name in ("syn", "syn_exc", "syn_inh", "mem") if hasattr(layer, name)]
    return Run(outputs, {name: getattr(layer, name) for name in names}), None


def run_spikingjelly(layer: Any, xs: Tensor, state: Any) -> tuple[Run, Any]:
    ys = layer(xs)
    outputs = (ys, layer.v_seq) if layer.store_v_seq else (ys,)
    return Run(outputs, dict(layer._memories)), None


def run_cell(layer: Any, xs: Tensor, state: Any) -> tuple[Run, Any]:
    if hasattr(layer, "unroll"):
        ys, state = layer.unroll(xs, state=state)
    else:
        outputs = []
        for x in xs:
            y, state = layer(x, state)
            outputs.append(y)
        ys = torch.stack(outputs)
    return Run((ys,), state._asdict()), state


def run_norse(layer: Any, xs: Tensor, state: Any) -> tuple[Run, Any]:
    ys, state = layer(xs, state)
    if getattr(layer, "record_states", False):
        return Run((ys, *state), {}), type(state)(*(s[-1] for s in state))
    return Run((ys,), state._asdict()), state


def run_lift(layer: Any, xs: Tensor, state: Any) -> tuple[Run, Any]:
    ys, state = layer(xs if state is None else (xs, state))
    return Run((ys,), state._asdict()), state


Make = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Case:
    """A layer for N neurons, how it is run, the scale and offset of its input, and whether its output is spikes."""

    make: Make
    run: Callable[[Any, Tensor, Any], tuple[Run, Any]]
    scale: float = 1.0
    offset: float = 0.5
    spikes: bool = True
    exact: bool = True  # False: the step has an exp, which rounds in another way than torch's


def per_neuron(n: int, low: float = 0.5, high: float = 0.95) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return low + (high - low) * torch.rand(n, generator=generator)


def sinabs_lif(**options: Any) -> Case:
    # Quirk: sinabs (3.1.3) has one default threshold for all layers: a test that wrote to it would change it for good.
    own = {"tau_mem": 5.0, "norm_input": False}
    return Case(lambda n: sl.LIF(**{**own, "spike_threshold": torch.tensor(1.0), **options}), run_sinabs)


def leaky(**options: Any) -> Case:
    return Case(lambda n: snn.Leaky(**{"beta": 0.9, "init_hidden": True, **options}), run_snntorch)


def synaptic(**options: Any) -> Case:
    return Case(
        lambda n: snn.Synaptic(**{"alpha": 0.6, "beta": 0.8, "init_hidden": True, **options}), run_snntorch, 0.7, 0.2
    )


def node(cls: Any, exact: bool = True, **options: Any) -> Case:
    return Case(lambda n: cls(step_mode="m", **options), run_spikingjelly, 2.0, 1.0, exact=exact)


def norse(cls: Any, run: Any, scale: float = 10.0, offset: float = 6.0, spikes: bool = True, p: Any = None) -> Case:
    return Case(lambda n: cls() if p is None else cls(p(n)), run, scale, offset, spikes)


def box(n: int = 1, **options: Any) -> Any:
    fields = {name: torch.as_tensor(value) if isinstance(value, float) else value for name, value in options.items()}
    return no.LIFBoxParameters(**fields)


CASES: dict[str, Case] = {
    "sinabs.LIF": sinabs_lif(),
    "sinabs.LIF norm": Case(lambda n: sl.LIF(tau_mem=5.0), run_sinabs, 6.0, 4.0),
    "sinabs.LIF single": sinabs_lif(spike_fn=sa.SingleSpike),
    "sinabs.LIF max2": sinabs_lif(spike_fn=sa.MaxSpike(2), surrogate_grad_fn=sa.Heaviside(1.0)),
    "sinabs.LIF reset": sinabs_lif(reset_fn=sa.MembraneReset()),
    "sinabs.LIF reset value": sinabs_lif(spike_fn=sa.SingleSpike, reset_fn=sa.MembraneReset(0.125)),
    "sinabs.LIF subtract value": sinabs_lif(reset_fn=sa.MembraneSubtract(0.75)),
    "sinabs.LIF subtract tensor": sinabs_lif(reset_fn=sa.MembraneSubtract(torch.tensor(0.75))),
    "sinabs.LIF clamp": sinabs_lif(min_v_mem=-0.5, surrogate_grad_fn=sa.MultiGaussian()),
    "sinabs.LIF integer clamp": sinabs_lif(min_v_mem=-1, spike_threshold=torch.tensor(2)),
    "sinabs.LIF synapse": sinabs_lif(tau_syn=3.0, surrogate_grad_fn=sa.PeriodicExponential()),
    "sinabs.LIF alphas": sinabs_lif(tau_syn=3.0, train_alphas=True, surrogate_grad_fn=sa.Gaussian()),
    "sinabs.LIF per neuron": Case(
        lambda n: sl.LIF(tau_mem=per_neuron(n, 2, 9), tau_syn=per_neuron(n, 1, 3), spike_threshold=per_neuron(n)),
        run_sinabs,
        4.0,
    ),
    "sinabs.LIF no spikes": Case(lambda n: sl.LIF(tau_mem=5.0, spike_fn=None), run_sinabs, spikes=False),
    "sinabs.IAF": Case(lambda n: sl.IAF(), run_sinabs),
    "sinabs.IAF clamp": Case(lambda n: sl.IAF(min_v_mem=-1.0, tau_syn=torch.tensor(2.0)), run_sinabs),
    "sinabs.ExpLeak": Case(lambda n: sl.ExpLeak(tau_mem=5.0), run_sinabs, spikes=False),
    "sinabs.ALIF": Case(lambda n: sl.ALIF(tau_mem=5.0, tau_adapt=10.0), run_sinabs, 6.0, 4.0),
    "sinabs.ALIF multi": Case(
        lambda n: sl.ALIF(
            tau_mem=per_neuron(n, 3, 9),
            tau_adapt=torch.tensor(10.0),
            tau_syn=torch.tensor(3.0),
            train_alphas=True,
            spike_fn=sa.MultiSpike,
            reset_fn=sa.MembraneReset(),
            min_v_mem=-0.5,
            adapt_scale=torch.tensor(0.5),
        ),
        run_sinabs,
        6.0,
        4.0,
    ),
    "sinabs.LIFSqueeze": Case(lambda n: sl.LIFSqueeze(tau_mem=5.0, batch_size=2, norm_input=False), run_squeeze),
    "sinabs.IAFSqueeze": Case(lambda n: sl.IAFSqueeze(batch_size=2), run_squeeze),
    "snntorch.Leaky": leaky(init_hidden=False),
    "snntorch.Leaky hidden": leaky(),
    "snntorch.Leaky output": leaky(output=True, reset_mechanism="zero"),
    "snntorch.Leaky zero": leaky(reset_mechanism="zero", spike_grad=sg.fast_sigmoid()),
    "snntorch.Leaky none": leaky(reset_mechanism="none", spike_grad=sg.sigmoid(5)),
    "snntorch.Leaky no delay": leaky(reset_delay=False, threshold=1),
    "snntorch.Leaky zero no delay": leaky(reset_delay=False, reset_mechanism="zero", learn_threshold=True),
    "snntorch.Leaky graded": leaky(graded_spikes_factor=0.3, learn_graded_spikes_factor=True, reset_delay=False),
    "snntorch.Leaky straight through": leaky(spike_grad=sg.straight_through_estimator()),
    "snntorch.Leaky no surrogate": leaky(surrogate_disable=True),
    "snntorch.Leaky learned": Case(
        lambda n: snn.Leaky(
            beta=per_neuron(n), threshold=per_neuron(n), learn_beta=True, learn_threshold=True, init_hidden=True
        ),
        run_snntorch,
    ),
    "snntorch.Leaky double beta": leaky(beta=torch.tensor(0.9, dtype=torch.float64), threshold=np.float64(0.7)),
    "snntorch.Leaky integer thresholds": Case(
        lambda n: snn.Leaky(beta=0.9, threshold=1 + torch.arange(n) % 3, reset_delay=False, init_hidden=True),
        run_snntorch,
    ),
    "snntorch.Leaky quantised": leaky(state_quant=lambda mem: (mem * 8).round() / 8, reset_mechanism="zero"),
    "snntorch.Leaky clamped beta": leaky(beta=1.25, learn_beta=True, reset_mechanism="zero"),
    "snntorch.Synaptic": synaptic(init_hidden=False),
    "snntorch.Synaptic zero": synaptic(reset_mechanism="zero"),
    "snntorch.Synaptic none": synaptic(reset_mechanism="none"),
    "snntorch.Synaptic no delay": synaptic(reset_delay=False, learn_alpha=True, learn_beta=True, learn_threshold=True),
    "snntorch.Lapicque": Case(lambda n: snn.Lapicque(beta=0.9, init_hidden=True), run_snntorch, 9.0, 4.0),
    "snntorch.Alpha": Case(lambda n: snn.Alpha(alpha=0.9, beta=0.8, init_hidden=True), run_snntorch, 3.0, 2.0),
    "spikingjelly.LIFNode": node(sn.LIFNode),
    "spikingjelly.LIFNode soft": node(sn.LIFNode, v_reset=None, tau=3.0, detach_reset=True),
    "spikingjelly.LIFNode no decay": node(sn.LIFNode, decay_input=False, surrogate_function=ss.ATan()),
    "spikingjelly.LIFNode to 0.25": node(sn.LIFNode, v_reset=0.25, tau=1.5, surrogate_function=ss.PiecewiseQuadratic()),
    "spikingjelly.LIFNode own surrogate": node(sn.LIFNode, surrogate_function=ss.LeakyKReLU(), detach_reset=True),
    "spikingjelly.LIFNode v_seq": node(sn.LIFNode, store_v_seq=True, surrogate_function=ss.SoftSign()),
    "spikingjelly.IFNode": node(sn.IFNode),
    "spikingjelly.IFNode soft": node(sn.IFNode, v_reset=None, surrogate_function=ss.SuperSpike()),
    "spikingjelly.ParametricLIFNode": node(sn.ParametricLIFNode),
    "spikingjelly.ParametricLIFNode soft": node(
        sn.ParametricLIFNode, init_tau=3.0, v_reset=None, decay_input=False, surrogate_function=ss.ATan()
    ),
    "spikingjelly.QIFNode": node(sn.QIFNode),
    "spikingjelly.EIFNode": node(sn.EIFNode, exact=False),
    "spikingjelly.IzhikevichNode": node(sn.IzhikevichNode),
    "norse.LIF": norse(no.LIF, run_norse, 6.0, 2.0),
    "norse.LIF tanh": norse(
        no.LIF, run_norse, 6.0, 2.0, p=lambda n: no.LIFParameters(method="tanh", alpha=torch.tensor(2.0))
    ),
    "norse.LIF recorded": Case(lambda n: no.LIF(record_states=True), run_norse, 6.0, 2.0),
    "norse.LI": norse(no.LI, run_norse, spikes=False),
    "norse.LIFCell": norse(no.LIFCell, run_cell, 6.0, 2.0),
    "norse.LIFBoxCell": norse(no.LIFBoxCell, run_cell),
    "norse.LIFBoxCell subtract": norse(
        no.LIFBoxCell, run_cell, p=lambda n: box(reset_method=reset_subtract, method="triangle", alpha=0.3, v_leak=0.1)
    ),
    "norse.LIFBoxCell learned": norse(
        no.LIFBoxCell,
        run_cell,
        p=lambda n: box(
            tau_mem_inv=nn.Parameter(per_neuron(n, 50, 200)),
            v_th=nn.Parameter(torch.tensor(0.9)),
            v_reset=nn.Parameter(per_neuron(n, -0.1, 0.1)),
            method="circ",
            alpha=torch.tensor(1.0),
        ),
    ),
    "norse.IAFCell": norse(no.IAFCell, run_cell, 1.0, 0.3, p=lambda n: no.IAFParameters(v_reset=torch.tensor(0.0))),
    "norse.LICell": norse(no.LICell, run_cell, spikes=False),
    "norse.LIBoxCell": norse(no.LIBoxCell, run_cell, spikes=False),
    "norse.Lift": Case(lambda n: no.Lift(no.LIFBoxCell()), run_lift, 10.0, 6.0),
    "norse.LIFAdExCell": Case(lambda n: no.LIFAdExCell(), run_cell, 6.0, 2.0, exact=False),
    "norse.LIFExCell": Case(lambda n: no.LIFExCell(), run_cell, 6.0, 2.0, exact=False),
    "norse.IzhikevichCell": norse(no.IzhikevichCell, run_cell, 60.0, 30.0, p=lambda n: tonic_spiking),
}

# Beyond the classes that users meet first: tested in the long run only, each needs a kernel of its own.
LONG = frozenset(
    {
        "snntorch.Lapicque",
        "snntorch.Alpha",
        "snntorch.Leaky straight through",
        "spikingjelly.QIFNode",
        "spikingjelly.EIFNode",
        "spikingjelly.IzhikevichNode",
        "spikingjelly.LIFNode own surrogate",
        "norse.LIF tanh",
        "norse.LIFAdExCell",
        "norse.IzhikevichCell",
    }
)


class OwnSurrogate(nn.Module):
    """One state, a surrogate that is a module, a decay for each neuron."""

    def __init__(self, n=3):
        super().__init__()
        self.spike = ss.ATan()
        self.decay = nn.Parameter(torch.linspace(0.5, 0.9, n))

    def forward(self, x, v=None):
        v = torch.zeros_like(x) if v is None else v
        v = self.decay * v + x
        spikes = self.spike(v - 1.0)
        return spikes, v - spikes
