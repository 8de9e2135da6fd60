"""Every Python value that a step reads is a guard: changed, the step is traced anew, wherever the value stands."""

import enum
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import tracetorch as tt
from tests.layer_cases import assert_bits, noise
from tracetorch.fused import layer_kernels
from tracetorch.fused.kernel import Kernel
from tracetorch.fused.reads import read

GAIN = 0.5
GAINS = {"gain": 0.5}
NESTED = {"gains": [[0.5], {"x": 0.5}]}
SPACE = types.SimpleNamespace(inner=types.SimpleNamespace(gain=0.5))
HELPERS = types.ModuleType("tests_helpers_of_a_user")
HELPERS.gain = 0.5


def doubled(value):
    return 2 * value


def scaled(x):
    return doubled(x) * GAIN


class Config:
    gain = 0.5


class Gain(enum.Enum):
    HALF = 0.5
    QUARTER = 0.25


@dataclass
class Settings:
    """Of a user: a global object."""

    gain: float = 0.5


SETTINGS, CHOSEN, SCALAR = Settings(), Gain.HALF, np.float32(0.5)


class Reader(tt.snn.Layer):
    """mem' = gain * mem + x, whose gain stands where `gain` looks for it."""

    leak = 0.5
    leaks = [[0.5]]  # noqa: RUF012
    method_gain = 0.5

    def __init__(self, gain):
        super().__init__()
        self.define_state("mem")
        self.gain = gain
        self.config = Config
        self.array = np.array([0.5, 1.0])
        self.chosen = {1, 2}
        self.bytes = bytearray(b"\x02")

    @property
    def from_property(self):
        return self.method_gain

    @staticmethod
    def from_static(x):
        return GAIN * x

    def step(self, x, mem):
        mem = self.gain(self, mem) + x
        return mem, mem


def _set_array(layer, monkeypatch):
    layer.array[0] = 0.25


def _set_members(layer, monkeypatch):
    layer.chosen.add(3)


def _set_bytes(layer, monkeypatch):
    layer.bytes[0] = 3


def _other(items):
    items[0] = 0.75 - items[0]


def _global(name, value):
    return lambda layer, monkeypatch: monkeypatch.setitem(globals(), name, value)


def _attribute(owner, name, value):
    return lambda layer, monkeypatch: monkeypatch.setattr(owner, name, value)


