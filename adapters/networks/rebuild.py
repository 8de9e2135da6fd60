"""A converted network as a Python file: a class that rebuilds it, for weights that are loaded into it.

The file imports torch and the target framework, where the target's layers are the framework's own; layers of ours
(`stock=False`) are rebuilt from their specs, and then the file imports traceTorch too.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tracetorch.adapters.base import ConversionError
from tracetorch.adapters.networks import modules as known
from tracetorch.adapters.networks import recurrent
from tracetorch.adapters.networks.lifted import WithMembrane
from tracetorch.adapters.networks.network import Function
from tracetorch.adapters.networks.sequences import Lifted
from tracetorch.adapters.registry import adapter_of, framework_of
from tracetorch.core.graph import Graph, Loop, Ref, State, rewrite
from tracetorch.core.model import Sequential
from tracetorch.core.storable import CLASSES, NAMES

_SEQUENTIAL = (nn.Sequential, Sequential)


def _refusal(path: str, module: object) -> ConversionError:
    why = "it has no constructor that a file could hold"
    remedy = "convert in Python, and save result.model.state_dict()"
    if type(module).__module__.startswith("torch."):
        remedy = "--to tracetorch, whose networks are saved whole"
    return ConversionError(f"{path!r}", "module", type(module).__qualname__, why, remedy)


class _Writer:
    """Collects the imports and classes of one file."""

    def __init__(self) -> None:
        self.imports = {"import torch", "from torch import nn"}
        self.classes: list[str] = []
        self.count = 0

    # ---- constructors ----

    def module(self, path: str, module: nn.Module) -> str:
        """An expression that builds a module, weights aside."""
        if isinstance(module, (Graph, Loop)):
            return f"{self.network(path, module)}()"
        if type(module) in _SEQUENTIAL:
            return self.sequential(path, module)
        if type(module) in NAMES and NAMES[type(module)].startswith("torch.nn."):
            return _torch(module)
        if isinstance(module, WithMembrane):
            self.imports.add("from tracetorch.adapters.networks.lifted import WithMembrane")
            neuron = self.module(f"{path}.neuron", module.neuron)
            return f"WithMembrane({neuron}, {module.as_before_reset}, {module.shown})"
        if isinstance(module, (recurrent.Stepped, recurrent.Sequenced)):
            name = type(module).__name__
            self.imports.add(f"from tracetorch.adapters.networks.recurrent import {name}")
            parts = [self.module(f"{path}.{part}", getattr(module, part)) for part in ("neuron", "connection")]
            return f"{name}({', '.join(parts)}, {module.from_start})"
        if isinstance(module, Lifted):
            return f"{self.lifted(path, module)}()"
        if framework_of(module) is not None:
            return self.neuron(path, module)
        inner = known.inside(module)
        if inner is not None:
            package = known.__name__ if type(module) is known.PerStep else "sinabs.layers"
            self.imports.add(f"from {package} import {type(module).__name__}")
            return f"{type(module).__name__}({self.module(f'{path}.module', inner)})"
        raise _refusal(path, module)

    def sequential(self, path: str, module: nn.Module) -> str:
        items = [
            f"({name!r}, {self.module(f'{path}.{name}', child)})" for name, child in module._modules.items() if child
        ]
        self.imports.add("from collections import OrderedDict")
        return f"nn.Sequential(OrderedDict([{', '.join(items)}]))"

    def neuron(self, path: str, module: nn.Module) -> str:
        """A neuron from its spec: the framework's own class or ours."""
        spec, framework = adapter_of(module).spec(module), framework_of(module)
        stock = _stock(module, spec)
        if stock is not None:
            self.imports.update(stock[0])
            return stock[1]
        self.imports.add("from tracetorch import NeuronSpec")
        if framework == "brainpy":  # whose own layers are no modules: a stage holds one
            self.imports.add("from tracetorch.adapters.base import Building")
            self.imports.add("from tracetorch.adapters.brainpy import build as build_stage")
            return f"build_stage(NeuronSpec.from_json({spec.to_json()!r}), Building({path!r}, {framework!r}))"
        self.imports.add("from tracetorch.adapters import build as build_neuron")
        return f"build_neuron(NeuronSpec.from_json({spec.to_json()!r}), {framework!r})"

    # ---- classes ----

    def network(self, path: str, module: nn.Module) -> str:
        """A class of its own; returns its name."""
        self.count += 1
        name = "Net" if not path else f"Part{self.count}"
        text = self.loop(path, module) if isinstance(module, Loop) else self.graph(path, module)
        self.classes.append(f"class {name}(nn.Module):\n{text}")
        return name

    def graph(self, path: str, graph: Any) -> str:
        for node in graph.nodes:
            for name in node.target.split(".") if node.kind == "module" else ():
                if keyword.iskeyword(name):  # fx would write it as it is
                    _check_name(name)
        lines = ["    def __init__(self):", "        super().__init__()"]
        lines += list(self.children(path, graph))
        lines += list(_tensors(graph))
        code = graph.to_fx().python_code("self")
        for wanted in sorted(code.globals):
            if wanted in ("operator", "math"):
                self.imports.add(f"import {wanted}")
        if "device(" in code.src:
            self.imports.add("from torch import device")
        body = [line for line in code.src.splitlines() if line.strip() and not line.startswith("torch.fx")]
        return "\n".join(lines) + "\n\n" + "\n".join(f"    {line}" for line in body)

    def lifted(self, path: str, module: Any) -> str:
        """A class for a call of one step over whole sequences; returns its name."""
        function = self.network(f"{path}.function", _of_one_step(module.function))
        self.count += 1
        lines = ["    def __init__(self):", "        super().__init__()", f"        self.function = {function}()"]
        lines += list(_tensors(module))
        self.classes.append(f"class Part{self.count}(nn.Module):\n" + "\n".join(lines) + _over_sequences(module))
        return f"Part{self.count}"

    def children(self, path: str, module: nn.Module) -> Iterator[str]:
        for name, child in module._modules.items():
            if child is not None:
                _check_path(name)
                yield f"        self.add_module({name!r}, {self.module(f'{path}.{name}'.strip('.'), child)})"

    def loop(self, path: str, loop: Any) -> str:
        lines = ["    def __init__(self):", "        super().__init__()", *self.children(path, loop)]
        self.imports.add("import torch")
        return "\n".join(lines) + _LOOP.format(
            cuts=loop.cuts,
            steps=loop.steps,
            before="self.before(x)" if loop.before is not None else "(x,)",
            after="self.after(*outputs)" if loop.after is not None else "outputs",
            reset="" if loop.carry else _RESET,
        )


