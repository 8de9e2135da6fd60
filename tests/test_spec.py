"""`NeuronSpec` and `Parameter`: what is refused, by name; what is kept, exactly; what hostile JSON can do."""

import copy
import dataclasses
import json
import math
import pickle
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests import naive
from tracetorch.core.spec import CHOICES, PARAMETERS, RAW_FORMS, NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import SURROGATES, Surrogate


def lif(**changes):
    return naive.lif_spec(0.9, 1.0, ("single", None), norm_input=False, dtype=np.float32, **changes)


def with_parameters(spec, **changes):
    """The fields of a spec with parameters added, or with None taken away."""
    parameters = {**spec.parameters, **changes}
    return {name: p for name, p in parameters.items() if p is not None}


ONE = naive.parameter(1.0)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", sorted(CHOICES))
@pytest.mark.parametrize("choice", ["", "nonsense", None, 0, True])
def test_unknown_choices(field, choice):
    with pytest.raises(SpecError, match=f"{field}={choice!r}"):
        lif().replace(**{field: choice})


@pytest.mark.parametrize("field", sorted(CHOICES))
def test_every_choice_is_explained_and_accepted_by_some_spec(field):
    for choice, meaning in CHOICES[field].items():
        assert isinstance(meaning, str)
        assert meaning
        assert getattr(consistent({field: choice}), field) == choice


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"form": ""}, "form=''"),
        ({"form": None}, "form=None"),
        ({"form": 3}, "form=3"),
        ({"surrogate": "atan"}, "surrogate='atan'"),
        ({"spike_count": "none"}, "output='spikes' contradicts spike_count='none'"),
        ({"output": "membrane"}, "output='membrane' contradicts spike_count='single'"),
        ({"output": "membrane", "spike_count": "none", "surrogate": None}, "reset"),
        ({"output": "membrane", "spike_count": "none", "reset": "none"}, "surrogate"),
        ({"reset": "none", "reset_amount": "threshold_over_decay"}, "reset_amount='threshold_over_decay'"),
        ({"reset": "none", "reset_amount": "value"}, "reset_amount='value'"),
        ({"spike_count": "multiple", "comparison": ">"}, "comparison='>'"),
        ({"spike_count": "limited", "max_spikes": 2, "comparison": ">"}, "comparison='>'"),
        ({"spike_count": "limited"}, "max_spikes=None"),
        ({"spike_count": "limited", "max_spikes": 0}, "max_spikes=0"),
        ({"spike_count": "limited", "max_spikes": -1}, "max_spikes=-1"),
        ({"spike_count": "limited", "max_spikes": 2.0}, "max_spikes=2.0"),
        ({"spike_count": "limited", "max_spikes": True}, "max_spikes=True"),
        ({"max_spikes": 2}, "max_spikes=2"),
        ({"refractory": "hold"}, "refractory_steps=None"),
        ({"refractory": "hold", "refractory_steps": 0}, "refractory_steps=0"),
        ({"refractory": "hold", "refractory_steps": 1.5}, "refractory_steps=1.5"),
        ({"refractory_steps": 3}, "refractory_steps=3"),
        ({"dt": 1.0}, "time_unit=None"),
        ({"time_unit": "ms"}, "dt=None"),
        ({"dt": 0.0, "time_unit": "ms"}, "dt=0.0"),
        ({"dt": -1.0, "time_unit": "ms"}, "dt=-1.0"),
        ({"dt": math.nan, "time_unit": "ms"}, "dt=nan"),
        ({"dt": math.inf, "time_unit": "ms"}, "dt=inf"),
    ],
)
def test_contradictions_name_the_field_and_its_value(changes, named):
    with pytest.raises(SpecError) as error:
        lif().replace(**changes)
    assert named in str(error.value)