# where the number stands: how a step reads it, and how it is changed
PLACES = {
    "global": (lambda self, mem: mem * GAIN, _global("GAIN", 0.25)),
    "global of a function that is called": (lambda self, mem: scaled(mem), _global("GAIN", 0.25)),
    "function that a function calls": (lambda self, mem: scaled(mem), _global("doubled", lambda value: 3 * value)),
    "in a global dictionary": (
        lambda self, mem: mem * GAINS["gain"],
        lambda layer, monkeypatch: monkeypatch.setitem(GAINS, "gain", 0.25),
    ),
    "in a module": (lambda self, mem: mem * HELPERS.gain, _attribute(HELPERS, "gain", 0.25)),
    "class attribute": (lambda self, mem: mem * self.leak, _attribute(Reader, "leak", 0.25)),
    "read by a property": (lambda self, mem: mem * self.from_property, _attribute(Reader, "method_gain", 0.25)),
    "static method": (lambda self, mem: self.from_static(mem), _global("GAIN", 0.25)),
    "of a class that is an attribute": (lambda self, mem: mem * self.config.gain, _attribute(Config, "gain", 0.25)),
    "in an array": (lambda self, mem: mem * float(self.array[0]), _set_array),
    "size of a set": (lambda self, mem: mem / len(self.chosen), _set_members),
    "in a global object": (lambda self, mem: mem * SETTINGS.gain, _attribute(SETTINGS, "gain", 0.25)),
    "another global object": (lambda self, mem: mem * SETTINGS.gain, _global("SETTINGS", Settings(0.25))),
    "in a namespace": (lambda self, mem: mem * SPACE.inner.gain, _attribute(SPACE.inner, "gain", 0.25)),
    "an enum's member": (lambda self, mem: mem * CHOSEN.value, _global("CHOSEN", Gain.QUARTER)),
    "a number of NumPy's": (lambda self, mem: mem * float(SCALAR), _global("SCALAR", np.float32(0.25))),
    "in a nested list": (
        lambda self, mem: mem * NESTED["gains"][0][0],
        lambda layer, monkeypatch: _other(NESTED["gains"][0]),
    ),
    "in a nested dictionary": (
        lambda self, mem: mem * NESTED["gains"][1]["x"],
        lambda layer, monkeypatch: monkeypatch.setitem(NESTED["gains"][1], "x", 0.25),
    ),
    "in a nested list of the class": (
        lambda self, mem: mem * self.leaks[0][0],
        lambda layer, monkeypatch: _other(Reader.leaks[0]),
    ),
    "in a bytearray": (lambda self, mem: mem / self.bytes[0], _set_bytes),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_changed_value_is_noticed(place, monkeypatch):
    gain, change = PLACES[place]
    monkeypatch.setitem(sys.modules, HELPERS.__name__, HELPERS)
    layer, xs, found = Reader(gain), noise(4, 2, 3), []
    with tt.backend("cpu"):
        first = layer.unroll(xs)
        layer.reset_states()
        change(layer, monkeypatch)
        found.append(layer.unroll(xs))
    layer.reset_states()
    with tt.backend("eager"):
        found.append(layer.unroll(xs))
    assert_bits(*found)
    assert not torch.equal(first, found[0])


def test_a_method_replaced_in_its_class_is_noticed(monkeypatch):
    layer, xs = Reader(lambda self, mem: 0.5 * mem), noise(4, 2, 3)
    with tt.backend("cpu"):
        layer.unroll(xs)
        layer.reset_states()
        monkeypatch.setattr(Reader, "step", lambda self, x, mem: (2 * x, mem))
        assert_bits(layer.unroll(xs), 2 * xs)


def reads_of(layer):
    return read(layer, (*layer.state_names, "kernels", "overrides", "baked", "trail"))


def test_another_default_dtype_is_noticed():
    layer = Reader(lambda self, mem: torch.where(mem > 0, 0.1, 0.7).to(mem.dtype))
    reads = reads_of(layer)
    assert reads.unchanged()
    torch.set_default_dtype(torch.float64)
    try:
        assert not reads.unchanged()
        assert reads_of(layer).guard != reads.guard
    finally:
        torch.set_default_dtype(torch.float32)
    assert reads.unchanged()


def test_what_is_read_twice_without_a_change_is_the_same():
    layer = Reader(lambda self, mem: scaled(mem))
    one, two = reads_of(layer), reads_of(layer)
    assert one.guard == two.guard
    assert hash(one.guard) == hash(two.guard)
    assert one.unchanged()


def test_a_global_of_an_attribute_s_name_is_nobody_s_business(monkeypatch):
    layer = Reader(lambda self, mem: mem * self.leak)
    monkeypatch.setitem(globals(), "leak", 1)
    reads = reads_of(layer)
    monkeypatch.setitem(globals(), "leak", 2)
    assert reads.unchanged()
    assert reads_of(layer).guard == reads.guard


def test_kernels_of_a_value_that_changes_at_every_call_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(layer_kernels, "_KEPT", 2)
    layer, xs = Reader(lambda self, mem: mem * self.leak), noise(2, 1, 3)
    for k in range(4):
        layer.leak = k / 100
        layer.unroll(xs)
    assert sum(isinstance(kernel, Kernel) for kernel in layer.kernels.values()) == 2


def test_the_house_s_own_layers_cost_no_look_at_their_code():
    layer = tt.snn.LIB(4)
    assert not reads_of(layer).seen.names