_RESET = """
        for module in self.step.modules():
            for name in ("mem", "syn", "syn_exc", "syn_inh", "spk"):
                if name in module._buffers:
                    setattr(module, name, torch.zeros(0))"""
_LOOP = """

    def forward(self, x):{reset}
        values = {before}
        cuts, steps = {cuts}, {steps}
        moved = [v if cut is None else v.movedim(cut, 0) for v, cut in zip(values, cuts)]
        if steps is None:
            steps = min(len(v) for v, cut in zip(moved, cuts) if cut is not None)
        series = []
        for t in range(steps):
            series.append(self.step(*[v if cut is None else v[t] for v, cut in zip(moved, cuts)]))
        outputs = tuple(torch.stack(list(each)) for each in zip(*series))
        return {after}"""


# A call over [B, T, ...], as `sequences.Lifted` makes it: once, with time folded into the batch, or once a step.
_STEPS = """

    def {name}(self, *xs):
        given, held, whole = iter(xs), {held}, {timeless}
        now = values = [getattr(self, f"constant_{{k}}") if h else next(given) for k, h in enumerate(held)]
        timed = [v for v, w in zip(values, whole) if not w]
        if not timed or isinstance(timed[0], tuple):
            return self.function({order})
        steps = []
        for t in range(timed[0].shape[1]):
            now = [v if w else v.select(1, t).clone() for v, w in zip(values, whole)]
            steps.append(self.function({order}))
        return self.stacked(steps)

    def stacked(self, steps):
        if isinstance(steps[0], (tuple, list)):
            return tuple(self.stacked(list(series)) for series in zip(*steps))
        return steps[0] if steps[0] is None else torch.stack(steps, 1)"""
_WHOLE = """

    def forward(self, *xs):
        return self.function(*xs) if len({x.ndim for x in xs}) == 1 else self.each(*xs)"""
_FOLDS = """

    def forward(self, x):
        return self.function(x.flatten(0, 1)).unflatten(0, x.shape[:2])"""


def _over_sequences(module: Lifted) -> str:
    """The forward of a call over [B, T, ...]."""
    if module.folds:
        return _FOLDS
    order = "now[-1], *now[:-1]" if module.function.sized else "*now"
    name = "each" if module.whole else "forward"
    steps = _STEPS.format(name=name, held=module.held, timeless=module.timeless, order=order)
    return _WHOLE + steps if module.whole else steps


def _of_one_step(function: Function) -> Graph:
    """The call as a graph of its arguments; the network's input, where it reads sizes off that, comes first."""
    names = {place: f"a{k}" for k, place in enumerate(function.references)}

    def place(leaf: Any) -> Any:
        return Ref(names[leaf]) if isinstance(leaf, (Ref, State)) else leaf

    node = function.node
    args, kwargs = rewrite(node.args, place), rewrite(dict(node.kwargs), place)
    target = "callee" if function.callee is not None else node.target
    modules = {} if function.callee is None else {"callee": function.callee}
    call = node._replace(name="call", target=target, args=args, kwargs=kwargs)
    inputs = (*(("x",) if function.sized else ()), *names.values())
    return Graph(modules, [call], Ref("call"), inputs)


