"""Writes docs/semantics.md from the tables in the code: `python docs/make_tables.py`. A test fails if it is stale."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tracetorch import oracle
from tracetorch.core import spec as spec_module
from tracetorch.core.consistency import needed_parameters
from tracetorch.core.forms import FORMS, ONLY_BY_NAME, check_form
from tracetorch.core.raw import TIMED, from_raw
from tracetorch.core.spec import CHOICES, JSON_VERSION, PARAMETERS, RAW_FORMS, NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import SURROGATES, Surrogate
from tracetorch.oracle import alpha

PAGE = Path(__file__).with_name("semantics.md")

# The fields that are no choice among a few, and the parameters: what they mean.
OTHER_FIELDS = {
    "form": "the named order of operations in which the source computes the neuron (table below)",
    "max_spikes": 'with `spike_count="limited"`: the most spikes in one step',
    "refractory_steps": 'with `refractory="hold"`: how many steps the membrane is held; none with `refractory_time`',
    "state_levels": "the values that the states are rounded to in every step; none: they are not rounded",
    "surrogate": "the surrogate gradient with its parameters (table below); none where there are no spikes",
    "threshold_gradient": "whether the surrogate's gradient also reaches the threshold",
    "dt": "the time step, for sources whose time has a unit; none: time is in steps",
    "time_unit": "the unit of `dt`",
    "value_unit": "the unit of the membrane's numbers, where the source has one",
    "name": "the layer's own name, where the source has one; it is not compared",
    "parameters": "the parameters by name (table below)",
}
PARAMETER_MEANINGS = {
    "mem_decay": ("a", "decay of the membrane in one step: `beta`, `alpha`, or computed from `tau`"),
    "syn_decay": ("a_s", "decay of the synaptic current in one step"),
    "input_gain": ("b", 'gain of the input, with `input_gain="value"`'),
    "leak": ("leak", "where the membrane decays to"),
    "threshold": ("theta", "the membrane at which a spike fires"),
    "bias": ("bias", "added to the membrane in the spike test only"),
    "reset_amount": ("rho", 'what one spike subtracts, with `reset_amount="value"`'),
    "reset_value": ("reset_value", "where the membrane is set to, or what is added to it"),
    "min_v_mem": ("min_v_mem", "lower bound of the membrane"),
    "spike_scale": ("spike_scale", "size of one spike in the output"),
    "adapt_decay": ("adapt_decay", "decay of the adaptation `n` in one step, of an adaptive threshold"),
    "adapt_scale": ("adapt_scale", "what the threshold rises by for an adaptation of 1"),
    "resistance": ("resistance", 'factor of the input gain, with `input_gain="one_minus_decay"`'),
    "surrogate_scale": ("surrogate_scale", "the surrogate is a function of `(u - theta) / surrogate_scale`"),
    "refractory_time": ("refractory_time", 'how long the membrane is held, with `refractory="hold"`, in `time_unit`'),
    "initial_v": ("initial_v", 'the stored membrane before the first step, with `initial_state="zero"`'),
    "neg_threshold": ("neg_threshold", "threshold of the negative spikes, fired below minus it; makes spikes signed"),
    "neg_scale": ("neg_scale", "factor of the negative spikes; `spike_scale` is that of the positive ones"),
}

INTRODUCTION = """# What a neuron is here: the fields of `NeuronSpec`

<!-- Written by docs/make_tables.py from the tables in the code. Do not edit: change the code, then run it. -->

A `NeuronSpec` is a frozen record of every choice in which two frameworks' neurons can differ. `adapters.spec(layer)`
reads it from a layer of any supported framework; `print(spec)` shows it; `spec.differences(other)` lists the fields in
which two neurons differ. A record that contradicts itself cannot be built.

