"""sinabs: what its own classes do not compute, or do not copy, in their calling convention (sinabs 3.1.3)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from sinabs import activation
from sinabs import layers as sl
from torch import Tensor, nn

from tracetorch.core.spec import SpecError
from tracetorch.functional.spikes import heaviside, spike_count
from tracetorch.functional.surrogates import OpaqueSurrogate, Surrogate

# sinabs.activation class -> (our name, its fields in the order of ours)
SURROGATES: Mapping[type, tuple[str, tuple[str, ...]]] = {
    activation.SingleExponential: ("single_exponential", ("grad_width", "grad_scale")),
    activation.Heaviside: ("heaviside_window", ("window",)),
    activation.Gaussian: ("gaussian", ("mu", "sigma", "grad_scale")),
    activation.MultiGaussian: ("multi_gaussian", ("mu", "sigma", "h", "s", "grad_scale")),
    activation.PeriodicExponential: ("periodic_exponential", ("grad_width", "grad_scale")),
}


# A trained decay of 0 times threshold / 0 is not a number; times threshold / 2**-60 it is the threshold, and what it
# leaves of a membrane is far below a rounding.
_LOWEST = 2.0**-60


class SurrogateGradient:
    """A `surrogate_grad_fn` that sinabs has not."""

    def __init__(self, surrogate: Surrogate) -> None:
        self.surrogate = surrogate

    def __call__(self, v_mem: Tensor, spike_threshold: Tensor) -> Tensor:
        """ds/dv at a membrane, any shape."""
        return self.surrogate.vjp(torch.ones_like(v_mem), v_mem - spike_threshold, spike_threshold, v_mem)

    def __repr__(self) -> str:
        return f"SurrogateGradient({self.surrogate})"


class Spike:
    """A `spike_fn` that sinabs has not: a strict comparison, or a gradient that also reaches the threshold.

    Args:
        count: "single", "multiple" or "limited", as in `NeuronSpec.spike_count`.
        strict: with "single", a spike where v > threshold; else where v >= threshold.
        limit: with "limited", the most spikes a step.
        threshold_gradient: whether the surrogate's gradient reaches the threshold too (in sinabs it does not).
        floor: whether the membrane that is tested is not below 0, as what `min_v_mem=0` makes of it after the test.
    """

    required_states = ("v_mem",)
    floor = False

    def __init__(
        self, count: str, strict: bool, limit: int | None, threshold_gradient: bool, floor: bool = False
    ) -> None:
        self.count, self.strict, self.limit, self.threshold_gradient = count, strict, limit, threshold_gradient
        self.floor = floor

    def apply(self, v_mem: Tensor, spike_threshold: Tensor, surrogate_grad_fn: Any) -> Tensor:
        """As the `apply` of sinabs's spike functions."""
        surrogate = named_surrogate(surrogate_grad_fn)
        v_mem = torch.relu(v_mem) if self.floor else v_mem
        z = v_mem - (spike_threshold if self.threshold_gradient else spike_threshold.detach())
        if self.count == "single":
            return heaviside(z, spike_threshold.detach(), surrogate, strict=self.strict, v=v_mem)
        return spike_count(v_mem, spike_threshold.detach(), z, surrogate, limit=self.limit)

    def __repr__(self) -> str:
        sign = ">" if self.strict else ">="
        floor = ", floor=True" if self.floor else ""
        return f"Spike({self.count}, {sign}, limit={self.limit}, threshold_gradient={self.threshold_gradient}{floor})"


def named_surrogate(function: Any) -> Surrogate:
    """The surrogate of a `surrogate_grad_fn`; a user's own callable is opaque.

    Raises:
        SpecError: not callable.
    """
    if isinstance(function, SurrogateGradient):
        return function.surrogate
    if type(function) in SURROGATES:
        name, fields = SURROGATES[type(function)]
        return Surrogate(name, tuple((field, float(getattr(function, field))) for field in fields))
    if not callable(function):
        raise SpecError(f"surrogate_grad_fn={function!r}: must be a callable of (v_mem, spike_threshold)")
    return OpaqueSurrogate(function=function)


