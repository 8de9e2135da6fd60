"""Reading a network: as a chain where it is one, else from what it does with a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tracetorch.adapters.base import Adapter, ConversionError
from tracetorch.adapters.networks import chain, lifting, recurrent, rolling, steps, wholes
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks.graphs import Builder, Part, Plan
from tracetorch.adapters.networks.network import Network, Stage, preserved, refuse_hooks
from tracetorch.adapters.networks.recorded import frame_of, lengthened, network_of, tensors_of
from tracetorch.adapters.networks.recording import NoGraph, Tape, Unknown, leaves_of, record
from tracetorch.adapters.networks.sizes import generalised
from tracetorch.adapters.registry import ALONE, adapter, framework_of
from tracetorch.core.graph import Ref, Size, State, leaves, rewrite

# ---- from a recording to a network -----------------------------------------------------------------------------------


def read(net: nn.Module, sample: Any, time_dim: int | None) -> Network:
    """Read a network.

    Args:
        net: the source.
        sample: what its forward takes; with several arguments a tuple, the first of them the input.
        time_dim: of the sample, for a network that takes one step per call.

    Raises:
        ConversionError: what it does cannot be put into a graph; names what, where, and what would help.
    """
    refuse_pipeline(net)
    refuse_alone(net)
    if not chain.is_chain(net):
        return read_recorded(net, sample, time_dim)
    try:
        return chain.read(net)
    except ConversionError as error:
        if error.field not in ("module", "neuron", "init_hidden", "output"):
            raise
        try:
            return read_recorded(net, sample, time_dim)
        except NoGraph as other:
            if other.field == "sample":  # its neurons ran over something else than time: a module mixed it with that
                raise error from other
            raise
        except Exception as other:  # whatever running it on the sample may raise
            raise error from other


def refuse_alone(net: nn.Module) -> None:
    """Raises `ConversionError` for neurons of a framework of which this version converts layers, not networks."""
    for path, module in net.named_modules():
        name = framework_of(module)
        if name in ALONE:
            raise ConversionError(
                f"{path!r}",
                "framework",
                name,
                "whole networks of it are not read in this version",
                "convert its layers one by one: adapters.build(adapters.spec(layer), to); or tt.fuse for speed",
            )


def refuse_pipeline(net: nn.Module) -> None:
    """Raises `ConversionError` for a network with an `adapters.Pipeline`, which calls its stages itself."""
    from tracetorch.adapters.pipelines.pipeline import Pipeline

    for path, module in net.named_modules():
        if isinstance(module, Pipeline):
            inside = ", ".join(f"stages[{k}]: {type(stage.module).__name__}" for k, stage in enumerate(module.stages))
            why = f"its stages are called each in its own way, by the pipeline ({inside})"
            remedy = (
                "convert each stage, tt.convert(pipe.stages[0].module, to, sample) and so on, with a sample of what "
                "it receives; adapters.Pipeline of the results' models puts them together again"
            )
            raise ConversionError(f"{path!r}", "module", "Pipeline", why, remedy)


def neurons_of(net: nn.Module) -> tuple[str, list[nn.Module]]:
    """The framework of a network's neurons, and these, outermost first.

    Raises:
        ConversionError: none, or of several frameworks.
    """
    found = leaves_of(net, lambda module: framework_of(module) is not None)
    neurons = [module for module in found if framework_of(module) is not None]
    present = sorted({str(framework_of(module)) for module in neurons})
    if len(present) != 1:
        raise chain.not_one(present)
    return present[0], neurons


def read_recorded(net: nn.Module, sample: Any, time_dim: int | None) -> Network:
    """Read a network with a forward of its own."""
    framework, neurons = neurons_of(net)
    owner = wholes.owner_of(neurons, adapter(framework))
    for path, module in net.named_modules():
        refuse_hooks(module, path)
    recorder = _Recording(net, owner, neurons)
    args = sample if isinstance(sample, tuple) else (sample,)
    with preserved(recorder.network()):
        if not owner.STEPPED:
            plan, style = lifting.plan(recorder, args[0]), "loop"
        elif time_dim is not None:
            plan, style = recorder.steps(args, time_dim), "step"
        else:
            plan, style = recorder.loop(args)
        _refuse_timeless(plan)
        plan = replace(plan, remarks=(*plan.remarks, *recorder.of_one_mode()))
    return network_of(plan, net, framework, owner, style, tuple(args[1:]))


def _refuse_timeless(plan: Plan) -> None:
    """Raises `NoGraph` for an output of a step that no input has a part in: a sum of weights."""
    timeless: set[Any] = set()
    for node in plan.step.nodes:
        found = list(leaves((node.args, dict(node.kwargs))))
        timed = any(isinstance(leaf, (Ref, State, Size)) and leaf not in timeless for leaf in found)
        if not timed and node.name not in plan.neurons:
            timeless.add(Ref(node.name))
    for place in leaves(plan.step.output):
        if place in timeless:
            why = "an output of the step depends on nothing that it is given"
            raise NoGraph("''", "forward", place.name, why, "compute it outside the network")


class _Recording:
    """Records one network on samples of several shapes."""

    def __init__(self, net: nn.Module, owner: Adapter, neurons: Sequence[nn.Module]) -> None:
        self.net, self.owner, self.neurons = net, owner, list(neurons)
        known_neurons = {id(n) for n in neurons}
        self.leaves = leaves_of(net, lambda m: id(m) in known_neurons or known.is_known(m))
        # The arguments of the first recording, and what it did with them.
        self.first: tuple[Sequence[Any], list[Any]] | None = None

    def network(self) -> Network:
        """The neurons alone, for `preserved`."""
        stages = tuple(
            Stage(str(k), n, n, True, recurrent.adapter_of(n, self.owner)) for k, n in enumerate(self.neurons)
        )
        return Network(self.net, self.owner.NAME, self.owner, stages)

    def tape(self, args: Sequence[Any], fresh: bool = True) -> Any:
        """A recording, from the initial states unless `fresh` is false."""
        if fresh:
            for neuron in self.neurons:
                recurrent.adapter_of(neuron, self.owner).reset(neuron)
        with torch.no_grad():
            found = record(self.net, args, self.leaves)
        rolling.check(found)
        if self.first is None:
            self.first = args, calls_of(found)
        return found

    def of_one_mode(self) -> tuple[str, ...]:
        """What is said of a forward that makes other calls when the network's `training` is the other one."""
        if self.first is None:
            return ()
        args, calls = self.first
        inside = {id(part) for leaf in self.leaves for part in leaf.modules()}
        own = [module for module in self.net.modules() if id(module) not in inside]
        mode, other = ("training", "evaluation")[:: 1 if self.net.training else -1]
        for module in own:
            module.training = not module.training
        try:
            same = calls_of(self.tape(args)) == calls
        except (ConversionError, RuntimeError, ValueError, IndexError):  # chance, or what only the other mode does
            same = False
        finally:
            for module in own:
                module.training = not module.training
        if same:
            return ()
        return (f"its forward makes other calls in {other} mode: the target makes those of {mode} mode, in either",)

    def steps(self, args: Sequence[Any], time_dim: int) -> Plan:
        """One step per call: every step of the sample must make the same calls."""
        xs = args[0].movedim(time_dim, 0)
        plans = []
        for t, x in enumerate(xs):
            tape = self.tape((x, *args[1:]), fresh=t == 0)
            plans.append(steps.plan_of_step(Builder(self.net, self.neurons), tape))
            if plans[t].step != plans[0].step:
                raise NoGraph(
                    "''",
                    "forward",
                    f"step {t}",
                    "it makes other calls than step 0",
                    "the same calls in every step; what differs put outside the network",
                )
        return self.other_batch(plans[0], (xs[0], *args[1:]))

    def other_batch(self, plan: Plan, args: Sequence[Any]) -> Plan:
        """The same for another batch size."""
        wider = tuple(lengthened(value, {0: 1}) for value in args)
        try:
            tape = self.tape(wider)
        except (RuntimeError, IndexError, ValueError):
            return replace(plan, remarks=(_FIXED.format("batch size", len(args[0])),), other={0: 1})
        other = steps.plan_of_step(Builder(self.net, self.neurons), tape)
        merged = generalised(plan, other, {"step": (args[0].shape, wider[0].shape)})
        return replace(merged, other={0: 1, 1: 2})  # of [T, B, ...]

    def loop(self, args: Sequence[Any]) -> tuple[Plan, str]:
        """A forward that loops over time, or one call that is one step."""
        tape = self.tape(args)
        rolled = rolling.roll(tape, self.neurons)
        if rolled is None:
            plan = steps.plan_of_step(Builder(self.net, self.neurons), tape)
            return self.other_batch(plan, args), "step"
        if len(args) > 1:
            raise ConversionError(
                "''", "sample", f"{len(args)} arguments", "a forward with a loop takes its input alone", "one tensor"
            )
        plan = steps.plan_of_loop(Builder(self.net, self.neurons), rolled)
        carry = self.carries(args)
        return replace(self.other_length(plan, args[0]), carry=carry), "loop"

    def carries(self, args: Sequence[Any]) -> bool:
        """Whether a second call goes on from the states that the first one left.

        Where no state moved, what layers of the framework do unless they are told otherwise.
        """
        for neuron in self.neurons:
            recurrent.adapter_of(neuron, self.owner).reset(neuron)
        with torch.no_grad():
            first = [*tensors_of(self.net(*args)), *(state.clone() for state in self.states())]
            moved = any(bool(state.any()) for state in self.states())
            second = [*tensors_of(self.net(*args)), *self.states()]
        if not moved and not self.owner.STEPPED:
            return True
        return len(first) != len(second) or not all(map(torch.equal, first, second))

    def states(self) -> list[Tensor]:
        """What the neurons keep now."""
        kept = [getattr(n, name, None) for n in self.neurons for name in recurrent.adapter_of(n, self.owner).states(n)]
        return [state for state in kept if isinstance(state, Tensor)]

    def other_length(self, plan: Plan, x: Tensor) -> Plan:
        """The same for another batch size and number of steps."""
        axes: list[tuple[int, ...]] = [(0, 1), (0,), (1,)]
        if plan.before is None:
            cut = plan.cuts[0]
            axes = [(0,)] if cut is None else [(0, 1), (cut,)]
        for dims in axes:
            more = {dim: 1 + dim for dim in dims}
            longer = lengthened(x, more)
            try:
                tape = self.tape((longer,))
            except (RuntimeError, IndexError, ValueError, ConversionError):
                continue
            rolled = rolling.roll(tape, self.neurons)
            if rolled is None:
                continue
            other = steps.plan_of_loop(Builder(self.net, self.neurons), rolled)
            merged = generalised(plan, other, _shapes(plan, other, self.net, x, longer))
            constant = plan.steps == other.steps
            cut_short = constant or all(cut is None for cut in plan.cuts)
            remarks = () if len(dims) == 2 or plan.before is not None else _fixed(plan, x, dims)
            return replace(merged, steps=plan.steps if cut_short else None, remarks=remarks, other=more)
        return replace(plan, remarks=(_FIXED.format("shape of the input", tuple(x.shape)),))


