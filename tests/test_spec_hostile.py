"""Hostile JSON gives a spec or a `SpecError` that names the field, never another exception."""

import json
import math
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from tests import naive
from tests.specs import QUICK, changed, specs
from tracetorch.core.spec import NeuronSpec, SpecError

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
    with pytest.raises(SpecError, match=r"^not a parameter \("):
        NeuronSpec.from_dict(data)


@pytest.mark.parametrize("value", [*NOT_A_NUMBER, True], ids=lambda value: f"{value!r:.12}")
def test_a_surrogate_parameter_of_anything_but_a_number(value):
    with pytest.raises(SpecError, match=r"surrogate 'atan': alpha=.* is not a finite number"):
        NeuronSpec.from_dict(changed(("surrogate", "parameters", "alpha"), value))


@pytest.mark.parametrize(
    "value", ["1", math.nan, math.inf, HUGE, [], {}, True, -1, 0], ids=lambda value: f"{value!r:.12}"
)
def test_a_time_step_of_anything_but_a_number_above_0(value):
    data = changed(("dt",), value)
    data["time_unit"] = "ms"
    with pytest.raises(SpecError, match=r"^dt=.*must be a finite number above 0"):
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
    with pytest.raises(SpecError) as caught:
        NeuronSpec.from_dict(changed(path, value))
    said = str(caught.value)
    assert path[-1] in said or repr(value) in said or said.startswith(("not a NeuronSpec: ", "not a parameter ")), said


def test_a_file_with_a_field_less_is_refused():
    data = json.loads(naive.leaky_spec(0.9, 1.0).to_json())
    for place in (data, data["parameters"]["threshold"], data["surrogate"]):
        for name in list(place):
            value = place.pop(name)
            with pytest.raises(SpecError, match=name):
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