def spike_choices(layer: Any) -> dict[str, Any]:
    """The fields of a spec that a layer's `spike_fn` decides.

    Raises:
        SpecError: a spike function of the user's own.
    """
    function = layer.spike_fn
    if isinstance(function, Spike):
        choices: dict[str, Any] = {"spike_count": function.count, "comparison": ">" if function.strict else ">="}
        return {**choices, "max_spikes": function.limit, "threshold_gradient": function.threshold_gradient}
    choices = {"comparison": ">=", "threshold_gradient": False}
    if function is activation.SingleSpike:
        return {**choices, "spike_count": "single"}
    limit = function.max_num_spikes_per_bin if type(function) is activation.MaxSpike else None
    if function is activation.MultiSpike or (type(function) is activation.MaxSpike and limit is None):
        return {**choices, "spike_count": "multiple"}
    if type(function) is activation.MaxSpike:
        return {**choices, "spike_count": "limited", "max_spikes": limit}
    raise SpecError(
        f"spike_fn={function!r}: only SingleSpike, MultiSpike and MaxSpike can be read; what another one emits is "
        "known to no other framework: tt.fuse traces it as it is"
    )


class Reset:
    """A `reset_fn` that sinabs has not. Holds the layer it serves: an amount of threshold / alpha follows its training.

    Args:
        kind: "none", "subtract" or "value", as in `NeuronSpec.reset`.
        over_decay: subtract threshold / alpha, which the next decay turns into the threshold.
        gradient: as in `NeuronSpec.reset_gradient`.
        amount: of "subtract", in the place of the threshold; of "value", what the membrane is set to (None: 0).
    """

    def __init__(
        self, kind: str, over_decay: bool = False, gradient: str = "attached", amount: Tensor | None = None
    ) -> None:
        self.kind, self.over_decay, self.gradient, self.amount = kind, over_decay, gradient, amount
        self.layer: Any = None

    def __call__(self, spikes: Tensor, state: dict[str, Tensor], threshold: Tensor) -> dict[str, Tensor]:
        """As sinabs's reset functions: the state after the reset."""
        if self.kind == "none":
            return state.copy()
        v = state["v_mem"]
        # Spikes are float32 whatever the membrane is; times a threshold of no dimension they would round to float32.
        s = (spikes.detach() if self.gradient == "detached" else spikes).to(v.dtype)
        amount = None if self.amount is None else self.amount.to(v)
        if self.kind == "value":
            once = s if self.single else s + (s.clamp(max=1) - s).detach()
            kept = v.detach() if self.gradient == "membrane_stopped" else v
            return {**state, "v_mem": v - once * (kept if amount is None else kept - amount)}
        if amount is not None:
            threshold = amount
        elif self.over_decay:
            assert self.layer is not None
            threshold = threshold / self.layer.alpha_mem_calculated
        return {**state, "v_mem": v - s * threshold}

    def serving(self, layer: nn.Module) -> Reset:
        """The same reset for another layer."""
        twin = copy.copy(self)
        twin.layer = layer
        return twin

    @property
    def single(self) -> bool:
        """Whether the layer emits at most one spike a step."""
        assert self.layer is not None
        return bool(spike_choices(self.layer)["spike_count"] == "single")

    def __repr__(self) -> str:
        amount = ", threshold / alpha" if self.over_decay else "" if self.amount is None else f", {self.amount}"
        gradient = "" if self.gradient == "attached" else f", {self.gradient}"
        return f"Reset({self.kind}{amount}{gradient})"


class _Faithful:
    """Mixin of a sinabs layer that copies faithfully.

    sinabs 3.1.3 copies a layer by constructing it anew from its arguments: the copy shares `reset_fn` with the
    original, forgets what was frozen (`requires_grad`) and the training mode. This changes that.
    """

    reset_fn: Any

    def _serve(self) -> None:
        """Give a reset of ours a copy of its own that holds this layer."""
        if isinstance(self.reset_fn, Reset):
            assert isinstance(self, nn.Module)
            self.reset_fn = self.reset_fn.serving(self)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        twin: Any = super().__deepcopy__(memo)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        for name, parameter in self.named_parameters():
            getattr(twin, name).requires_grad_(parameter.requires_grad)
        return twin.train(self.training)