def calls_of(tape: Tape) -> list[Any]:
    """What a recording calls, with what."""

    def known_value(leaf: Any) -> Any:
        return Unknown if isinstance(leaf, Unknown) else leaf

    return [(e.kind, e.target, *rewrite((e.args, e.kwargs), known_value)) for e in tape.events]


_FIXED = "the {} is a constant of the source: {}"


def _fixed(plan: Plan, x: Tensor, dims: tuple[int, ...]) -> tuple[str, ...]:
    if plan.cuts[0] is None:
        return ()
    batch = 1 - plan.cuts[0] if plan.cuts[0] in (0, 1) else 0
    return () if batch in dims else (_FIXED.format("batch size", x.shape[batch]),)


def _shapes(plan: Plan, other: Plan, net: nn.Module, *xs: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """The shapes of the first inputs of a plan's parts, for both inputs."""
    found: dict[str, list[torch.Size]] = {"before": [], "step": [], "after": []}
    for one, x in zip((plan, other), xs, strict=True):
        frame = frame_of(replace(one, step=Part(one.step.inputs, (), tuple(Ref(name) for name in one.step.inputs))))
        with torch.no_grad():
            first = frame.sequences(x)[0]
        found["before"].append(x.shape)
        found["step"].append(first.shape[1:])
        found["after"].append(first.shape[:2])
    return {name: (a, b) for name, (a, b) in found.items()}
