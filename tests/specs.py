"""Specs for tests: one by hand, and any that is valid."""

import json

import hypothesis
import numpy as np
from hypothesis import strategies as st

from tests import naive
from tracetorch.core.consistency import needed_parameters
from tracetorch.core.spec import CHOICES, PARAMETERS, RAW_FORMS, NeuronSpec, Parameter
from tracetorch.functional.surrogates import SURROGATES, Surrogate


def lif(**changes):
    """A spec in float32 that fires one spike at a time."""
    return naive.lif_spec(0.9, 1.0, ("single", None), norm_input=False, dtype=np.float32, **changes)


def with_parameters(spec, **changes):
    """The fields of a spec with parameters added, or with None taken away."""
    parameters = {**spec.parameters, **changes}
    return {name: p for name, p in parameters.items() if p is not None}


ONE = naive.parameter(1.0)


def finite(dtype, low=None, high=None):
    """Finite numbers of a dtype."""
    width = 32 if dtype == np.float32 else 64
    return st.floats(low, high, allow_nan=False, allow_infinity=False, width=width)


@st.composite
def parameters(draw):
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 1, 1)]))
    size = int(np.prod(shape))
    numbers = draw(st.lists(finite(dtype), min_size=size, max_size=size))
    raw = draw(st.sampled_from(sorted(set(RAW_FORMS) - {"exp_dt_tau", "one_minus_dt_rate"})))
    return Parameter(np.array(numbers, dtype).reshape(shape), draw(st.booleans()), raw)


@st.composite
def surrogates(draw):
    name = draw(st.sampled_from(sorted(SURROGATES)))
    given_names = draw(st.sets(st.sampled_from(sorted(SURROGATES[name].defaults)))) if SURROGATES[name].defaults else ()
    return Surrogate(name, tuple((key, draw(finite(np.float64))) for key in sorted(given_names)))


def may_be_signed(chosen, extras):
    """Whether the equations of two signs say what happens with these choices."""
    if "adaptation" in extras or chosen["spike_count"] not in ("single", "smooth"):
        return False
    if chosen["spike_test"] != "membrane" or chosen["inhibition"] != "none":
        return False
    return chosen["reset"] == "none" or (chosen["reset"], chosen["reset_amount"]) == ("subtract", "threshold")


def consistent(choices, number=ONE, surrogate=None, extras=(), threshold_gradient=True):
    """A valid spec with these choices and, for the others, whatever goes with them."""
    chosen = {name: choices.get(name, next(iter(values))) for name, values in CHOICES.items()}
    if choices.get("output") == "membrane" or choices.get("spike_count") == "none":
        chosen |= {"output": "membrane", "spike_count": "none", "reset": "none", "reset_amount": "threshold"}
    elif chosen["spike_count"] == "none":
        chosen["spike_count"] = "single"
    spiking = chosen["spike_count"] != "none"
    if choices.get("reset_amount", "threshold") != "threshold" and spiking:
        chosen["reset"] = "subtract"
    if chosen["spike_count"] in ("multiple", "limited"):
        chosen["comparison"] = ">="
    if chosen["reset_timing"] == "same_step_residual" and chosen["inhibition"] != "none":
        extras = set(extras) - {"spike_scale"}
    if chosen["spike_count"] != "single":
        chosen |= {"spike_test": "membrane", "inhibition": "none"}
    if chosen["spike_test"] == "change" or chosen["clamp"] == "before_spikes":
        chosen |= {"reset": "none", "reset_amount": "threshold"}
    of_decay = chosen["reset_amount"] == "threshold_over_decay" or chosen["input_gain"].startswith("one_minus_decay")
    if "decay" not in choices or of_decay:
        chosen["decay"] = "geometric"
    names = {
        **needed_parameters(chosen),
        "leak": "leak" in extras,
        "bias": spiking and "bias" in extras,
        "spike_scale": spiking and "spike_scale" in extras,
        "adapt_decay": spiking and "adaptation" in extras,
        "adapt_scale": spiking and "adaptation" in extras,
        "neg_threshold": "signed" in extras and may_be_signed(chosen, extras),
        "neg_scale": "signed" in extras and may_be_signed(chosen, extras),
    }
    take = number if callable(number) else lambda name: number
    return NeuronSpec(
        form="of a test",
        max_spikes=3 if chosen["spike_count"] == "limited" else None,
        refractory_steps=2 if chosen["refractory"] == "hold" else None,
        surrogate=surrogate if spiking else None,
        threshold_gradient=threshold_gradient,
        parameters={name: take(name) for name in PARAMETERS if names.get(name)},
        **chosen,
    )


@st.composite
def specs(draw):
    choices = {name: draw(st.sampled_from(sorted(values))) for name, values in CHOICES.items()}
    spec = consistent(
        choices,
        number=lambda name: draw(parameters()),
        surrogate=draw(st.none() | surrogates()),
        extras=draw(st.sets(st.sampled_from(["leak", "bias", "spike_scale", "adaptation", "signed"]))),
        threshold_gradient=draw(st.booleans()),
    )
    time = draw(st.none() | st.tuples(finite(np.float64, 1e-9, 1e9), st.text(min_size=1)))
    changes = {} if time is None else {"dt": time[0], "time_unit": time[1]}
    levels = draw(st.none() | st.lists(finite(np.float64, -1e9, 1e9), min_size=1, max_size=5).map(tuple))
    return spec.replace(**changes, state_levels=levels, form=draw(st.text(min_size=1)))


QUICK = hypothesis.settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)


def changed(path, value):
    """The dictionary of a Leaky's spec with another value at a path of keys."""
    data = json.loads(naive.leaky_spec(0.9, [1.0, 2.0]).to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data