The record is made for more frameworks than this version reads. A choice is computed where some form (a table below)
has it as native operations and the float64 oracle has equations for it. "not yet": it can be written down, but not run.
"""
PARAMETERS_TEXT = """
Each is an array of float32 or float64, scalar or of any shape that broadcasts against the neurons, with its
trainability and its raw form.
"""
RAW_TEXT = """
What is stored and trained, and the value that it stands for. Converting keeps the raw form where the target has it;
else the gradient verdict is `reparametrised`.
"""
FORMS_TEXT = """
Two orders of the same operations round differently. So a spec keeps the order of its source, and the native layer
follows it to the bit.
"""
JSON_TEXT = """
`spec.to_json()` is one object with `version` ({version}) and all the fields above; `NeuronSpec.from_json` refuses a
missing or unknown field. Numbers are exact.
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what Markdown would read as markup is escaped, inline code left as it is."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _escaped(cell: str) -> str:
    parts = re.split("(`[^`]*`)", cell)
    plain = [part if part.startswith("`") else re.sub(r"([*_])", r"\\\1", part) for part in parts]
    return "".join(plain).replace("|", "\\|")


def code(value: object) -> str:
    """As inline code."""
    return f"`{value}`"


def _parameters(form: str, choice: Mapping[str, str], optional: Sequence[str]) -> dict[str, Parameter]:
    """The parameters that some choices need, and the optional ones given, in a raw form that the form reads."""
    needed, found = needed_parameters(choice), {}
    for name in PARAMETERS:
        if needed.get(name) or (name in optional and name in FORMS[form].parameters):
            raw = next(iter(FORMS[form].takes.get(name, {"value": None})))
            # A resetting value of 0, which every form has; a decay whose raw number lies in every raw form's range.
            number = 0.0 if name in ("reset_value", "leak") else 2.0 if raw == "one_minus_inverse_tau" else 0.5
            found[name] = Parameter(np.float32(number), raw=raw)
    return found


def _spec(form: str, choice: Mapping[str, str], optional: Sequence[str], surrogate: str) -> NeuronSpec | None:
    """A spec of these choices, or None where the form or the oracle does not compute it."""
    try:
        parameters = _parameters(form, choice, optional)
        timed = any(parameter.raw in TIMED for parameter in parameters.values())
        spec = NeuronSpec(
            form=form,
            max_spikes=2 if choice["spike_count"] == "limited" else None,
            refractory_steps=2 if choice["refractory"] == "hold" else None,
            surrogate=Surrogate(surrogate) if choice["spike_count"] != "none" else None,
            parameters=parameters,
            dt=1.0 if timed else None,
            time_unit="ms" if timed else None,
            **choice,  # type: ignore[arg-type]
        )
        check_form(spec)
        if not alpha.covers(spec) and not spec.adaptive:
            oracle.equations(spec)
    except (SpecError, oracle.OracleError):
        return None
    return spec


def _contradicts(choice: Mapping[str, str]) -> bool:
    """Whether no spec can have these choices together: asked first, since they are most of all combinations."""
    spiking, reset = choice["spike_count"] != "none", choice["reset"]
    if not spiking:
        return choice["output"] == "spikes" or reset != "none"
    return choice["output"] != "spikes" or (reset != "subtract" and choice["reset_amount"] != "threshold")


_OPTIONAL = (("bias", "spike_scale"), ("leak",), ("adapt_decay", "adapt_scale"), ())


def _specs(form: str) -> Iterator[NeuronSpec]:
    """Every combination of choices that a form accepts, with all the parameters that it needs."""
    allowed = {**ONLY_BY_NAME, **FORMS[form].choices}
    fields = {name: [c for c in choices if c in allowed.get(name, choices)] for name, choices in CHOICES.items()}
    options = [names for names in _OPTIONAL if set(names) <= set(FORMS[form].parameters) or names == _OPTIONAL[0]]
    for chosen in itertools.product(*fields.values()):
        choice = dict(zip(fields, chosen, strict=True))
        if _contradicts(choice):
            continue
        for optional, surrogate in itertools.product(options, ("atan", "logistic")):
            spec = _spec(form, choice, optional, surrogate)
            if spec is not None:
                yield spec
                break


