"""The orders of operations of Norse's feed-forward neurons (norse 1.1.0)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tracetorch.core.forms.form import Form, Taken, Values
from tracetorch.core.spec import NeuronSpec, SpecError
from tracetorch.functional.spikes import heaviside


def _fire(spec: NeuronSpec, p: Values, v: Tensor) -> Tensor:
    assert spec.surrogate is not None
    threshold = p["threshold"]
    return heaviside(v - threshold, threshold, spec.surrogate, strict=spec.comparison == ">", v=v, dtype=v.dtype)


def _lif_box(spec: NeuronSpec, p: Values, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """v = v + k*(x + leak - v), k = dt/tau; z = H(v - theta); v = (1-z)*v + z*v_reset or (1-z)*v + z*(v - theta).

    IAFCell has v = v + x.
    """
    v = v + x if spec.decay == "none" else v + p["mem_decay"] * (x + p["leak"] - v)
    z = _fire(spec, p, v)
    after = v - p["threshold"] if spec.reset == "subtract" else p["reset_value"]
    return z, (1 - z) * v + z * after


def _lif(spec: NeuronSpec, p: Values, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """j = i + x; v = v + k*((leak - v) + j); i = j - k_s*j; z = H(v - theta); v = (1-z)*v + z*v_reset; LI without z."""
    *synapse, v = states
    drive = synapse[0] + x if synapse else x
    v = v + p["mem_decay"] * ((p["leak"] - v) + drive)
    kept = (drive + -p["syn_decay"] * drive,) if synapse else ()
    if spec.spike_count == "none":
        return (v, *kept, v)
    z = _fire(spec, p, v)
    return (z, *kept, (1 - z) * v + z * p["reset_value"])


def _check(spec: NeuronSpec) -> None:
    leak = spec.parameters.get("leak")
    if (spec.decay == "none") != (leak is None):
        raise SpecError(f"leak={leak}: in the form {spec.form!r} decay='geometric' needs a leak, decay='none' has none")
    if (spec.decay == "none") != (spec.input_gain == "one"):
        raise SpecError(
            f"input_gain={spec.input_gain!r}: in the form {spec.form!r} it is 'one' with decay='none', else "
            "'one_minus_decay'"
        )


_RATE: Mapping[str, Taken] = {"one_minus_dt_rate": lambda raw, dt: dt * raw}
_COMMON: Mapping[str, tuple[object, ...]] = {
    "reset_amount": ("threshold",),
    "reset_timing": ("same_step",),
    "reset_gradient": ("attached",),
    "clamp": ("none",),
    "refractory": ("none",),
}

NORSE: Mapping[str, Form] = {
    "norse.LIFBox": Form(
        _lif_box,
        {
            **_COMMON,
            "output": ("spikes",),
            "synapse": ("none",),
            "input_gain": ("one", "one_minus_decay"),
            "spike_count": ("single",),
            "reset": ("subtract", "value"),
        },
        ("mem_decay", "leak", "threshold", "reset_value"),
        "norse.torch.LIFBoxCell, IAFCell 1.1.0, functional/lif_box.py lif_box_feed_forward_step, functional/reset.py, "
        "functional/iaf.py iaf_feed_forward_step",
        {"mem_decay": _RATE},
        _check,
    ),
    "norse.LIF": Form(
        _lif,
        {
            **_COMMON,
            "decay": ("geometric",),
            "synapse": ("none", "read_then_decay"),
            "input_gain": ("one_minus_decay",),
            "spike_count": ("none", "single"),
            "reset": ("none", "value"),
        },
        ("mem_decay", "syn_decay", "leak", "threshold", "reset_value"),
        "norse.torch.LIFCell, LIF, LICell, LI, LIBoxCell 1.1.0, functional/lif.py lif_feed_forward_step, "
        "functional/leaky_integrator.py li_feed_forward_step, leaky_integrator_box.py li_box_feed_forward_step",
        {"mem_decay": _RATE, "syn_decay": _RATE},
        _check,
    ),
}
