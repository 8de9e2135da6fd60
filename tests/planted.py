"""A subject of the conformance suite, from the equations and not from our forms, that can hold one fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracetorch.conformance.cases import Array, Case
from tracetorch.core.spec import NeuronSpec
from tracetorch.functional.surrogates import SURROGATES
from tracetorch.oracle.surrogates import DERIVATIVES

KEPT = ("i_syn", "i_exc", "i_inh", "adaptation", "pending", "left", "last", "steps")


class Planted:
    """Every choice that has a case, in float32, from the equations and not from our forms; and one fault.

    `hide`: names of arrays, or beginnings of them, that it does not show.
    """

    def __init__(self, fault: str = "", hide: tuple[str, ...] = ()) -> None:
        self.fault, self.hide = fault, hide
        self.left: dict[str, Tensor] = {}

    def describe(self) -> dict[str, Any]:
        return {"name": "planted", "framework": "planted", "version": "1"}

    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        self.spec = NeuronSpec.from_dict(spec)
        self.left = {}
        return {}

    # ---- parameters

    def value(self, name: str, default: float) -> Tensor:
        if name not in self.p:
            return torch.tensor(default)
        raw, f = self.p[name], self.fault
        if f == "one parameter for all":
            raw = raw.reshape(-1)[0]
        form = self.spec.parameters[name].raw
        if form == "clamped":
            # with "gradient through the clamp" the gradient passes outside too
            clamped = raw + (raw.clamp(0, 1) - raw).detach() if f == "gradient through the clamp" else raw.clamp(0, 1)
            value = raw if f == "not clamped" else clamped
        elif form == "exp_tau":
            value = 1 - 1 / raw if f == "first order" else torch.exp(-1 / raw)
        elif form == "sigmoid":
            value = torch.sigmoid(raw) ** 2 if f == "another sigmoid" else torch.sigmoid(raw)
        elif form in ("exp_dt_tau", "one_minus_dt_rate"):
            dt = 1.0 if f == "dt ignored" else self.spec.dt
            value = torch.exp(-dt / raw) if form == "exp_dt_tau" else 1 - dt * raw
        elif form == "one_minus_inverse_tau":
            value = torch.exp(-1 / raw) if f == "exp for Euler" else 1 - 1 / raw
        elif form == "one_minus_sigmoid":
            value = torch.sigmoid(raw) if f == "sigmoid for its complement" else 1 - torch.sigmoid(raw)
        elif form == "softplus":
            value = torch.exp(raw) if f == "exp for softplus" else torch.nn.functional.softplus(raw)
        else:
            value = torch.sigmoid(raw) if f == "sigmoid of a value" and name == "mem_decay" else raw
        if name == "mem_decay":
            if f == "half precision decay":
                value = value.half().float()
            if f == "smallest decay 1/100":
                value = value.clamp(min=0.01)
            if f == "decay not learned":
                value = value.detach()
        return value

    # ---- one step

    def surrogate(self, count: Tensor, v: Tensor, theta: Tensor, learned: Tensor) -> Tensor:
        kind = self.spec.surrogate
        assert kind is not None
        if not v.requires_grad:
            return count
        name, options = kind.name, dict(kind.parameters)
        if self.fault == "another surrogate":
            name = "straight_through" if name != "straight_through" else "fast_sigmoid"
            options = dict(SURROGATES[name].defaults)
        reaches = self.spec.threshold_gradient
        if self.fault in ("no gradient to the threshold", "gradient to the threshold"):
            reaches = self.fault == "gradient to the threshold"
        z = v - (learned if reaches else learned.detach())
        scale = 1.0 if self.fault == "no surrogate scale" else self.value("surrogate_scale", 1.0).item()
        at = (v.detach() - theta.detach()).double().numpy() / scale
        with np.errstate(all="ignore"):
            slope = DERIVATIVES[name](at, theta.detach().double().numpy(), **options)
        return count + torch.from_numpy(np.array(slope) / scale).float() * (z - z.detach())

    def smooth(self, z: Tensor) -> Tensor:
        """The function that the surrogate, with its default parameters, is the derivative of."""
        assert self.spec.surrogate is not None
        if self.spec.surrogate.name == "logistic":
            return torch.sigmoid(4 * z)
        return torch.atan(torch.pi * z) / torch.pi + 0.5

    def count(self, v: Tensor, theta: Tensor) -> Tensor:
        spec, f = self.spec, self.fault
        if spec.spike_count == "smooth":
            return (v > theta).float()
        if spec.spike_count == "single" and f != "several spikes":
            strict = (spec.comparison == ">") != (f == "the other comparison")
            return (v > theta if strict else v >= theta).float()
        ratio = v / theta
        whole = torch.round(ratio) if f == "round for trunc" else torch.trunc(ratio)
        n = torch.where(v > 0, whole, torch.zeros_like(v))
        if spec.spike_count == "limited" and f != "limit ignored":
            n = n.clamp(max=float(spec.max_spikes or 0))
        return n.clamp(max=1) if f == "one spike" else n

    def reset(self, u: Tensor, s: Tensor, amount: Tensor) -> Tensor:
        spec, f = self.spec, self.fault
        kind = spec.reset
        if f.startswith("reset: "):
            kind = f.removeprefix("reset: ")
        attached = spec.reset_gradient != "detached"
        if f in ("attached", "detached"):
            attached = f == "attached"
        s = s if attached else s.detach()
        to = torch.tensor(0.0) if f == "reset to 0" else self.value("reset_value", 0.0)
        if spec.spike_count == "smooth" and kind == "value":
            return s * to + (1 - s) * u
        once = s + (s.detach().clamp(max=1) - s.detach())
        if kind == "subtract":
            return u - s * amount * (2 if f == "double reset" else 1)
        if kind == "value":
            kept = torch.where(once.detach() > 0, to.expand_as(u), u)
            if spec.reset_gradient == "membrane_stopped" and f not in ("attached", "detached"):
                kept = kept.detach() + (u - u.detach()) + once.detach() * (to - to.detach())
            return kept + (once - once.detach()) * (to - u).detach().nan_to_num(0, 0, 0)
        if kind == "add_value":
            return torch.where(s.detach() == 0, u, torch.zeros_like(u)) + to
        return u

    def step(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        spec, f = self.spec, self.fault
        if spec.synapse == "difference_of_exponentials":
            return self.difference(x, state)
        a, bias = self.value("mem_decay", 1.0), self.value("bias", 0.0)
        fixed = self.value("threshold", 1.0)
        theta = fixed if f == "threshold not raised" else fixed + self.value("adapt_scale", 0.0) * state["adaptation"]
        if f == "leaks" and spec.decay == "none":
            a = torch.tensor(0.99)
        v = state["v_mem"]
        if f == "NaN as 0":
            x = x.nan_to_num(0.0)
        if f == "infinity by product" and torch.isinf(x).any():
            x = torch.where(torch.isinf(x), x * 0, x)
        gain = spec.input_gain
        if gain == "one_minus_decay_kept":
            gain = "one_minus_decay" if f == "gain not kept" else "one"
        i = self.current(x, state, (1 - a) if spec.input_gain != gain and gain == "one" else torch.tensor(1.0))
        b = {"one": torch.tensor(1.0), "one_minus_decay": 1 - a, "value": self.value("input_gain", 1.0)}[gain]
        if f in ("gain of 1 - a", "gain of 1"):
            b = 1 - a if f == "gain of 1 - a" else torch.tensor(1.0)
        b = b if f == "no resistance" else b * self.value("resistance", 1.0)
        drive = b * i + (0.0 if f == "no leak" else (1 - a) * self.value("leak", 0.0))
        over = spec.reset_amount == "threshold_over_decay"
        amount = theta / a if over != (f == "the other amount") else theta
        amount = fixed if f == "reset not raised" and spec.adaptive else amount
        if spec.reset_amount == "value" and f != "amount of the threshold":
            amount = self.value("reset_amount", 0.0)
        pending, timing = state["pending"], spec.reset_timing
        if f.startswith("timing: "):
            timing = f.removeprefix("timing: ")
        r = torch.zeros_like(v)
        if timing == "same_step_residual":
            r = self.count(v - bias * 0, theta).detach()
            v = (1 - r) * v if spec.reset == "value" else v
        if timing == "next_step_before_decay":
            v = self.reset(v, pending, amount)
        held = self.held(state) if f != "not held" else torch.zeros_like(v, dtype=torch.bool)
        if f == "gradient cut in time":
            v = v.detach()
        quiet = (x == 0) if f == "decays with input alone" else torch.zeros_like(x, dtype=torch.bool)
        u = a * (v + drive) if f == "input decays too" else torch.where(quiet, v, a * v) + drive
        if timing == "next_step_after_decay":
            u = self.reset(u, pending, amount)
        if timing == "next_step_discards_input":
            u = torch.where(pending.detach() > 0, self.value("reset_value", 0.0) + 0 * u.detach(), u)
        u = torch.where(held, v, u)
        if timing == "same_step_residual" and spec.reset == "subtract":
            u = u - r * theta
        if spec.clamp == "before_spikes" and f not in ("no clamp", "clamp after the spikes"):
            u = torch.where(u > self.value("min_v_mem", 0.0), u, self.value("min_v_mem", 0.0) + 0 * u.detach())
        u = self.leveled(u)
        if f == "flush to zero":
            u = torch.where((u.abs() < 1.1754944e-38) & (u != 0), torch.zeros_like(u), u)
        return self.emit(u, r, state, (theta, bias, amount), timing)

    def leveled(self, u: Tensor) -> Tensor:
        """The nearest of the levels, of two as near the first, with a gradient of 1."""
        spec, f = self.spec, self.fault
        if spec.state_levels is None or f == "not rounded":
            return u
        levels = torch.tensor(spec.state_levels[::-1] if f == "the last of two" else spec.state_levels)
        taken = levels[(u.detach().unsqueeze(-1) - levels).abs().argmin(-1)]
        return taken + 0 * u if f == "no gradient through levels" else u + (taken - u).detach()

    def held(self, state: dict[str, Tensor]) -> Tensor:
        """Where the membrane is held in this step."""
        if "refractory_time" not in self.spec.parameters:
            return state["left"] > 0
        time, dt = self.value("refractory_time", 0.0), torch.tensor(self.spec.dt)
        now = state["steps"] * dt
        state["steps"] = state["steps"] + 1
        passed = now - state["last"] * dt
        return (passed.double().round(decimals=4) if self.fault == "whole steps" else passed) < time

    def difference(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        """A difference of exponentials with its two resets, which the spike of the last step brings about."""
        f, theta, n = self.fault, self.value("threshold", 1.0), state["i_inh"]
        a_s, a = self.value("syn_decay", 0.0), self.value("mem_decay", 1.0)
        k = 1.0 if f == "no k" else 1 + torch.log(a_s) / (torch.log(a) - torch.log(a_s))
        if f == "k a constant":
            k = k.detach()
        r = state["pending"].detach()
        rise, fall = a_s * state["i_exc"] + x, a * n - x
        v = k * (rise + fall)
        if self.spec.reset == "value":
            v = (1 - r) * v
            rise, fall = (rise, fall) if f == "currents not reset" else ((1 - r) * rise, (1 - r) * fall)
        else:
            v = v + r * (0 if f == "old current not added" else n)
            rise, fall = (rise, fall) if f == "currents not reset" else (rise - r * theta, (1 - r) * fall)
        state |= {"i_exc": rise, "i_inh": fall, "v_mem": v}
        state["pending"] = self.surrogate(self.count(v, theta), v, theta, theta)
        return state["pending"]

    def current(self, x: Tensor, state: dict[str, Tensor], gain: Tensor) -> Tensor:
        f, old, kind = self.fault, state["i_syn"], self.spec.synapse
        kind = f.removeprefix("synapse: ") if f.startswith("synapse: ") and kind != "none" else kind
        decay = self.value("syn_decay", 0.0)
        if kind == "none":
            i = j = 0.25 * old + x if f == "a synapse" else x
        elif kind == "read_then_decay":
            i, j = decay * (old + x), old + x
        elif kind == "moving_average":
            i = j = decay * old + (1 - decay) * x
        else:
            i = j = gain * (decay * old + x if kind == "decay_then_add" else decay * (old + x))
        state["i_syn"] = i if f == "current not rounded" else self.leveled(i)
        return j

    def emit(self, u: Tensor, r: Tensor, state: dict[str, Tensor], numbers: tuple[Tensor, ...], timing: str) -> Tensor:
        spec, f = self.spec, self.fault
        theta, bias, amount = numbers
        if spec.spike_count == "none":
            state["v_mem"] = u.clamp(max=1) if f == "cut at 1" else u
            return torch.relu(u) if f == "rectified" else u if f != "cut at 1" else u.clamp(max=1)
        bias = bias * 0 if f == "no bias" else bias
        if spec.signed and f != "one sign":
            return self.emit_signed(u, state, theta, bias)
        level, tested = theta - bias, u
        if (spec.spike_test == "change") != (f == "the other test"):
            tested = torch.relu(u - state["v_mem"]) if f == "rises alone" else (u - state["v_mem"]).abs()
        n = self.count(tested, level)
        if f == "refractory":
            n = torch.where(state["pending"].detach() > 0, torch.zeros_like(n), n)
        smooth = spec.spike_count == "smooth" and f != "hard for smooth"
        s = self.smooth(u - level) if smooth else self.surrogate(n, tested, level, level)
        above = s
        if (spec.inhibition == "winner") != (f == "the other inhibition"):
            s = s * self.winner((u - level).detach())
            above = s if f == "losers not reset" else above
        scale = torch.ones(()) if f == "no scale" else self.value("spike_scale", 1.0)
        if f == "clamp before reset" and spec.clamp == "after_reset":
            u = torch.maximum(u, self.value("min_v_mem", 0.0))
        if f == "bias in the membrane":
            u = u + bias
        v = u
        if timing == "same_step":
            v = self.reset(u, s, amount)
        elif timing == "same_step_residual" and spec.reset == "subtract":
            v = u - ((s.detach() if f == "detached" else s) - r) * theta
        elif timing == "same_step_residual":
            v = u - (s - r) * u
        low = torch.tensor(0.0) if f == "clamp at 0" else self.value("min_v_mem", 0.0)
        if (spec.clamp == "after_reset" and f not in ("clamp before reset", "no clamp")) or f == "clamp at 0":
            v = torch.where(v > low, v, low + 0 * v)
        steps = min(spec.refractory_steps or 0, 1 if f == "held one step" else 9)
        state["left"] = torch.where(s.detach() > 0, torch.tensor(float(steps)), state["left"] - 1)
        state["last"] = torch.where(s.detach() > 0, state["steps"] - 1, state["last"])
        state["v_mem"], state["pending"] = v, above
        if f == "rounded after the reset":
            state["v_mem"] = self.leveled(v)
        if spec.clamp == "before_spikes" and f == "clamp after the spikes":
            state["v_mem"] = torch.maximum(v, self.value("min_v_mem", 0.0))
        if spec.adaptive:
            decay, before = self.value("adapt_decay", 0.0), state["adaptation"]
            raised = s.detach() if f == "adaptation detached" else s
            state["adaptation"] = decay * before + (1.0 if f == "a whole spike" else 1 - decay) * raised
            if f == "adapts at once":
                state["adaptation"] = decay * (before + (1 - decay) * raised)
        return u if f == "membrane for spikes" else s * scale

    def winner(self, z: Tensor) -> Tensor:
        """1 for the first of each row with the largest z."""
        numbers = z.flip(-1) if self.fault == "the last wins" else z
        found = torch.zeros_like(z).scatter(-1, numbers.argmax(-1, keepdim=True), 1.0)
        return found.flip(-1) if self.fault == "the last wins" else found

    def emit_signed(self, u: Tensor, state: dict[str, Tensor], theta: Tensor, bias: Tensor) -> Tensor:
        """Spikes of two signs, each with a threshold and a scale of its own."""
        f, own = self.fault, self.value("neg_threshold", 1.0)
        below = (theta if f == "one threshold" else own) + (-bias if f == "bias on both sides" else bias)
        p, n = self.spikes(u, theta - bias), self.spikes(-u, below)
        if f == "negative spikes detached":
            n = n.detach()
        amount = {"reset by the other threshold": theta, "no negative reset": 0 * own}.get(f, own)
        state["v_mem"], state["pending"] = u - p * theta + n * amount, p
        scale, neg_scale = self.value("spike_scale", 1.0), self.value("neg_scale", 1.0)
        if f in ("one scale", "scales swapped"):
            scale, neg_scale = (neg_scale, scale) if f == "scales swapped" else (scale, scale)
        if f == "no neg_scale":
            neg_scale = torch.ones(())
        if f == "the reset scaled":
            state["v_mem"] = u - p * theta + n * amount * neg_scale
        return p * scale - n * neg_scale

    def spikes(self, v: Tensor, level: Tensor) -> Tensor:
        """Those of one sign."""
        smooth = self.spec.spike_count == "smooth"
        return self.smooth(v - level) if smooth else self.surrogate(self.count(v, level), v, level, level)

    # ---- a run

    def run(self, x: Array, calls: Sequence[int], grad_output: Array | None) -> dict[str, Array]:
        f = self.fault
        self.p = {
            n: torch.tensor(np.array(p.value), requires_grad=p.learnable and grad_output is not None)
            for n, p in self.spec.parameters.items()
        }
        xs = torch.tensor(x, requires_grad=grad_output is not None)
        if f in ("float32", "rounded to float32"):
            xs = xs.float() if f == "float32" else xs.float().double()
        start = torch.full(x.shape[1:], 0.25 if f == "starts at 1/4" else 0.0)
        if self.spec.initial_state != "zero" and f != "starts at 0":
            start = start + self.p[self.spec.initial_state].detach()
        if "initial_v" in self.p and f != "initial_v ignored":
            start = start + self.p["initial_v"].detach()
        state = {"v_mem": start, **{name: torch.zeros(x.shape[1:]) for name in KEPT}}
        state["last"] = state["last"] - 1e6
        if f == "goes on from the last run" and self.left:
            state = self.left
        outputs, shown = [], {name: [] for name in self.spec.states}
        for piece in xs.split(list(calls)):
            if f == "state not carried":
                state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            if f == "pending reset lost":
                state["pending"] = torch.zeros_like(start)
            if f == "first step of a call skipped" and len(piece) > 1:
                piece = torch.cat([piece[1:2] * 0, piece[1:]])
            if f == "cut between calls":
                state = {name: tensor.detach() for name, tensor in state.items()}
            for x_t in piece:
                if f == "1,024 steps" and len(outputs) >= 1024:
                    x_t = x_t * 0
                if f == "rows mixed" and len(x_t) == 1:
                    x_t = x_t.mean(-1, keepdim=True).expand_as(x_t)
                if f == "one neuron lost" and x_t.shape[-1] == 1:
                    x_t = x_t * 0
                outputs.append(self.step(x_t, state))
                for name, kept in shown.items():
                    kept.append(state[name])
        self.left = {name: tensor.detach() for name, tensor in state.items()}
        return self.answer(xs, torch.stack(outputs), {n: torch.stack(s) for n, s in shown.items()}, grad_output)

    def answer(self, xs: Tensor, ys: Tensor, states: dict[str, Tensor], grad_output: Array | None) -> dict[str, Array]:
        found = {"outputs": ys.detach().numpy().copy()}
        found |= {f"state.{name}": tensor.detach().numpy().copy() for name, tensor in states.items()}
        found |= {f"final.{name}": tensor[-1].detach().numpy().copy() for name, tensor in states.items()}
        if grad_output is not None:
            wanted = {"x": xs, **{n: p for n, p in self.p.items() if p.requires_grad}}
            slopes = torch.autograd.grad(ys, list(wanted.values()), torch.tensor(grad_output), allow_unused=True)
            for (name, tensor), slope in zip(wanted.items(), slopes, strict=True):
                found[f"grad.{name}"] = (torch.zeros_like(tensor) if slope is None else slope).numpy()
        if self.fault == "last element skipped":
            found["outputs"][..., -1] = 0
        if self.fault == "last gradient skipped" and grad_output is not None:
            found["grad.x"][-1, -1, -1] = 0
        if self.fault == "last step skipped" and len(xs) == 1:
            found = {name: array * 0 for name, array in found.items()}
        if self.fault == "final state of the step before":
            found["final.v_mem"] = found["state.v_mem"][-2] if len(xs) > 1 else found["final.v_mem"] + 1
        if self.fault == "mean over the batch" and "grad.mem_decay" in found:
            found["grad.mem_decay"] = np.asarray(found["grad.mem_decay"] / xs.shape[1])
        if self.fault == "gradient of the input halved" and grad_output is not None:
            found["grad.x"] = found["grad.x"] / 2
        return {name: array for name, array in found.items() if not name.startswith(self.hide or ("-",))}


class Named(Planted):
    """A planted subject with another name."""

    def __init__(self, name: str, fault: str = "") -> None:
        super().__init__(fault)
        self.name = name

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "name": self.name}


def answer(case: Case, fault: str = "") -> dict[str, Array]:
    """What a planted subject answers to a case."""
    subject = Planted(fault)
    subject.build(case.spec.to_dict())
    return subject.run(case.x, case.lengths, case.grad_output)