def _has_effect(spec: NeuronSpec, field: str) -> bool:
    """Whether the field matters beside the spec's other choices."""
    if field in ("reset_amount", "reset_timing", "reset_gradient"):
        return spec.reset != "none" and (field != "reset_amount" or spec.reset == "subtract")
    return field != "comparison" or spec.spike_count != "none"


def computed() -> dict[tuple[str, str], list[str]]:
    """(field, choice) -> the forms that compute it."""
    found: dict[tuple[str, str], list[str]] = {}
    for form in FORMS:
        seen = {(name, getattr(spec, name)) for spec in _specs(form) for name in CHOICES if _has_effect(spec, name)}
        for key in seen:
            found.setdefault(key, []).append(form)
    return found


def _choices() -> str:
    forms = computed()
    defaults = {f.name: f.default for f in dataclasses.fields(NeuronSpec)}
    parts = []
    for name, choices in CHOICES.items():
        rows = []
        for choice, meaning in choices.items():
            own = forms.get((name, choice), [])
            star = " (default)" if choice == defaults[name] else ""
            rows.append([code(choice) + star, meaning, ", ".join(map(code, own)) or "not yet"])
        parts.append(f"### `{name}`\n\n{table(['choice', 'meaning', 'computed in'], rows)}")
    return "\n\n".join(parts)


def _computed_raw(name: str) -> str:
    try:
        from_raw(name, torch.tensor(0.5), dt=1.0)
    except NotImplementedError:
        return "not yet"
    return "yes"


def _forms() -> str:
    rows = []
    for name, form in FORMS.items():
        equation = inspect.getdoc(form.step) or ""
        rows.append([code(name), form.source, equation.splitlines()[0], ", ".join(map(code, form.parameters))])
    return table(["form", "taken from", "in this order", "parameters"], rows)


def _surrogates() -> str:
    rows = []
    for name, kind in SURROGATES.items():
        defaults = ", ".join(f"`{key}={value:g}`" for key, value in kind.defaults.items()) or "none"
        rows.append([code(name), defaults, (inspect.getdoc(kind.vjp) or "").splitlines()[0]])
    return table(["name", "parameters", "source and derivative"], rows)


def _check_complete(what: str, described: Mapping[str, object], names: set[str]) -> None:
    if set(described) != names:
        raise SystemExit(f"{what}: describe {sorted(names ^ set(described))} in {Path(__file__).name}")


def page() -> str:
    """The whole page."""
    fields = {f.name: f for f in dataclasses.fields(NeuronSpec)}
    _check_complete("fields", {**CHOICES, **OTHER_FIELDS}, set(fields))
    _check_complete("parameters", PARAMETER_MEANINGS, set(PARAMETERS))
    equations = (inspect.getdoc(spec_module) or "").split("\n\n", 1)[1]
    notation, _, formulas = equations.partition("\n\n")
    others = [[code(name), meaning] for name, meaning in OTHER_FIELDS.items()]
    parameters = [[code(name), code(symbol), meaning] for name, (symbol, meaning) in PARAMETER_MEANINGS.items()]
    raw = [[code(name), meaning, _computed_raw(name)] for name, meaning in RAW_FORMS.items()]
    formulas = "\n".join(line.removeprefix("    ") for line in formulas.splitlines())
    sections = [
        ("The equations", notation, f"```text\n{formulas}\n```"),
        ("Choices", "", _choices()),
        ("The other fields", "", table(["field", "meaning"], others)),
        ("Parameters", PARAMETERS_TEXT, table(["parameter", "in the equations", "meaning"], parameters)),
        ("Raw forms", RAW_TEXT, table(["raw form", "value in the equations", "computed"], raw)),
        ("Forms", FORMS_TEXT, _forms()),
        ("Surrogate gradients", "z = v - threshold. Defaults are the source framework's.", _surrogates()),
        ("As JSON", JSON_TEXT.format(version=JSON_VERSION), ""),
    ]
    parts = [INTRODUCTION, *(f"## {title}\n\n{text.strip()}\n\n{body}" for title, text, body in sections)]
    return "\n\n".join(part.strip() for part in parts).replace("\n\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