def test_a_reset_by_threshold_over_decay_needs_a_decay():
    kept = with_parameters(lif(), mem_decay=None)
    with pytest.raises(SpecError, match="threshold_over_decay"):
        lif().replace(decay="none", reset_amount="threshold_over_decay", parameters=kept)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, "mem_decay"),
        ({}, "threshold"),
        ({"synapse": "add_then_decay"}, "syn_decay"),
        ({"synapse": "moving_average"}, "syn_decay"),
        ({"input_gain": "value"}, "input_gain"),
        ({"reset_amount": "value"}, "reset_amount"),
        ({"reset": "value"}, "reset_value"),
        ({"reset": "add_value"}, "reset_value"),
        ({"initial_state": "reset_value"}, "reset_value"),
        ({"clamp": "after_reset"}, "min_v_mem"),
    ],
)
def test_missing_parameters_are_named(changes, missing):
    spec = lif()
    with pytest.raises(SpecError, match=f"'{missing}' is missing"):
        spec.replace(**changes, parameters=with_parameters(spec, **{missing: None}))
    spec.replace(**changes, parameters=with_parameters(spec, **{missing: ONE}))


@pytest.mark.parametrize("unused", ["syn_decay", "input_gain", "reset_amount", "reset_value", "min_v_mem"])
def test_parameters_without_a_part_are_named(unused):
    with pytest.raises(SpecError, match=f"'{unused}' has no part"):
        lif().replace(parameters=with_parameters(lif(), **{unused: ONE}))


@pytest.mark.parametrize("unused", ["threshold", "bias", "spike_scale"])
def test_parameters_of_spikes_have_no_part_without_spikes(unused):
    silent = {"output": "membrane", "spike_count": "none", "reset": "none", "surrogate": None}
    kept = with_parameters(lif(), threshold=None)
    lif().replace(**silent, parameters=kept)
    with pytest.raises(SpecError, match=f"'{unused}' has no part"):
        lif().replace(**silent, parameters={**kept, unused: ONE})


def test_a_decay_has_no_part_without_a_decay():
    with pytest.raises(SpecError, match="'mem_decay' has no part"):
        lif().replace(decay="none")
    lif().replace(decay="none", parameters=with_parameters(lif(), mem_decay=None))


def test_unknown_parameters_are_named():
    with pytest.raises(SpecError, match="tau_ref"):
        lif().replace(parameters=with_parameters(lif(), tau_ref=ONE))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float16(1), "float16"),
        (1, "int64"),
        (True, "bool"),
        (1 + 2j, "complex128"),
        ("0.5", "U3"),
        (None, "object"),
        (np.array(1.0, dtype=">f4"), ">f4"),
        (np.float32(np.nan), "finite"),
        (np.float32(np.inf), "finite"),
        (np.array([1.0, -np.inf]), "finite"),
        (np.zeros((0,)), "empty"),
        (np.zeros((3, 0), np.float32), "empty"),
    ],
)
def test_values_that_are_no_parameter(value, named):
    with pytest.raises(SpecError, match=named):
        Parameter(np.asarray(value))


def test_an_unknown_raw_form_is_named():
    with pytest.raises(SpecError, match="'log'"):
        Parameter(np.float32(1), raw="log")
    for raw in RAW_FORMS:
        assert Parameter(np.float32(1), raw=raw).raw == raw


