"""The step built from a `NeuronSpec`: one function per `form`, the order of a framework's operations.

A form is a row of `FORMS`: which choices it can compute, and `step(spec, p, x, *states) -> output, *new_states` in
ordinary torch operations. `p` holds the values in the equations (raw forms applied) by parameter name, broadcastable
against x. Same operations in the same order as the source, so outputs, states and gradients are bit-identical to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tracetorch.core.forms.brainpy import BRAINPY
from tracetorch.core.forms.form import Form
from tracetorch.core.forms.native import NATIVE
from tracetorch.core.forms.norse import NORSE
from tracetorch.core.forms.sinabs import SINABS
from tracetorch.core.forms.snntorch import SNNTORCH
from tracetorch.core.forms.spikingjelly import SPIKINGJELLY
from tracetorch.core.raw import COMPUTED
from tracetorch.core.spec import NeuronSpec, SpecError

FORMS: Mapping[str, Form] = MappingProxyType({**SNNTORCH, **SINABS, **NATIVE, **SPIKINGJELLY, **NORSE, **BRAINPY})

# Fields whose rare choices a form computes only if it names them.
ONLY_BY_NAME: Mapping[str, tuple[object, ...]] = {"spike_test": ("membrane",), "inhibition": ("none",)}


def check_form(spec: NeuronSpec) -> Form:
    """The form of a spec, after checking that it can compute every choice of the spec.

    Raises:
        SpecError: no such form, or a choice or parameter that it does not compute; names the field and its value.
    """
    if spec.form not in FORMS:
        raise SpecError(f"form={spec.form!r} is not known; known: {', '.join(FORMS)}")
    form = FORMS[spec.form]
    for name, allowed in {**ONLY_BY_NAME, **form.choices}.items():
        value = getattr(spec, name)
        if value not in allowed:
            raise SpecError(
                f"{name}={value!r} cannot be computed in the form {spec.form!r}; it can: "
                f"{', '.join(repr(a) for a in allowed)}"
            )
    if spec.state_levels is not None and not form.rounds:
        able = ", ".join(name for name, other in FORMS.items() if other.rounds)
        raise SpecError(f"state_levels: the form {spec.form!r} does not round its states; these do: {able}")
    for name, parameter in spec.parameters.items():
        known = form.takes.get(name, COMPUTED)
        if parameter.raw not in known:
            raise SpecError(
                f"{name}: the raw form {parameter.raw!r} is not computed in the form {spec.form!r}; it has: "
                f"{', '.join(known)}"
            )
    unused = [name for name in spec.parameters if name not in form.parameters]
    if unused:
        raise SpecError(f"parameters {unused} have no place in the form {spec.form!r}")
    if spec.spike_count != "none" and spec.surrogate is None:
        raise SpecError(f"surrogate=None: the form {spec.form!r} needs a surrogate gradient for its spikes")
    if form.check is not None:
        form.check(spec)
    return form
