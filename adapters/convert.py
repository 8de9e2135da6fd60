"""Converting one layer or a whole network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tracetorch.adapters.base import Building, ConversionError, parameters
from tracetorch.adapters.conversion import Conversion, sequence
from tracetorch.adapters.networks import stepping
from tracetorch.adapters.networks.driving import DRIVERS
from tracetorch.adapters.networks.keeping import kept
from tracetorch.adapters.networks.modules import evaluated
from tracetorch.adapters.networks.network import Network, preserved
from tracetorch.adapters.networks.recorded import Recorded, check_other_shape
from tracetorch.adapters.networks.recording import NoGraph
from tracetorch.adapters.networks.sources import read
from tracetorch.adapters.networks.stepping import AsItStands
from tracetorch.adapters.networks.tying import tie
from tracetorch.adapters.networks.writing import Order, refuse_states, write
from tracetorch.adapters.registry import adapter, adapter_of, is_brainstate
from tracetorch.adapters.report import Agreement, LayerRow, Report
from tracetorch.core.spec import NeuronSpec


def spec(layer: Any, dt: float | None = None) -> NeuronSpec:
    """The semantics of one neuron layer of any supported framework.

    Args:
        layer: an instance; nothing of it is changed.
        dt: time step, for frameworks whose neurons do not hold one (brainpy; in the unit of tau).

    Raises:
        SpecError: not a neuron layer known here, or an option that cannot be read; names it.
    """
    return adapter_of(layer).spec(layer, dt)


def build(spec: NeuronSpec, framework: str, stock: bool = False) -> Any:
    """A new neuron layer of a framework that computes a spec.

    Args:
        spec: what it shall compute.
        framework: "tracetorch", "snntorch", "sinabs", "spikingjelly", "norse" or "brainpy". The layer is called as that
            framework's are; `adapters.JaxStage` runs one of brainpy in torch, and a `Pipeline` any.
        stock: only parts of the framework itself; without it, callables and small subclasses of ours fill the gaps.

    Raises:
        ConversionError: the framework cannot express it; names field, value and remedy.
        ValueError, ImportError: an unknown or missing framework.
        TypeError: no spec.
    """
    if not isinstance(spec, NeuronSpec):
        raise TypeError(f"build: spec is {type(spec).__name__}; give a NeuronSpec, such as adapters.spec(layer)")
    building = Building("(one layer)", framework, stock)
    if spec.spike_count != "none" and spec.surrogate is None:
        why = "a layer that spikes has a surrogate gradient, and which one is not said"
        raise building.impossible("surrogate", None, why, "spec.replace(surrogate=Surrogate('zero')) for no gradient")
    made: Any = adapter(framework).build(spec, building)
    return made.to_jax() if framework == "brainpy" else made


def _check_precision(network: Network, xs: Tensor) -> None:
    """torch promotes: a parameter of one precision and an input of another compute in neither's."""
    for stage in network.stages:
        if stage.neuron:
            stage.spec()  # or the refusal of a class or option that cannot be read
        tensors = parameters(stage.adapter, stage.inner) if stage.neuron else dict(stage.inner.named_parameters())
        for name, tensor in tensors.items():
            if tensor.ndim and tensor.is_floating_point() and tensor.dtype is not xs.dtype:
                raise ConversionError(
                    f"{stage.name!r}",
                    name,
                    tensor.dtype,
                    f"the sample is {xs.dtype}",
                    f"net.to({xs.dtype}), or a sample of the parameters' dtype",
                )


def _refuse(rows: Sequence[LayerRow], approximate: bool, gradients: bool) -> None:
    for row in rows:
        if row.forward == "approximate" and not approximate:
            raise ConversionError(
                f"{row.name!r}",
                "forward",
                "approximate",
                f"measured on the sample: {row.reason}",
                "allow_approximate=True",
            )
        if gradients and row.gradient in ("differs", "none"):
            raise ConversionError(
                f"{row.name!r}",
                "gradient",
                row.gradient,
                f"require_gradients=True, but {row.reason}",
                "stock=False, another target, or require_gradients=False",
            )


