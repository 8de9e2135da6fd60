"""Docstrings of the composed layers: the equations and the arguments, from the same parts as the step."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracetorch.snn.composed import Parts, Slot

_FIRE = {
    "LI": ["output = {mem}"],
    "LIB": ["s = quant_fn(spike_fn({mem} - threshold + bias))", "{reset:s*threshold}", "output = s"],
    "LIT": [
        "p = quant_fn(spike_fn({mem} - pos_threshold + bias))",
        "n = -quant_fn(spike_fn(-neg_threshold - {mem} - bias))",
        "{reset:p*pos_threshold + n*neg_threshold}",
        "output = p + n",
    ],
}
_FIRE["LITS"] = [*_FIRE["LIT"][:-1], "output = p*pos_scale + n*neg_scale"]
_MEANING = {
    "alpha": "decay of the synapse in one step, in (0, 1)",
    "beta": "decay of the membrane in one step, in (0, 1)",
    "gamma": "decay of the recurrent trace in one step, in (0, 1)",
    "threshold": "above 0",
    "bias": "added to the membrane in the spike test only",
    "scale": "the size of an output event of this sign",
    "rec_weight": "what the recurrent trace adds to the membrane's input",
}


def _trace(parts: Parts, trace: str, decay: str, entered: str, average: bool) -> list[str]:
    lines = []
    for branch in parts.branches:
        part = {"": entered, "pos_": f"pos({entered})", "neg_": f"neg({entered})"}[branch]
        gain = f"(1 - {branch}{decay})*" if average else ""
        lines.append(f"{branch}{trace} = {branch}{decay}*{branch}{trace} + {gain}{part}")
    return lines


def equations(parts: Parts) -> list[str]:
    """One step, a line for each assignment; `pos(v)` is `where(v >= 0, v, 0)`, `neg(v)` is `where(v <= 0, v, 0)`."""

    def total(trace: str) -> str:
        return f"(pos_{trace} + neg_{trace})" if parts.dual else trace

    lines: list[str] = []
    x = "x"
    if parts.synapse:
        lines += _trace(parts, "syn", "alpha", "x", average=True)
        x = "syn"
    if parts.dual and parts.synapse:
        lines.append("syn = pos_syn + neg_syn")
    if parts.recurrent:
        lines += _trace(parts, "rec", "gamma", "prev_output", average=True)
        if parts.dual:
            lines.append("rec = pos_rec + neg_rec")
    for branch in parts.branches:
        part = {"": "{}", "pos_": "pos({})", "neg_": "neg({})"}[branch]
        entered = part.format(x)
        if parts.recurrent:
            entered += f" + {branch}rec_weight*{part.format('rec')}"
            entered = f"({entered})" if parts.ema else entered
        gain = f"(1 - {branch}beta)*" if parts.ema else ""
        lines.append(f"{branch}mem = {branch}beta*{branch}mem + {gain}{entered}")
    for line in _FIRE[parts.family]:
        if line.startswith("{reset:"):
            amount = line[len("{reset:") : -1]
            if parts.dual:
                lines += [f"{branch}mem = {branch}mem - ({amount})/2" for branch in parts.branches]
            else:
                signs = amount.split(" + ")
                lines.append(" - ".join(["mem = mem", *signs]))
        else:
            lines.append(line.replace("{mem}", total("mem")))
    return [*lines, "prev_output = output"] if parts.recurrent else lines


def _argument(slot: Slot) -> str:
    branch, _, rest = slot.name.partition("_")
    stem = rest if branch in ("pos", "neg") else slot.name
    sign = {"pos": "; of the positive branch", "neg": "; of the negative branch"}.get(branch, "")
    sign = sign.replace("branch", "events") if stem in ("threshold", "scale") else sign
    return f"{slot.name}: {_MEANING[stem]}{sign}; a scalar, or one per neuron."


def _wrapped(text: str, indent: int) -> str:
    pad = " " * indent
    return textwrap.fill(text, 118, initial_indent=pad, subsequent_indent=pad + ("    " if indent > 4 else ""))


def docstring(parts: Parts, said: str | None) -> str:
    """The docstring of a class: what its class statement says, then the equations, states, arguments and errors."""
    split = "pos(v) = where(v >= 0, v, 0) and neg(v) = where(v <= 0, v, 0). " if parts.dual else ""
    arguments = [
        "num_neurons: size of the input at `dim`.",
        *(_argument(slot) for slot in parts.slots),
        "dim: the feature dimension of the input.",
        "<name>_rank: 0 for one shared value, 1 for one per neuron.",
        "learn_<name>: whether `raw_<name>` is a parameter (else a buffer).",
    ]
    if parts.output.fires:
        arguments += [
            "spike_fn: from the distance to a threshold to a spike's size, elementwise, differentiable.",
            "quant_fn: what makes it discrete, such as `tt.functional.round_ste()`; None is `nn.Identity()`.",
        ]
    lines = [
        (said or "A combination of parts.").strip(),
        "",
        *(f"        {line}" for line in equations(parts)),
        "",
        _wrapped(f"{split}States, zero at the start, of the input's shape: {', '.join(parts.states)}.", 4),
        "    Decays are the sigmoid, thresholds the softplus, of what is stored (`raw_<name>`).",
        "",
        "    Args:",
        *(_wrapped(line, 8) for line in arguments),
        "",
        "    Raises:",
        "        ValueError: a value out of its range or of the wrong shape.",
        "    ",
    ]
    return "\n".join(lines)