class LIF(_Faithful, sl.LIF):
    """A `sinabs.layers.LIF` that copies faithfully, and can clamp its decays, scale its input, or filter it first.

    Args:
        clamp_alpha: keep trained alphas in [0, 1] in the forward pass, as snnTorch does with its alpha and beta.
        synapse: "add_then_decay", sinabs's own; or a synapse before it, i in the place of the input:
            "decay_then_add", i = alpha_syn*i + x; "moving_average", i = alpha_syn*i + (1-alpha_syn)*x.
        input_gain: a factor of the input, constant, or None.
    """

    def __init__(
        self,
        *,
        clamp_alpha: bool = False,
        synapse: str = "add_then_decay",
        input_gain: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.clamp_alpha = clamp_alpha
        self.synapse = synapse
        self.input_gain = None if input_gain is None else nn.Parameter(input_gain.clone(), requires_grad=False)
        self._serve()

    def forward(self, input_data: Tensor) -> Tensor:
        """As `sinabs.layers.LIF.forward`: [B, T, ...] -> [B, T, ...]."""
        if self.input_gain is not None:
            input_data = input_data * self.input_gain
        if self.synapse == "add_then_decay" or self._alpha_syn is None:
            output: Tensor = super().forward(input_data)
            return output
        currents, last = self._filtered(input_data)
        output = super().forward(currents)
        self.i_syn = last  # no view: sinabs's `reset_states` detaches in place
        return output

    def _filtered(self, input_data: Tensor) -> tuple[Tensor, Tensor]:
        """The currents of the synapse before sinabs's own step, from the state `i_syn` on, and the last of them."""
        shape = (input_data.shape[0], *input_data.shape[2:])
        if not self.is_state_initialised() or not self.state_has_shape(shape):
            self.init_state_with_shape(shape)
        alpha = self._alpha_syn
        assert alpha is not None
        added = (1 - alpha) * input_data if self.synapse == "moving_average" else input_data
        current, currents = self.i_syn, []
        for x in added.unbind(1):
            current = alpha * current + x
            currents.append(current)
        return torch.stack(currents, 1), current

    @property
    def _alpha_syn(self) -> Tensor | None:
        alpha = super().alpha_syn_calculated
        return None if alpha is None else self._clamped(alpha)

    @property
    def alpha_mem_calculated(self) -> Tensor:
        """The decay of the membrane in one step; where a reset divides by it, never quite 0."""
        alpha = self._clamped(super().alpha_mem_calculated)
        return alpha.clamp(min=_LOWEST) if self.clamp_alpha and getattr(self.reset_fn, "over_decay", False) else alpha

    @property
    def alpha_syn_calculated(self) -> Tensor | None:
        """The decay of sinabs's own synapse in one step; None without one, or where ours stands before it."""
        return self._alpha_syn if self.synapse == "add_then_decay" else None

    def _clamped(self, alpha: Tensor) -> Tensor:
        return alpha.clamp(0, 1) if self.clamp_alpha else alpha

    @property
    def _param_dict(self) -> dict[str, Any]:
        own = {"clamp_alpha": self.clamp_alpha, "synapse": self.synapse, "input_gain": self.input_gain}
        return {**super()._param_dict, **own}


class IAF(_Faithful, sl.IAF):
    """A `sinabs.layers.IAF` that copies faithfully."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._serve()


class ExpLeak(_Faithful, sl.ExpLeak):
    """A `sinabs.layers.ExpLeak` that copies faithfully."""


class ALIF(_Faithful, sl.ALIF):
    """A `sinabs.layers.ALIF` that copies faithfully.

    sinabs 3.1.3 forgets `norm_input=False` in a copy, and cannot copy one with `train_alphas` and no synapse.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._serve()

    @property
    def _param_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("norm_input", "train_alphas", "shape", "record_states")}
        own |= {name: getattr(self, name) for name in ("adapt_scale", "spike_fn", "reset_fn", "surrogate_grad_fn")}
        own |= {"spike_threshold": self.b0, "min_v_mem": self.min_v_mem}
        syn = self.alpha_syn if self.train_alphas else self.tau_syn
        # Only whether there is a synapse counts: the copy's raw numbers are then set to the original's.
        return {**own, "tau_mem": 1.0, "tau_adapt": 1.0, "tau_syn": None if syn is None else 1.0}
