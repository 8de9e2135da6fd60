"""What a function's code reads outside itself, by its bytecode, which every version of Python writes in its own way."""

import sys
import types

import pytest

import tracetorch as tt
from tests.layer_cases import assert_bits, noise
from tracetorch.fused import code_reads

GAIN, OTHER, TABLE = 0.5, 0.25, {"a": 1.0}
SETTINGS = types.ModuleType("settings_of_a_user")
SETTINGS.gain = 0.5
INNER = types.ModuleType("settings_of_a_user.inner")
INNER.leak = 0.5
SETTINGS.inner = INNER


class Config:
    gain = 0.5


def whole(x):
    return x * GAIN


def inside(x):
    def inner(y):
        return y * OTHER

    return inner(x)


def in_a_lambda(x):
    return (lambda y: y * OTHER)(x)


def in_comprehensions(x):
    return [x * GAIN for _ in range(3)], {x: OTHER}, sum(TABLE["a"] for _ in "ab")


def in_a_class(x):
    class Inner:
        gain = OTHER

    return Inner.gain * x


def through_an_attribute(x):
    return x * Config.gain * SETTINGS.gain


def through_a_call(x):
    return whole(x) + TABLE["a"]


def in_a_handler(x):
    try:
        return x * GAIN
    except ValueError:
        return OTHER


def by_a_match(x):
    match x:
        case Config.gain:
            return GAIN
        case _:
            return f"{OTHER}"


def imported(x):
    import settings_of_a_user

    return x * settings_of_a_user.gain


def imported_as(x):
    import settings_of_a_user.inner as inner

    return x * inner.leak


def imported_from(x):
    from settings_of_a_user import gain

    return x * gain


def through_two_modules(x):
    return x * SETTINGS.inner.leak


READS = {
    whole: {"GAIN"},
    inside: {"OTHER"},
    in_a_lambda: {"OTHER"},
    in_comprehensions: {"GAIN", "OTHER", "TABLE"},
    in_a_class: {"OTHER", "__name__"},
    through_an_attribute: {"Config", "SETTINGS", "gain"},
    through_a_call: {"whole", "TABLE"},
    in_a_handler: {"GAIN", "OTHER"},
    by_a_match: {"Config", "GAIN", "OTHER"},
    imported: {"gain"},
    imported_as: {"leak"},
    imported_from: {"gain"},
    through_two_modules: {"SETTINGS", "inner", "leak"},
}


@pytest.fixture
def modules(monkeypatch):
    for module in (SETTINGS, INNER):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    code_reads.users_own.cache_clear()


@pytest.mark.parametrize("function", READS, ids=lambda function: function.__name__)
def test_the_names_that_a_function_reads(function, modules):
    assert {name for name, _ in code_reads.globals_of(function)} == READS[function]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters are of Python 3.12")
def test_the_names_that_a_generic_function_reads():
    scope = {"__name__": __name__, "GAIN": 0.5, "OTHER": 0.25}
    exec("class A[T]:\n    own = OTHER\n    def step[U](self, x: U) -> U:\n        return x * GAIN", scope)
    assert {name for name, _ in code_reads.globals_of(scope["A"].step)} == {"GAIN"}


class Reader(tt.snn.Layer):
    """mem' = gain(mem) + x."""

    def __init__(self, gain):
        super().__init__()
        self.define_state("mem")
        self.gain = gain

    def step(self, x, mem):
        mem = self.gain(mem) + x
        return mem, mem


@pytest.mark.parametrize("function", [imported, imported_from, imported_as, through_two_modules])
def test_a_value_of_a_user_s_module_is_a_guard(function, modules, monkeypatch):
    layer, xs, found = Reader(function), noise(4, 2, 3), []
    with tt.backend("cpu"):
        first = layer.unroll(xs)
        monkeypatch.setattr(SETTINGS, "gain", 0.25)
        monkeypatch.setattr(INNER, "leak", 0.25)
        layer.reset_states()
        found.append(layer.unroll(xs))
    layer.reset_states()
    with tt.backend("eager"):
        found.append(layer.unroll(xs))
    assert_bits(*found)
    assert not first.equal(found[0])


def test_modules_that_have_each_other_are_walked_once(modules, monkeypatch):
    monkeypatch.setattr(INNER, "SETTINGS", SETTINGS, raising=False)
    assert [name for name, _ in code_reads.globals_of(through_two_modules)].count("inner") == 1


def test_a_module_that_is_not_imported_yet_is_no_matter(monkeypatch):
    monkeypatch.delitem(sys.modules, SETTINGS.__name__, raising=False)
    assert not list(code_reads.globals_of(imported))