@pytest.mark.parametrize("value", ["yes", "no", None, []])
def test_learnable_is_a_truth_value(value):
    """`learnable="no"` must not come to mean True."""
    with pytest.raises(SpecError, match="learnable"):
        Parameter(np.float32(1), learnable=value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dt": "1", "time_unit": "ms"}, "dt='1'"),
        ({"dt": True, "time_unit": "ms"}, "dt=True"),
        ({"dt": 1.0, "time_unit": 3}, "time_unit=3"),
        ({"threshold_gradient": "no"}, "threshold_gradient='no'"),
        ({"threshold_gradient": None}, "threshold_gradient=None"),
        ({"reset": []}, r"reset=\[\]"),
        ({"parameters": None}, "parameters"),
        ({"parameters": {"mem_decay": 0.9, "threshold": ONE}}, "mem_decay"),
        ({"parameters": {"mem_decay": np.float32(0.9), "threshold": ONE}}, "mem_decay"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_types_are_refused_by_name(changes, named):
    with pytest.raises(SpecError, match=named):
        lif().replace(**changes)


@pytest.mark.parametrize("raw", ["exp_dt_tau", "one_minus_dt_rate"])
def test_a_raw_form_with_a_time_step_needs_one(raw):
    """exp(-dt / raw) with dt=None is no number."""
    parameters = with_parameters(lif(), mem_decay=naive.parameter(5.0, raw=raw))
    with pytest.raises(SpecError, match="dt"):
        lif().replace(parameters=parameters)
    assert lif().replace(parameters=parameters, dt=1.0, time_unit="ms").dt == 1.0


# ---- immutability ---------------------------------------------------------------------------------------------------


def test_a_spec_is_frozen():
    spec = lif()
    for field in dataclasses.fields(spec):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(spec, field.name, getattr(spec, field.name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.parameters["threshold"].learnable = True
    with pytest.raises(TypeError):
        spec.parameters["threshold"] = ONE
    with pytest.raises(TypeError):
        del spec.parameters["threshold"]


def test_the_numbers_of_a_parameter_are_read_only_and_its_own():
    mine = np.array([0.1, 0.2, 0.3], dtype=np.float32)
    parameter = Parameter(mine)
    with pytest.raises(ValueError, match="read-only"):
        parameter.value[0] = 5
    mine[0] = 7
    assert parameter.value[0] == np.float32(0.1)
    assert not np.shares_memory(mine, parameter.value)
    assert mine.flags.writeable, "the caller's array stays writable"


def test_the_caller_s_dictionary_is_not_aliased():
    mine = {"mem_decay": ONE, "threshold": ONE}
    spec = NeuronSpec(form="x", parameters=mine)
    mine["bias"] = ONE
    del mine["threshold"]
    assert list(spec.parameters) == ["mem_decay", "threshold"]


def test_replace_validates_and_leaves_the_original():
    spec = lif()
    other = spec.replace(comparison=">")
    assert (spec.comparison, other.comparison) == (">=", ">")
    with pytest.raises(SpecError):
        spec.replace(comparison="=>")
    with pytest.raises(TypeError):
        spec.replace(nothing=1)


# ---- exact JSON -----------------------------------------------------------------------------------------------------

SINGLE = [0.1, 1 / 3, -0.0, 0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, 16777217.0, 0.30000001192092896]
DOUBLE = [0.1, 1 / 3, -0.0, 5e-324, -5e-324, 2.2250738585072011e-308, 1.7976931348623157e308, 1 + 2**-52]


def bits(array):
    return str(array.dtype), array.shape, array.tobytes()


@pytest.mark.parametrize(("numbers", "dtype"), [(SINGLE, np.float32), (DOUBLE, np.float64)])
@pytest.mark.parametrize("shape", [(), (1,), (-1,), (-1, 1), (1, -1, 1)])
def test_json_keeps_every_bit(numbers, dtype, shape):
    array = np.array(numbers[0], dtype) if shape in ((), (1,)) else np.array(numbers, dtype)
    array = array.reshape(shape)
    parameter = Parameter(array, True, "exp_tau")
    spec = lif().replace(parameters=with_parameters(lif(), mem_decay=parameter, bias=Parameter(-array)))
    back = NeuronSpec.from_json(spec.to_json())
    assert bits(back.parameters["mem_decay"].value) == bits(array)
    assert bits(back.parameters["bias"].value) == bits(-array)
    assert (back.parameters["mem_decay"].learnable, back.parameters["mem_decay"].raw) == (True, "exp_tau")
    assert back == spec
    assert back.to_json() == spec.to_json()


def finite(dtype, low=None, high=None):
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
    if "decay" not in choices or chosen["reset_amount"] == "threshold_over_decay":
        chosen["decay"] = "geometric"
    names = {
        "mem_decay": chosen["decay"] == "geometric",
        "syn_decay": chosen["synapse"] != "none",
        "input_gain": chosen["input_gain"] == "value",
        "threshold": spiking,
        "reset_amount": chosen["reset_amount"] == "value",
        "reset_value": chosen["reset"] in ("value", "add_value") or chosen["initial_state"] == "reset_value",
        "min_v_mem": chosen["clamp"] != "none",
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


@QUICK
@hypothesis.given(specs())
def test_any_valid_spec_survives_json(spec):
    text = spec.to_json()
    back = NeuronSpec.from_json(text)
    assert back == spec
    assert hash(back) == hash(spec)
    assert back.to_json() == text
    assert back.differences(spec) == {}
    for name, parameter in spec.parameters.items():
        assert bits(back.parameters[name].value) == bits(parameter.value)
    assert list(back.parameters) == list(spec.parameters)
    assert NeuronSpec.from_dict(json.loads(text)) == spec
    printed = str(spec)
    assert str(back) == printed
    assert all(name in printed for name in (*CHOICES, *spec.parameters))


@QUICK
@hypothesis.given(specs(), st.data())
def test_any_single_change_is_another_spec_or_is_refused(spec, data):
    """Equality misses no field."""
    field = data.draw(st.sampled_from([*CHOICES, "form", "threshold_gradient", "parameters"]))
    if field == "parameters":
        hypothesis.assume(spec.parameters)
        name = data.draw(st.sampled_from(sorted(spec.parameters)))
        old = spec.parameters[name]
        change = data.draw(st.sampled_from(["learnable", "raw", "value", "shape", "dtype"]))
        value, other = old.value, {"learnable": old.learnable, "raw": old.raw}
        if change == "learnable":
            other["learnable"] = not old.learnable
        elif change == "raw":
            other["raw"] = "clamped" if old.raw != "clamped" else "value"
        elif change == "value":
            value = np.nextafter(old.value, old.value.dtype.type(0)) if old.value.all() else old.value + 1
        elif change == "shape":
            value = old.value[None]
        else:
            single = np.dtype(np.float32)
            hypothesis.assume(np.abs(old.value).max() < 1e38)
            value = old.value.astype(np.float64 if old.value.dtype == single else single)
        changed = Parameter(value, **other)
        assert changed != old
        assert spec.replace(parameters={**spec.parameters, name: changed}) != spec
        return
    old = getattr(spec, field)
    if field == "form":
        new = old + "x"
    elif field == "threshold_gradient":
        new = not old
    else:
        new = data.draw(st.sampled_from(sorted(set(CHOICES[field]) - {old})))
    try:
        changed = spec.replace(**{field: new})
    except SpecError:
        return
    assert changed != spec
    if field != "form":
        assert changed.differences(spec) == {field: (new, old)}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))])
def test_a_spec_can_be_copied_and_pickled(duplicate):
    """It is kept by modules, which are."""
    spec = lif()
    assert duplicate(spec) == spec
    assert duplicate(spec.parameters["threshold"]) == spec.parameters["threshold"]
    with pytest.raises(ValueError, match="read-only"):
        duplicate(spec.parameters["threshold"]).value[...] = 5


# ---- hash and equality ----------------------------------------------------------------------------------------------


def test_equal_parameters_have_equal_hashes():
    """The contract of `hash`; 0.0 and -0.0 compare equal as floats do, so they must not differ in hash, or must differ
    in both."""
    pairs = [
        (Parameter(np.float32(0.1)), Parameter(np.array(0.1, np.float32))),
        (Parameter(np.float32(0.0)), Parameter(np.float32(-0.0))),
        (Parameter(np.array([1.0, 2.0])), Parameter(np.array([1.0, 2.0, 9.0])[:2])),
        (Parameter(np.array([[1.0, 2.0], [3.0, 4.0]])), Parameter(np.array([[1.0, 3.0], [2.0, 4.0]]).T)),
    ]
    for a, b in pairs:
        assert a != b or hash(a) == hash(b), (a, b)
    assert pairs[0][0] == pairs[0][1]
    assert pairs[2][0] == pairs[2][1]
    assert pairs[3][0] == pairs[3][1]


def test_equal_specs_have_equal_hashes():
    base = lif()
    for a, b in (
        (lif(), lif()),
        (base.replace(dt=1, time_unit="ms"), base.replace(dt=1.0, time_unit="ms")),
        (
            base.replace(parameters=with_parameters(base, bias=naive.parameter(0.0))),
            base.replace(parameters=with_parameters(base, bias=naive.parameter(-0.0))),
        ),
        (
            base.replace(surrogate=Surrogate("atan")),
            base.replace(surrogate=Surrogate("atan", (("alpha", 2),))),
        ),
    ):
        assert a != b or hash(a) == hash(b)
    assert len({lif(), lif(), lif(comparison=">")}) == 2


def test_other_types_are_not_equal():
    assert lif() != "NeuronSpec"
    assert lif().parameters["threshold"] != 1.0
    assert Parameter(np.float32(1)) != Parameter(np.float64(1))
    assert Parameter(np.float32(1)) != Parameter(np.ones(1, np.float32))
    assert Parameter(np.float32(1), learnable=True) != Parameter(np.float32(1))
    assert Parameter(np.float32(1), raw="clamped") != Parameter(np.float32(1))


def test_the_order_of_parameters_does_not_matter():
    a = NeuronSpec(form="x", parameters={"mem_decay": ONE, "threshold": ONE})
    b = NeuronSpec(form="x", parameters={"threshold": ONE, "mem_decay": ONE})
    assert a == b
    assert a.to_json() == b.to_json()
    assert hash(a) == hash(b)


# ---- derived, printed -----------------------------------------------------------------------------------------------


def test_an_adaptive_threshold_needs_both_of_its_parameters():
    for name in ("adapt_decay", "adapt_scale"):
        with pytest.raises(SpecError, match="'adapt_decay' and 'adapt_scale'"):
            lif().replace(parameters=with_parameters(lif(), **{name: ONE}))
    both = lif().replace(parameters=with_parameters(lif(), adapt_decay=ONE, adapt_scale=ONE))
    assert both.adaptive
    assert both.states == ("v_mem", "adaptation")
    assert not lif().adaptive


def test_states_and_storage():
    assert lif().states == ("v_mem",)
    assert lif(syn=0.5).states == ("i_syn", "v_mem")
    assert not lif().stores_before_reset
    assert naive.leaky_spec(0.9, 1.0).stores_before_reset
    assert not naive.leaky_spec(0.9, 1.0, delay=False).stores_before_reset
    assert not naive.leaky_spec(0.9, 1.0, reset="none").stores_before_reset


def test_a_spec_is_readable_when_printed():
    text = str(
        naive.leaky_spec(np.float32(0.9), np.array([0.5, 1.5]), dtype=np.float32, raw="clamped").replace(
            dt=0.5, time_unit="ms"
        )
    )
    lines = text.splitlines()
    assert "snntorch.Leaky" in lines[0]
    for expected in ("next_step_after_decay", "atan(alpha=2)", "0.5", "ms", "learnable", "0.899999976", "0.5 .. 1.5"):
        assert expected in text, expected
    assert "shape [2]" in text
    assert RAW_FORMS["clamped"] in text
    assert "object at 0x" not in text
    assert all(len(line) < 200 for line in lines)
    for field in CHOICES:
        assert sum(line.split()[0] == field for line in lines[1:]) == 1, field


def test_differences_name_fields_and_values():
    spec = naive.leaky_spec(0.9, 1.0)
    other = spec.replace(comparison=">=", form="other", surrogate=None)
    assert spec.differences(other) == {"comparison": (">", ">="), "surrogate": (Surrogate("atan"), None)}
    assert spec.differences(spec) == {}


# ---- hostile JSON ---------------------------------------------------------------------------------------------------


def changed(path, value):
    data = json.loads(naive.leaky_spec(0.9, [1.0, 2.0]).to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


HUGE = 10**400
NOT_A_NUMBER = [
    None,
    "0.5",
    "nan",
    [],
    {},
    {"a": 1},
    [[1.0], [2.0, 3.0]],
    [None],
    ["1.0"],
    math.nan,
    math.inf,
    HUGE,
    [HUGE],
]


@pytest.mark.parametrize("value", [*NOT_A_NUMBER, True, [True], 1e39], ids=lambda value: f"{value!r:.12}")
def test_a_parameter_of_anything_but_numbers(value):
    data = changed(("parameters", "threshold", "value"), value)
    data["parameters"]["threshold"]["dtype"] = "float32"
    with pytest.raises(SpecError):
        NeuronSpec.from_dict(data)


@pytest.mark.parametrize("value", [*NOT_A_NUMBER, True], ids=lambda value: f"{value!r:.12}")
def test_a_surrogate_parameter_of_anything_but_a_number(value):
    with pytest.raises(SpecError):
        NeuronSpec.from_dict(changed(("surrogate", "parameters", "alpha"), value))


@pytest.mark.parametrize(
    "value", ["1", math.nan, math.inf, HUGE, [], {}, True, -1, 0], ids=lambda value: f"{value!r:.12}"
)
def test_a_time_step_of_anything_but_a_number_above_0(value):
    data = changed(("dt",), value)
    data["time_unit"] = "ms"
    with pytest.raises(SpecError):
        NeuronSpec.from_dict(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("version",), "1"),
        (("version",), None),
        (("form",), []),
        (("form",), ""),
        (("reset",), []),
        (("reset",), {"a": 1}),
        (("reset",), None),
        (("max_spikes",), 2),
        (("max_spikes",), "2"),
        (("threshold_gradient",), "true"),
        (("threshold_gradient",), 1),
        (("threshold_gradient",), None),
        (("parameters",), None),
        (("parameters",), []),
        (("parameters",), "threshold"),
        (("parameters",), {"threshold": None}),
        (("parameters",), {"threshold": []}),
        (("parameters", "evil"), {"value": 1.0, "dtype": "float32", "learnable": False, "raw": "value"}),
        (("parameters", "threshold", "evil"), 1),
        (("parameters", "threshold", "dtype"), "float16"),
        (("parameters", "threshold", "dtype"), "object"),
        (("parameters", "threshold", "dtype"), []),
        (("parameters", "threshold", "learnable"), 1),
        (("parameters", "threshold", "learnable"), "false"),
        (("parameters", "threshold", "raw"), "exec"),
        (("parameters", "threshold", "raw"), []),
        (("surrogate",), "atan"),
        (("surrogate",), []),
        (("surrogate",), 3),
        (("surrogate", "name"), "os.system"),
        (("surrogate", "name"), []),
        (("surrogate", "name"), None),
        (("surrogate", "parameters"), None),
        (("surrogate", "parameters"), [["alpha", 2.0]]),
        (("surrogate", "parameters", "evil"), 1.0),
        (("surrogate", "evil"), 1),
        (("evil",), 1),
        (("time_unit",), "ms"),
        (("time_unit",), []),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_a_changed_file_is_refused(path, value):
    with pytest.raises(SpecError):
        NeuronSpec.from_dict(changed(path, value))


def test_a_file_with_a_field_less_is_refused():
    data = json.loads(naive.leaky_spec(0.9, 1.0).to_json())
    for place in (data, data["parameters"]["threshold"], data["surrogate"]):
        for name in list(place):
            value = place.pop(name)
            with pytest.raises(SpecError):
                NeuronSpec.from_dict(data)
            place[name] = value
    assert NeuronSpec.from_dict(data) == naive.leaky_spec(0.9, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '"text"',
        "{",
        "{}",
        '{"version": 1}',
        "\x00",
        "NaN",
        "1" * 5000,
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=lambda text: f"{text!r:.12}",
)
def test_text_that_is_no_spec_is_refused(text):
    with pytest.raises(SpecError):
        NeuronSpec.from_json(text)


def test_random_damage_gives_a_spec_or_a_spec_error():
    """Bytes changed, cut or doubled in a valid text: never another exception, never a warning."""
    generator = random.Random(0)
    text = naive.leaky_spec(0.9, [1.0, 2.0], raw="clamped").to_json()
    letters = text + '0123456789eE+-.,:"[]{}ntfNI \\'
    refused = 0
    for _ in range(3000):
        damaged = list(text)
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(len(damaged))
            kind = generator.randrange(3)
            if kind == 0:
                damaged[place] = generator.choice(letters)
            elif kind == 1:
                del damaged[place]
            else:
                damaged.insert(place, generator.choice(letters))
        try:
            NeuronSpec.from_json("".join(damaged))
        except SpecError:
            refused += 1
    assert refused > 2000


@QUICK
@hypothesis.given(specs(), st.data())
def test_a_foreign_value_anywhere_gives_a_spec_or_a_spec_error(spec, data):
    foreign = data.draw(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        )
    )
    place = json.loads(spec.to_json())
    root = place
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = foreign
        break
    try:
        back = NeuronSpec.from_dict(root)
    except SpecError:
        return
    assert NeuronSpec.from_json(back.to_json()) == back, "what was accepted can be written and read again"
    hash(back), str(back)