def _tensors(module: nn.Module) -> Iterator[str]:
    """Lines that register a module's own parameters and buffers."""
    for name, tensor in module._parameters.items():
        _check_name(name)
        yield f"        self.{name} = nn.Parameter({_tensor(tensor)})"
    for name, buffer in module._buffers.items():
        _check_name(name)
        yield f"        self.register_buffer({name!r}, {_tensor(buffer)})"


def _check_name(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConversionError(f"{name!r}", "name", name, "it cannot stand in a Python file", "rename it in the network")


def _check_path(name: str) -> None:
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise ConversionError(f"{name!r}", "name", name, "it cannot stand in a Python file", "rename it in the network")


def _torch(module: nn.Module) -> str:
    name = NAMES[type(module)]
    arguments = dict(CLASSES[name].arguments(module))
    if "bias" in module._parameters and module._parameters["bias"] is None:
        arguments["bias"] = False
    return f"nn.{name.removeprefix('torch.nn.')}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def _tensor(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    flat = value.detach().cpu()
    return f"torch.tensor({flat.tolist()!r}, dtype={flat.dtype})"


def _stock(module: Any, spec: Any) -> tuple[list[str], str] | None:
    """The constructor of a framework's own class, or `None` for one of ours."""
    package, name = type(module).__module__.split(".")[0], type(module).__name__
    if package == "sinabs" and name in ("LIF", "IAF", "ExpLeak"):
        return _stock_sinabs(module, name)
    if package == "snntorch" and name == "Leaky":
        return _stock_leaky(module, spec)
    return None


def _stock_sinabs(module: Any, name: str) -> tuple[list[str], str] | None:
    arguments = {}
    for key, value in module.arg_dict.items():
        owner = getattr(value, "__module__", "") if callable(value) else ""
        if callable(value) and not owner.startswith("sinabs.activation"):
            return None
        if isinstance(value, type):
            arguments[key] = f"activation.{value.__name__}"
        elif callable(value):
            fields = {k: _tensor(v) for k, v in vars(value).items() if not k.startswith("_")}
            arguments[key] = f"activation.{type(value).__name__}({', '.join(f'{k}={v}' for k, v in fields.items())})"
        else:
            arguments[key] = _tensor(value)
    text = ", ".join(f"{key}={value}" for key, value in arguments.items() if key != "shape")
    return ["from sinabs import activation", "import sinabs.layers"], f"sinabs.layers.{name}({text})"


def _stock_leaky(module: Any, spec: Any) -> tuple[list[str], str] | None:
    from tracetorch.adapters.snntorch.surrogates import SURROGATES

    by_ours = {ours: (theirs, names) for theirs, (ours, names) in SURROGATES.items()}
    if spec.state_levels is not None or spec.inhibition != "none":  # a callable of ours; an option that warns
        return None
    if spec.surrogate is None or spec.surrogate.name not in by_ours or type(module.spike_grad).__name__ != "function":
        return None
    theirs, names = by_ours[spec.surrogate.name]
    values = dict(spec.surrogate.parameters)
    given = ", ".join(f"{argument}={values[ours]!r}" for argument, ours in names.items())
    arguments = {
        "beta": _tensor(module.beta),
        "threshold": _tensor(module.threshold),
        "spike_grad": f"snntorch.surrogate.{theirs}({given})" if names else f"snntorch.surrogate.{theirs}()",
        "init_hidden": repr(module.init_hidden),
        "learn_beta": repr(isinstance(module.beta, nn.Parameter)),
        "learn_threshold": repr(isinstance(module.threshold, nn.Parameter)),
        "reset_mechanism": repr(module.reset_mechanism),
        "output": repr(module.output),
        "graded_spikes_factor": _tensor(module.graded_spikes_factor),
        "learn_graded_spikes_factor": repr(isinstance(module.graded_spikes_factor, nn.Parameter)),
        "reset_delay": repr(module.reset_delay),
    }
    text = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return ["import snntorch", "import snntorch.surrogate"], f"snntorch.Leaky({text})"


def source(model: nn.Module) -> str:
    """Python source with a function `build() -> nn.Module`: the network without its trained weights.

    Raises:
        ConversionError: a layer that a file cannot hold; names it.
    """
    writer = _Writer()
    expression = writer.module("", model)
    classes = "\n\n\n".join(writer.classes)
    own = any("tracetorch" in line for line in writer.imports)
    note = " It holds layers of traceTorch's own, and needs it installed." if own else ""
    head = f'"""A converted network; `build()` makes it, and weights.safetensors are its weights.{note}"""\n\n'
    imports = sorted(writer.imports, key=lambda line: (line.startswith("from"), line))
    body = f"def build():\n    return {expression}\n"
    return head + "\n".join(imports) + "\n\n\n" + (classes + "\n\n\n" if classes else "") + body
