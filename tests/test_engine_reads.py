"""What a walk over a layer finds: an edit is noticed, by the quick look and by walking again, and nothing else is."""

import argparse
import math
import sys
import types
from collections import OrderedDict, deque
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from tests.layer_cases import noise
from tracetorch.fused.code_reads import users_own
from tracetorch.fused.reads import duplicate, read

AMOUNT = 0.5
ROWS = [{"gain": 0.5}]
TENSOR = torch.tensor(0.5)
RING = types.SimpleNamespace(gain=0.5)
RING.next = RING
HELPERS = types.ModuleType("helpers_of_a_user")
HELPERS.gain = 0.5


class Scale:
    """An object that is called."""

    def __call__(self, x):
        return AMOUNT * x


class Asked:
    """An object that is asked for what it has not."""

    def __getattr__(self, name):
        if name == "amount":
            return AMOUNT
        raise AttributeError(name)


class Methods:
    @classmethod
    def of_class(cls):
        return AMOUNT


class Property:
    @property
    def half(self):
        return AMOUNT / 2


class Level:
    gain = 0.5


class HigherLevel(Level):
    pass


class Slotted:
    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 1


class Below(Slotted):
    __slots__ = "bias"

    def __init__(self):
        super().__init__()
        self.bias = 1


def in_rows(x):
    return ROWS[0]["gain"] * x


def in_class(x):
    return Level.gain * x


class Operator:
    def __matmul__(self, x):
        return AMOUNT * x

    def __getitem__(self, place):
        return AMOUNT