def convert(
    net: Any,
    to: str,
    sample: Any,
    *,
    time_dim: int | None = None,
    dt: float | None = None,
    stock: bool = False,
    share_weights: bool = False,
    require_gradients: bool = False,
    allow_approximate: bool = False,
) -> Conversion:
    """Port a whole network to another framework, and measure on a sample what stayed the same.

    The source is detected, and left as it was, hidden states included. It is an `nn.Sequential` of stateless torch
    modules and neurons, or a module with a forward of its own: one step per call with states hidden or handed in and
    out, a loop over time, or whole sequences (sinabs, some layers of snnTorch). The latter is read from what it does
    with the sample. Where no graph holds what its forward does, the target runs that forward itself
    (`Conversion.stepped`).

    Args:
        net: the source network.
        to: "tracetorch", "snntorch", "sinabs" or "brainpy".
        sample: what `net`'s forward takes, float32 or float64; with many steps and spikes, it proves more.
        time_dim: `None`: a source called step by step takes one step [B, ...]; a sinabs source takes [B, T, ...].
            Otherwise the sample's time dimension: a source called step by step is then run over it.
        dt: time step of a source of brainpy, in the unit of its tau; unused by the others.
        stock: only parts of the target framework itself, no callables or subclasses of ours.
        share_weights: the target's parameters are the source's own tensors, not copies.
        require_gradients: also refuse a layer whose gradient would differ.
        allow_approximate: return the nearest network where a choice cannot be carried; its rows say what differs.

    Returns:
        A `Conversion`: `model`, `report`, `run`, `verify`.

    Raises:
        ConversionError: what cannot be carried; names layer, field, value and remedy.
        ValueError, ImportError: an unknown or missing framework.
        TypeError: no network.
    """
    adapter(to)
    if not isinstance(net, nn.Module):
        if not is_brainstate(net):
            raise TypeError(f"convert: net is {type(net).__name__}; give a torch.nn.Module, or a module of brainstate")
        from tracetorch.adapters.brainpy.network import viewed

        net = viewed(net, dt, sample)
    with evaluated(net) as modal:
        conversion = _converted(net, sample, time_dim, Order(to, stock, share_weights, allow_approximate), modal)
    _restore_modes(conversion, modal)
    rows = conversion.agreement.rows
    _refuse(rows, allow_approximate, require_gradients)
    return conversion


def _restore_modes(conversion: Conversion, modal: frozenset[int]) -> None:
    """The target's dropout and batch norm in the modes that the source's have, around the steps too."""
    for mine, made in conversion.modules():
        if id(mine) in modal:
            made.training = True


def _converted(net: Any, sample: Any, time_dim: int | None, order: Order, modal: frozenset[int]) -> Conversion:
    """The conversion, measured; dropout and batch norm are in evaluation mode meanwhile."""
    try:
        with kept(net):
            network = read(net, sample, time_dim)
        if isinstance(network, Recorded) and network.plan is not None and network.plan.shared:
            if not adapter(order.to).STEPPED:
                raise _shared(network.plan.shared[0])
            network = stepping.of_graph(network, sample, time_dim)
    except NoGraph as refusal:
        if order.to not in DRIVERS:
            remedy = f"{refusal.remedy}; or to='tracetorch', which can run a forward as it stands"
            raise NoGraph(refusal.layer, refusal.field, refusal.value, refusal.why, remedy) from refusal
        return _stepped(net, sample, time_dim, order, modal, refusal)
    return _measured(network, sample, time_dim, order, modal)


def _shared(path: str) -> NoGraph:
    why = "two places of one step share one state, and a layer over whole sequences ends the first before the second"
    return NoGraph(f"{path!r}", "neuron", "used twice", why, "give each its own layer")


def _stepped(
    net: Any, sample: Any, time_dim: int | None, order: Order, modal: frozenset[int], refusal: NoGraph
) -> Conversion:
    """The network's own forward with the target's layers. Raises the refusal, and why this cannot be done either."""
    try:
        return _measured(stepping.read(net, sample, time_dim, refusal), sample, time_dim, order, modal)
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
        said = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
        why = f"{refusal.why}; and it cannot be run as it stands: {said}"
        raise NoGraph(refusal.layer, refusal.field, refusal.value, why, refusal.remedy) from error


def _measured(network: Network, sample: Any, time_dim: int | None, order: Order, modal: frozenset[int]) -> Conversion:
    """The target written, and both measured on the sample."""
    xs = sequence(network, sample, time_dim)
    _check_precision(network, xs)
    with preserved(network):
        target, notes = stepping.write(network, order) if isinstance(network, AsItStands) else write(network, order)
        refuse_states(network, target)
        tie(network, target, notes)
        empty = Report(network.framework, order.to, ())
        agreement = Agreement(network.framework, order.to, (), steps=0)
        conversion = Conversion(target.root, empty, agreement, network, target, notes, time_dim)
        conversion.agreement = conversion.verify(sample, modal=modal)
        check_other_shape(network, target, xs)
        if isinstance(network, AsItStands) and isinstance(target, AsItStands):
            stepping.check_second_call(network, target, xs)
    target.reset()
    remarks = (*conversion.agreement.remarks, *_outside(network, target))
    conversion.agreement = replace(conversion.agreement, remarks=remarks)
    conversion.report = Report(network.framework, order.to, conversion.agreement.rows, remarks)
    return conversion


def _outside(network: Network, target: Network) -> tuple[str, ...]:
    """What is said of parameters that a target over [B, T, ...], which is the steps alone, does not have."""
    if network.plan is None or target.style != "sequence":
        return ()
    parts = [part for part in (network.plan.before, network.plan.after) if part is not None]
    paths = dict.fromkeys(node.target for part in parts for node in part.nodes if node.kind in ("module", "tensor"))
    tensors = {path: list(module.parameters()) for path, module in network.plan.modules.items()}
    learnt = [path for path in paths if tensors.get(path, path in network.plan.tensors)]
    if not learnt:
        return ()
    return (f"around the steps, so in result.run as the source's own and not in result.model: {', '.join(learnt)}",)
