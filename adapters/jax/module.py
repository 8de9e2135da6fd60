"""A brainstate module as a pure function of its arrays: which arrays it has, and running one step with others.

Arrays are its `ParamState`s, its other states, and the numbers of its neurons (`R`, `tau`, `V_th`, ...), which
brainpy.state keeps as plain attributes. Each goes by a name, as a number in a unit: voltages of a neuron, its membrane
included, in the unit of its V_th, everything else in its own.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import brainstate
import jax
import numpy as np
import saiunit
from brainstate.nn import init_all_states

from tracetorch.adapters.stateful import SeamError

# A module holds one trace's arrays while it is traced, and so does brainstate's random state: one thread at a time.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Slot:
    """One array of a module.

    Attributes:
        name: its path, with underscores: "layers_0_weight_bias", "R".
        kind: "parameter" (of a `ParamState`), "constant" (a neuron's number), "state".
        path: of the node or state in the module, as brainstate gives it.
        leaf: which leaf of the state's value; for a constant, the attribute.
        unit: in which the number is meant; None if it has none.
    """

    name: str
    kind: str
    path: tuple[Any, ...]
    leaf: Any
    unit: Any


def is_quantity(value: Any) -> bool:
    """Whether it is a number with a physical unit."""
    return isinstance(value, saiunit.Quantity)


def unit_of(value: Any) -> Any:
    """The unit of a quantity that has one, else None."""
    if is_quantity(value) and not value.is_unitless:
        return value.unit
    return None


def number(value: Any, unit: Any) -> Any:
    """A value as a number in a unit, a NumPy or a traced array; `unit=None` for one without.

    Raises:
        SeamError: another kind of unit, or one where none is meant.
    """
    own = unit_of(value)
    if (own is None) != (unit is None) or (own is not None and own.dim != unit.dim):
        raise SeamError(f"{value!r} has the unit {own or 'none'}, and {unit or 'none'} is meant")
    mantissa = value.mantissa if is_quantity(value) else value
    if own is None or own == unit:
        return mantissa if isinstance(mantissa, jax.core.Tracer) else np.asarray(mantissa)
    if isinstance(mantissa, jax.core.Tracer):
        return value.to(unit).mantissa
    return np.asarray(saiunit.Quantity(np.asarray(mantissa, dtype=np.float64), unit=own).to(unit).mantissa)


def quantity(array: Any, unit: Any) -> Any:
    """The inverse of `number`."""
    return array if unit is None else saiunit.Quantity(array, unit=unit)


def _leaves(value: Any) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten(value, is_leaf=is_quantity)


def _leaf_names(value: Any) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_quantity)
    return ["_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths]


def is_neuron(node: Any) -> bool:
    """Whether it is a neuron or synapse of brainpy.state, whose numbers are plain attributes."""
    return any(cls.__module__ == "brainpy.state" for cls in type(node).__mro__)


def _numbers(node: Any) -> Iterator[tuple[str, Any]]:
    """The numeric attributes of a neuron."""
    for name, value in vars(node).items():
        plain = isinstance(value, (int, float, np.ndarray, np.number, jax.Array)) and not isinstance(value, bool)
        if not name.startswith("_") and (plain or is_quantity(value)):
            yield name, value


def _voltage(node: Any) -> Any:
    return unit_of(getattr(node, "V_th", None))


def _meant(node: Any, value: Any) -> Any:
    """The unit in which a neuron's quantity is meant: V_th's for voltages."""
    own, voltage = unit_of(value), _voltage(node)
    return voltage if own is not None and voltage is not None and own.dim == voltage.dim else own


class JaxModule:
    """A private copy of a brainstate module, and its slots.

    Args:
        module: with the conventions of brainstate: `init_state(batch_size)`, and a call or `update` that is one step.
    """

    def __init__(self, module: Any) -> None:
        if not isinstance(module, brainstate.nn.Module):
            raise TypeError(f"{type(module).__name__} is no brainstate.nn.Module")
        self.module = copy.deepcopy(module)
        self.output_unit: Any = None  # of what a step returns; known after the first one
        init_all_states(self.module, batch_size=1)
        self._check_states()
        self.slots = tuple(self._slots())
        names = [slot.name for slot in self.slots]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"{type(module).__name__}: two of its arrays would go by the name {twice[0]!r}")

    def _check_states(self) -> None:
        for path, state in self.module.states().items():
            if isinstance(state, brainstate.LongTermState) and not isinstance(state, brainstate.ParamState):
                raise ValueError(
                    f"{type(self.module).__name__}: its {'.'.join(map(str, path))} is a {type(state).__name__}, "
                    "neither a parameter nor a state that a reset may forget, such as what a batch norm counts. "
                    "Remedy: that part as a torch module, a stage of its own"
                )

    def kind(self, kind: str) -> tuple[Slot, ...]:
        """The slots of a kind."""
        return tuple(slot for slot in self.slots if slot.kind == kind)

    @property
    def clocked(self) -> bool:
        """Whether a neuron needs the time (`brainstate.environ` t): one with a refractory period."""
        return any(hasattr(node, "tau_ref") for node in self.module.nodes().values())

    def neuron(self) -> Any:
        """The module itself if it is a neuron, else the first neuron inside, or None."""
        found = [node for node in (self.module, *self.module.nodes().values()) if is_neuron(node)]
        return found[0] if found else None

    @property
    def time_unit(self) -> Any:
        """The unit of its neurons' tau; None if they have none, or there is no neuron."""
        return unit_of(getattr(self.neuron(), "tau", None))

    @property
    def input_unit(self) -> Any:
        """The unit of its input, if it is a neuron: that of V_th over that of R."""
        node = self.module
        if not is_neuron(node) or _voltage(node) is None:
            return None
        resistance = unit_of(getattr(node, "R", None))
        return _voltage(node) if resistance is None else _voltage(node) / resistance

    def _slots(self) -> Iterator[Slot]:
        nodes = {path: node for path, node in self.module.nodes().items() if is_neuron(node)}
        for path, node in nodes.items():
            for attribute, value in _numbers(node):
                name = "_".join(map(str, (*path, attribute)))
                yield Slot(name, "constant", path, attribute, _meant(node, value))
        for path, state in self.module.states().items():
            kind = "parameter" if isinstance(state, brainstate.ParamState) else "state"
            owner = nodes.get(path[:-1])
            leaves, _ = _leaves(state.value)
            for k, (key, leaf) in enumerate(zip(_leaf_names(state.value), leaves, strict=True)):
                name = "_".join(map(str, (*path, *([key] if key else []))))
                unit = _meant(owner, leaf) if owner is not None else unit_of(leaf)
                yield Slot(name, kind, path, k, unit)

    def initial(self, batch: int) -> dict[str, np.ndarray]:
        """The states before the first step, [B, ...], by name."""
        found = {}
        with _ONE_AT_A_TIME:
            init_all_states(self.module, batch_size=batch)
            nodes = self.module.nodes()
            for slot in self.kind("state"):
                value, owner = np.asarray(self._read(slot)), nodes.get(slot.path[:-1])
                if value.ndim == 0 and is_neuron(owner):  # an initializer that is a number, of every neuron alike
                    value = np.broadcast_to(value, (batch, *owner.in_size))
                found[slot.name] = value
        return found

    def resize(self, size: tuple[int, ...]) -> None:
        """Give a neuron another size."""
        self.module.in_size = size

    def values(self) -> dict[str, np.ndarray]:
        """Parameters and constants by name."""
        return {slot.name: np.asarray(self._read(slot)) for slot in self.slots if slot.kind != "state"}

    def _read(self, slot: Slot) -> Any:
        if slot.kind == "constant":
            return number(getattr(self.module.nodes()[slot.path], slot.leaf), slot.unit)
        return number(_leaves(self.module.states()[slot.path].value)[0][slot.leaf], slot.unit)

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Put arrays in the place of the module's own, by name."""
        nodes, states = self.module.nodes(), self.module.states()
        changed: dict[Any, Any] = {}
        for slot in self.slots:
            if slot.name not in arrays:
                continue
            value = quantity(arrays[slot.name], slot.unit)
            if slot.kind == "constant":
                setattr(nodes[slot.path], slot.leaf, value)
            else:
                leaves, tree = changed.get(slot.path) or _leaves(states[slot.path].value)
                leaves[slot.leaf] = value
                changed[slot.path] = (leaves, tree)
        for path, (leaves, tree) in changed.items():
            states[path].value = jax.tree_util.tree_unflatten(tree, leaves)

    def step(self, x: Any, states: Mapping[str, Any], input_unit: Any) -> tuple[Any, dict[str, Any]]:
        """One step, while traced: output and new states, numbers in their slots' units."""
        self.write(states)
        output = self.module(quantity(x, input_unit))
        if output is None or isinstance(output, (tuple, list, dict)):
            raise SeamError(
                f"{type(self.module).__name__}: a call returned a {type(output).__name__}. Remedy: a module that "
                "returns its output alone, one array [B, ...]"
            )
        self.output_unit = unit_of(output)  # the same in every run: units are no part of what is traced
        if is_quantity(output):
            output = output.mantissa
        return output, {slot.name: self._read(slot) for slot in self.kind("state")}

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Inside, traced arrays may be written into the module; afterwards it is as it was.

        Raises:
            SeamError: it draws random numbers, whose key would be one constant of the compiled function.
        """
        with _ONE_AT_A_TIME:
            kept = self._kept()
            generator = vars(brainstate.random.DEFAULT)  # to ask for its `value` would write to it
            key = generator["_value"]
            try:
                with brainstate.StateTraceStack(name="tracetorch"):
                    yield
            finally:
                drew = generator["_value"] is not key
                generator["_value"] = key
                for store, name, value in kept:
                    store[name] = value
        if drew:
            raise SeamError(
                f"{type(self.module).__name__} draws random numbers in its step, which would be the same ones in every "
                "call. Remedy: draw them in torch and pass them in, or leave the random layer out"
            )

    def _kept(self) -> list[tuple[dict[str, Any], str, Any]]:
        nodes, states = self.module.nodes(), self.module.states()
        kept = [(vars(nodes[s.path]), s.leaf, vars(nodes[s.path])[s.leaf]) for s in self.kind("constant")]
        return kept + [(vars(state), "_value", vars(state)["_value"]) for state in states.values()]

    def __getstate__(self) -> dict[str, Any]:
        buffer = io.BytesIO()
        _Pickler(buffer).dump((self.module, self.slots))
        return {"pickled": buffer.getvalue(), "output_unit": self.output_unit}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.module, self.slots = pickle.loads(attributes["pickled"])
        self.output_unit = attributes["output_unit"]

    def __deepcopy__(self, memo: dict[int, Any]) -> JaxModule:
        twin = object.__new__(type(self))
        twin.module, twin.slots = copy.deepcopy(self.module, memo), self.slots
        twin.output_unit = self.output_unit
        return twin


class _Pickler(pickle.Pickler):
    """Quirk of brainstate 0.5.4: a State holds its trace and a traceback, which cannot be pickled; its value can."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, brainstate.State):
            leaves, tree = _leaves(value.value)
            units = [unit_of(leaf) for leaf in leaves]
            arrays = [np.asarray(number(leaf, unit)) for leaf, unit in zip(leaves, units, strict=True)]
            skeleton = jax.tree_util.tree_unflatten(tree, list(range(len(leaves))))
            return _restored, (type(value), skeleton, arrays, units)
        return NotImplemented


def _restored(cls: type, skeleton: Any, arrays: Sequence[np.ndarray], units: Sequence[Any]) -> Any:
    """For pickle."""
    value = jax.tree_util.tree_map(lambda k: quantity(jax.numpy.asarray(arrays[k]), units[k]), skeleton)
    return cls(value)
