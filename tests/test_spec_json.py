"""A `NeuronSpec` goes through JSON, copies and pickles with every bit; any single change is seen or refused."""

import copy
import json
import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.specs import QUICK, lif, specs, with_parameters
from tracetorch.core.spec import CHOICES, NeuronSpec, Parameter, SpecError

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
