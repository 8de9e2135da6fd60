"""`NeuronSpec` and `Parameter`: what is refused, by name; immutable, hashable, readable."""

import dataclasses
import math

import numpy as np
import pytest

from tests import naive
from tests.specs import ONE, consistent, lif, with_parameters
from tracetorch.core.spec import CHOICES, RAW_FORMS, NeuronSpec, Parameter, SpecError
from tracetorch.functional.surrogates import Surrogate

# ---- refusals --------------------------------------------------------------------------------------------------------


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


# ---- immutability ----------------------------------------------------------------------------------------------------


def test_a_spec_is_frozen():
    spec = lif()
    for field in dataclasses.fields(spec):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(spec, field.name, getattr(spec, field.name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.parameters["threshold"].learnable = True
    with pytest.raises(TypeError, match="does not support item assignment"):
        spec.parameters["threshold"] = ONE
    with pytest.raises(TypeError, match="does not support item deletion"):
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
    with pytest.raises(SpecError, match="comparison='=>'"):
        spec.replace(comparison="=>")
    with pytest.raises(TypeError, match="nothing"):
        spec.replace(nothing=1)


# ---- hash and equality -----------------------------------------------------------------------------------------------


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


# ---- derived, printed ------------------------------------------------------------------------------------------------


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
