"""What a framework's own class cannot do of a spec, as data; and the class of ours that can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from tracetorch.adapters.base import Building, value_of
from tracetorch.core.forms import FORMS, check_form
from tracetorch.core.spec import NeuronSpec, SpecError


@dataclass(frozen=True)
class Loss:
    """A choice that the framework's own class does not have.

    Attributes:
        field, value: of the spec.
        why: what the class has instead.
        gradient: whether only the gradient differs, and the forward pass is the same.
        remedy: what in the source would make it possible.
    """

    field: str
    value: object
    why: str
    gradient: bool = False
    remedy: str = "stock=False"


def neutral(spec: NeuronSpec, name: str, number: float) -> bool:
    """Whether a parameter is left out, or is this number and not learnable: then it has no part in the equations."""
    parameter = spec.parameters.get(name)
    return parameter is None or parameter.fixed_at(number)


def integrates(spec: NeuronSpec) -> bool:
    """Whether the membrane and its input are kept whole: no decay, or one of 1 that is not learned, and a gain of 1."""
    return spec.input_gain == "one" and neutral(spec, "mem_decay", 1.0)


def unneeded(spec: NeuronSpec) -> NeuronSpec:
    """The spec without parameters that have no part in the equations."""
    numbers = {"leak": 0.0, "bias": 0.0, "spike_scale": 1.0}
    numbers |= {"resistance": 1.0, "surrogate_scale": 1.0, "initial_v": 0.0}
    kept = {n: p for n, p in spec.parameters.items() if not (n in numbers and neutral(spec, n, numbers[n]))}
    start = "zero" if spec.initial_state == "leak" and "leak" not in kept else spec.initial_state
    return spec.replace(parameters=kept, initial_state=start)


def formed(spec: NeuronSpec, building: Building) -> NeuronSpec:
    """The spec in its own order of operations, or in another that computes it.

    Raises:
        ConversionError: there is none.
    """
    refusals = []
    for form in dict.fromkeys((spec.form, *FORMS)):
        for candidate in (spec, unneeded(spec)):
            try:
                if check_form(candidate.replace(form=form)).memory:
                    why = f"{building.framework} has no place for the time of the last spike"
                    raise building.impossible("refractory", spec.refractory, why, "to='tracetorch'")
            except SpecError as error:
                refusals.append(str(error))
            else:
                return candidate.replace(form=form)
    why = f"no order of operations known here computes it; its own does not, for {refusals[0]}"
    raise building.impossible("form", spec.form, why, "another source layer")


def common(spec: NeuronSpec, name: str) -> Iterator[Loss]:
    """What neither SpikingJelly's nor Norse's neurons have."""
    if spec.signed:
        yield Loss("neg_threshold", str(spec.parameters["neg_threshold"]), f"the spikes of {name} have one sign")
    for field, has in (("clamp", "no lower bound"), ("refractory", "no refractory time")):
        if getattr(spec, field) != "none":
            yield Loss(field, getattr(spec, field), f"{name} has {has}")
    if spec.state_levels is not None:
        yield Loss("state_levels", f"{len(spec.state_levels)} levels", f"{name} rounds no states")
    if spec.inhibition != "none":
        yield Loss("inhibition", spec.inhibition, f"{name} spikes by itself, whatever its neighbours do")
    if spec.spike_test != "membrane":
        yield Loss("spike_test", spec.spike_test, f"{name} spikes by its membrane")
    rare = (("resistance", 1.0), ("surrogate_scale", 1.0), ("initial_v", 0.0))
    for parameter, number in (("bias", 0.0), ("spike_scale", 1.0), *rare):
        if not neutral(spec, parameter, number):
            yield Loss(parameter, str(spec.parameters[parameter]), f"{name} has none")
    if "adapt_decay" in spec.parameters:
        yield Loss("adapt_scale", str(spec.parameters["adapt_scale"]), f"{name} has a fixed threshold")
    if spec.output == "spikes" and spec.spike_count != "single":
        yield Loss("spike_count", spec.spike_count, f"{name} emits one spike a step")
    if spec.reset == "add_value" and neutral(spec, "reset_value", 0.0):
        return
    if spec.reset not in ("none", "subtract", "value"):
        yield Loss("reset", spec.reset, f"{name} resets by subtraction or to a value")
    if spec.reset == "subtract" and spec.reset_amount != "threshold":
        yield Loss("reset_amount", spec.reset_amount, f"{name} subtracts its threshold")
    if spec.reset != "none" and spec.reset_timing not in ("same_step", "next_step_before_decay"):
        yield Loss("reset_timing", spec.reset_timing, f"{name} resets once, before the next decay")


def starts_at(spec: NeuronSpec) -> np.ndarray:
    """Where the membrane starts."""
    name = spec.initial_state
    return numbers(spec, name) if name != "zero" and name in spec.parameters else np.zeros(())


def numbers(spec: NeuronSpec, name: str) -> np.ndarray:
    """The value of a parameter in the equations."""
    return value_of(spec, name).detach().numpy()


def settle(
    losses: Iterable[Loss], building: Building, stock: Callable[[], nn.Module], ours: Callable[[], nn.Module]
) -> nn.Module:
    """The framework's own class where nothing is lost, else ours; with `building.stock` its own, or a refusal."""
    found = list(losses)
    if not found:
        return stock()
    if not building.stock:
        words = ", ".join(f"{loss.field}={loss.value!r}" for loss in found)
        building.note(found[0].field, f"custom class of tracetorch.adapters.{building.framework}: {words}")
        return ours()
    for loss in found:
        if loss.gradient:
            building.note(loss.field, loss.why, gradient="differs")
        else:
            building.cannot(loss.field, loss.value, loss.why, loss.remedy)
    return stock()