class Gained(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = 0.5


LEVEL, MODULE = Level(), nn.Sequential(nn.ReLU(), Gained())


def in_object_s_class(x):
    return LEVEL.gain * x


def in_module(x):
    return MODULE[1].gain * x


def in_tensor(x):
    return TENSOR * x


def in_ring(x):
    return RING.next.next.gain * x


def within(x):
    def inner():
        return AMOUNT

    return inner() * x


def within_a_module(x):
    def inner():
        return HELPERS.gain

    return inner() * x


def function():
    """A new one, with both kinds of defaults."""

    def times(x, by=1.0, *, and_by=2.0):
        return x * by * and_by

    return times


def closure(number=1.0):
    """A function of a number in its closure."""

    def times(x):
        return number * x

    return times


HELD = closure()


def calls_a_closure(x):
    return HELD(x)


def later():
    """A function of a variable without a value as yet, and what gives it one."""

    def times(x):
        return number * x

    def assign():
        nonlocal number
        number = 2.0

    if not callable(times):
        number = 1.0
    return times, assign


class Holder(nn.Module):
    """A module whose step could read any of these."""

    def __init__(self, **values):
        super().__init__()
        self.first = nn.Parameter(noise(4))
        for name, value in values.items():
            setattr(self, name, value)


def parameters(*names):
    """A module of two parameters under several names, "p" or "q" for each."""
    found = {"p": nn.Parameter(noise(4)), "q": nn.Parameter(noise(4))}
    return Holder(**{f"w{k}": found[name] for k, name in enumerate(names)})


def with_buffer(name, value):
    layer = Holder()
    layer.register_buffer(name, value)
    return layer


def with_later():
    times, assign = later()
    return Holder(function=times, seen=[assign])


def showing(held):
    """A module that reads a dictionary through another object alone: "mem" is no part of the walk."""
    return Holder(shown=MappingProxyType(held), mem=held)


# how a layer is made, and how it is edited
EDITS = {
    "a number": (lambda: Holder(number=1.0), lambda layer: setattr(layer, "number", 2.0)),
    "a number's type": (lambda: Holder(number=1), lambda layer: setattr(layer, "number", True)),
    "a number's other type": (lambda: Holder(number=1), lambda layer: setattr(layer, "number", 1.0)),
    "a text": (lambda: Holder(mode="hard"), lambda layer: setattr(layer, "mode", "soft")),
    "an item of a list": (lambda: Holder(items=[1, 2]), lambda layer: layer.items.__setitem__(1, 3)),
    "a longer list": (lambda: Holder(items=[1, 2]), lambda layer: layer.items.append(2)),
    "an empty list": (lambda: Holder(items=[]), lambda layer: setattr(layer, "items", ())),
    "a deque": (lambda: Holder(items=deque([1, 2])), lambda layer: layer.items.rotate()),
    "a value of a dictionary": (lambda: Holder(items={"a": 1}), lambda layer: layer.items.update(a=2)),
    "a key of a dictionary": (lambda: Holder(items={"a": 1}), lambda layer: layer.items.update(b=1)),
    "an empty dictionary": (lambda: Holder(items={}), lambda layer: setattr(layer, "items", OrderedDict())),
    "a set": (lambda: Holder(items={1, 2}), lambda layer: layer.items.add(3)),
    "a member's type": (lambda: Holder(items={1}), lambda layer: setattr(layer, "items", {True})),
    "a bytearray": (lambda: Holder(items=bytearray(b"a")), lambda layer: layer.items.append(1)),
    "an array's value": (lambda: Holder(items=np.ones(4)), lambda layer: layer.items.__setitem__(0, 2)),
    "an array's shape": (lambda: Holder(items=np.ones(4)), lambda layer: setattr(layer, "items", np.ones((2, 2)))),
    "an array's dtype": (
        lambda: Holder(items=np.ones(4)),
        lambda layer: setattr(layer, "items", layer.items.view(np.int64)),
    ),
    "what a mapping shows": (lambda: showing({"a": 1}), lambda layer: layer.mem.update(a=2)),
    "which name has which parameter": (
        lambda: parameters("p", "q", "p", "q"),
        lambda layer: layer._parameters.update(w2=layer.w1, w3=layer.w0),
    ),
    "another parameter": (Holder, lambda layer: layer.register_parameter("second", nn.Parameter(noise(4)))),
    "a parameter's dtype": (Holder, lambda layer: setattr(layer.first, "data", layer.first.data.double())),
    "a parameter's shape": (Holder, lambda layer: setattr(layer.first, "data", noise(5))),
    "a constant's value": (lambda: with_buffer("n", torch.tensor(3)), lambda layer: layer.n.add_(1)),
    "a constant's shape": (lambda: with_buffer("n", torch.tensor(3)), lambda layer: setattr(layer, "n", layer.n[None])),
    "a module's kind": (lambda: Holder(child=nn.Tanh()), lambda layer: setattr(layer, "child", nn.Sigmoid())),
    "a module's mode": (lambda: Holder(child=nn.Tanh()), lambda layer: layer.child.eval()),
    "a number of a module, with a state's name": (
        lambda: Holder(child=Holder(mem=1.0)),
        lambda layer: setattr(layer.child, "mem", 2.0),
    ),
    "a constant of a module, with a state's name": (
        lambda: Holder(child=with_buffer("mem", torch.tensor(1))),
        lambda layer: setattr(layer.child, "mem", torch.tensor(2)),
    ),
    "an object's attribute": (
        lambda: Holder(config=argparse.Namespace(gain=1.0)),
        lambda layer: setattr(layer.config, "gain", 2.0),
    ),
    "an object's kind": (
        lambda: Holder(config=argparse.Namespace(gain=1.0)),
        lambda layer: setattr(layer, "config", types.SimpleNamespace(gain=1.0)),
    ),
    "a slot": (lambda: Holder(config=Slotted()), lambda layer: setattr(layer.config, "gain", 2)),
    "a slot of a base": (lambda: Holder(config=Below()), lambda layer: setattr(layer.config, "gain", 2)),
    "a slot that is one text": (lambda: Holder(config=Below()), lambda layer: setattr(layer.config, "bias", 2)),
    "a function's code": (
        lambda: Holder(function=function()),
        lambda layer: setattr(layer.function, "__code__", (lambda x, by=1.0, *, and_by=2.0: x + by).__code__),
    ),
    "a function's default": (
        lambda: Holder(function=function()),
        lambda layer: setattr(layer.function, "__defaults__", (3.0,)),
    ),
    "a function's named default": (
        lambda: Holder(function=function()),
        lambda layer: setattr(layer.function, "__kwdefaults__", {"and_by": 3.0}),
    ),
    "a closure's number": (
        lambda: Holder(function=closure()),
        lambda layer: setattr(layer.function.__closure__[0], "cell_contents", 2.0),
    ),
    "a variable that had no value": (with_later, lambda layer: layer.seen[0]()),
    "the object of a method": (
        lambda: Holder(method=types.MethodType(function(), argparse.Namespace(gain=1.0))),
        lambda layer: setattr(layer.method.__self__, "gain", 2.0),
    ),
    "an argument of a partial function": (
        lambda: Holder(function=partial(function(), [1.0])),
        lambda layer: layer.function.args[0].append(1.0),
    ),
    "a named argument of a partial function": (
        lambda: Holder(function=partial(function(), by=1.0)),
        lambda layer: layer.function.keywords.update(by=2.0),
    ),
    "a function of C": (lambda: Holder(function=math.sin), lambda layer: setattr(layer, "function", math.cos)),
}
# what a layer holds, and a value outside it: its owner, and its name there
OUTSIDE = {
    "read by a called object": (lambda: Holder(scale=Scale()), globals(), "AMOUNT"),
    "read for an attribute that is not there": (lambda: Holder(asked=Asked()), globals(), "AMOUNT"),
    "read by a method of a class": (lambda: Holder(methods=Methods()), globals(), "AMOUNT"),
    "read by a property": (lambda: Holder(object=Property()), globals(), "AMOUNT"),
    "read by a function within one": (lambda: Holder(function=within), globals(), "AMOUNT"),
    "of a module, read by a function within one": (lambda: Holder(function=within_a_module), HELPERS, "gain"),
    "in a dictionary of a list": (lambda: Holder(function=in_rows), ROWS[0], "gain"),
    "of an object that leads to itself": (lambda: Holder(function=in_ring), RING.__dict__, "gain"),
    "of an object's class": (lambda: Holder(level=Level()), Level, "gain"),
    "of a base of its class": (lambda: Holder(level=HigherLevel()), Level, "gain"),
    "of a class that a function names": (lambda: Holder(function=in_class), Level, "gain"),
    "of a global object's class": (lambda: Holder(function=in_object_s_class), Level, "gain"),
    "read by an operator": (lambda: Holder(operator=Operator()), globals(), "AMOUNT"),
    "of a module within a global one": (lambda: Holder(function=in_module), vars(MODULE[1]), "gain"),
    "that is a global module": (lambda: Holder(function=in_module), globals(), "MODULE"),
    "in the closure of a function that is called": (
        lambda: Holder(function=calls_a_closure),
        HELD.__closure__[0],
        "cell_contents",
    ),
}


def reads(layer):
    return read(layer, ("mem",))


def assert_noticed(layer, edit):
    before = reads(layer)
    assert before.unchanged() or before.seen.doubtful
    edit()
    assert not before.unchanged()
    assert reads(layer).guard != before.guard
    assert reads(layer).guard == reads(layer).guard


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_layer_is_noticed(name):
    make, edit = EDITS[name]
    layer = make()
    assert_noticed(layer, lambda: edit(layer))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_number_outside_a_layer_is_noticed(name, monkeypatch):
    make, owner, key = OUTSIDE[name]
    put = monkeypatch.setattr if isinstance(owner, (type, types.CellType, types.ModuleType)) else monkeypatch.setitem
    assert_noticed(make(), lambda: put(owner, key, 0.25))


def test_another_item_of_a_list_outside_a_layer_is_noticed():
    before = list(ROWS)
    try:
        assert_noticed(Holder(function=in_rows), lambda: ROWS.__setitem__(0, {"gain": 0.25}))
    finally:
        ROWS[:] = before


def test_another_kind_of_container_outside_a_layer_is_noticed(monkeypatch):
    assert_noticed(Holder(function=in_rows), lambda: monkeypatch.setitem(globals(), "ROWS", tuple(ROWS)))


def test_a_tensor_outside_a_layer_is_the_tracer_s_to_refuse(monkeypatch):
    before = reads(layer := Holder(function=in_tensor))
    monkeypatch.setitem(globals(), "TENSOR", torch.tensor(0.25))
    assert before.unchanged()
    assert reads(layer).guard == before.guard


def test_what_is_typed_at_a_prompt_is_a_user_s_own_and_what_is_installed_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    users_own.cache_clear()
    found = {name: users_own(name) for name in ("__main__", __name__, "collections.abc", "torch.nn", "pytest", None)}
    users_own.cache_clear()
    assert [name for name, own in found.items() if own] == ["__main__", __name__]


@pytest.mark.parametrize("value", [float("nan"), 1 + 2j, "hard", 0.5])
def test_an_equal_value_is_no_change(value):
    """NaN is equal to none, and still the same value of a step."""
    layer = Holder(value=value)
    before = reads(layer)
    layer.value = type(value)(str(value))
    assert reads(layer).guard == before.guard


def test_a_state_may_come_and_go():
    layer = Holder(mem=None)
    before = reads(layer)
    for value in (noise(3), 2.0):
        layer.mem = value
        assert before.unchanged()
    del layer.mem
    layer.register_buffer("mem", noise(3))
    assert before.unchanged()
    assert reads(layer).guard == before.guard


class Marked(torch.Tensor):
    pass


ODD = {
    "a mask": torch.tensor([True, False]),
    "complex numbers": torch.ones(3, dtype=torch.complex64),
    "a sparse one": torch.eye(3).to_sparse(),
    "of a class of its own": torch.ones(3).as_subclass(Marked),
}


@pytest.mark.parametrize("name", ODD)
def test_a_tensor_that_no_kernel_reads_is_named(name):
    found = reads(with_buffer("strange", ODD[name]))
    assert found.odd.startswith("strange is a")
    assert "strange" not in found.tensors


def test_a_copy_to_trace_on_has_no_state_and_nobody_s_hooks():
    layer = with_buffer("n", torch.tensor(3))
    layer.config = argparse.Namespace(gains=[1.0])
    layer.register_buffer("mem", 2 * layer.first)  # of a graph: no copy could be made of it
    layer.register_forward_hook(lambda *_: None)
    given = noise(4)
    twin = duplicate(layer, ("mem",), lambda tensor: given, reads(layer))
    assert twin.first is given
    assert twin.n is layer.n
    assert twin.config.gains == [1.0]
    assert twin.config.gains is not layer.config.gains
    assert "mem" not in twin._buffers
    assert not twin._forward_hooks
    assert len(layer._forward_hooks) == 1
