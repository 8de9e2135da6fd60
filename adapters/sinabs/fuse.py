"""sinabs: how its layers are fused (sinabs 3.1.3). LIF, IAF, ExpLeak, ALIF and their Squeeze forms.

A call is a whole sequence [B, T, ...]. The step is `sinabs.layers.functional.lif_forward_single`, or ALIF's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sinabs import layers as sl
from sinabs.layers.alif import ALIFSqueeze
from sinabs.layers.functional.lif import lif_forward_single
from sinabs.layers.reshape import SqueezeMixin
from torch import Tensor, nn

from tracetorch.adapters.fusing.twin import Recipe, Twin
from tracetorch.adapters.sinabs.read import alif_step

PACKAGE = "sinabs"
_VOLATILE = ("recordings", "firing_rate", "record_states", "i_syn")


def _lif(layer: Any, x: Tensor, states: Mapping[str, Tensor]) -> Sequence[Tensor]:
    spikes, after = lif_forward_single(
        input_data=x,
        alpha_mem=layer.alpha_mem_calculated,
        alpha_syn=layer.alpha_syn_calculated,
        state=dict(states),
        spike_threshold=layer.spike_threshold,
        spike_fn=layer.spike_fn,
        reset_fn=layer.reset_fn,
        surrogate_grad_fn=layer.surrogate_grad_fn,
        min_v_mem=layer.min_v_mem,
        norm_input=layer.norm_input,
    )
    return [spikes, *(after[name] for name in states)]


def _alif(layer: Any, x: Tensor, states: Mapping[str, Tensor]) -> Sequence[Tensor]:
    spikes, after = alif_step(layer, x, states)
    return [spikes, *(after[name] for name in states)]


class _Sequence(Twin):
    """A layer whose call is a sequence."""

    def forward(self, input_data: Tensor) -> Tensor:
        """As the framework's: [B, T, ...] -> [B, T, ...], or [B*T, ...] for a Squeeze layer."""
        layer: Any = self
        if isinstance(self, SqueezeMixin):
            return layer.squeeze_forward(input_data, self._sequence)
        return self._sequence(input_data)

    def _sequence(self, input_data: Tensor) -> Tensor:
        raise NotImplementedError

    def first(self, input_data: Tensor) -> dict[str, Tensor]:
        """The states before the first step; those that a call begins with zero, in the input's dtype."""
        fresh = self.begin((input_data.shape[0], *input_data.shape[2:]))
        states = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        return {name: state.to(input_data.dtype) if fresh else state for name, state in states.items()}

    def begin(self, shape: tuple[int, ...]) -> bool:
        """Make the states fit, as the framework's forward does. Returns whether they are new: zero, in float32."""
        raise NotImplementedError


class LIFTwin(_Sequence):
    """Of `sinabs.layers.LIF`, `IAF` and `ExpLeak`."""

    def recipe(self) -> Recipe:
        return Recipe(tuple(self._buffers), _lif, _VOLATILE)

    def begin(self, shape: tuple[int, ...]) -> bool:
        layer: Any = self
        if layer.is_state_initialised() and layer.state_has_shape(shape):
            return False
        if layer.is_state_initialised() and layer.has_trailing_dimension(shape[1:]):
            layer.handle_state_batch_size_mismatch(shape[0])
            return False
        layer.init_state_with_shape(shape)
        return True

    def _sequence(self, input_data: Tensor) -> Tensor:
        layer: Any = self
        if input_data.ndim < 2:
            return sl.LIF.forward(layer, input_data)
        names = tuple(self._buffers)
        result = self.run_sequence(input_data, 1, self.first(input_data), names if layer.record_states else ())
        if result is None:
            return sl.LIF.forward(layer, input_data)
        layer.v_mem = result.last["v_mem"]
        layer.i_syn = result.last.get("i_syn")
        layer.recordings = dict(result.recorded)
        layer.firing_rate = result.outputs.mean()
        return result.outputs


class ALIFTwin(_Sequence):
    """Of `sinabs.layers.ALIF`."""

    @staticmethod
    def note(module: nn.Module) -> str:
        """With record_states."""
        layer: Any = module
        return "record_states: its own code, until it is switched off" if layer.record_states else ""

    def recipe(self) -> Recipe:
        return Recipe(tuple(self._buffers), _alif, _VOLATILE[:-1])

    def begin(self, shape: tuple[int, ...]) -> bool:
        layer: Any = self
        if layer.is_state_initialised() and layer.state_has_shape(shape):
            return False
        layer.init_state_with_shape(shape)
        return True

    def _sequence(self, input_data: Tensor) -> Tensor:
        layer: Any = self
        # Quirk of 3.1.3: what an ALIF records is the next step's value before its reset. Its own code does that.
        if layer.record_states or input_data.ndim < 2:
            return sl.ALIF.forward(layer, input_data)
        result = self.run_sequence(input_data, 1, self.first(input_data))
        if result is None:
            return sl.ALIF.forward(layer, input_data)
        # Quirk of 3.1.3: i_syn is not kept between calls.
        for name in ("b", "v_mem", "spike_threshold"):
            setattr(layer, name, result.last[name])
        layer.recordings = {}
        layer.firing_rate = result.outputs.sum() / result.outputs.numel()
        return result.outputs


_MIXINS = {
    sl.LIF.forward: LIFTwin,
    sl.LIFSqueeze.forward: LIFTwin,
    sl.IAFSqueeze.forward: LIFTwin,
    sl.ExpLeakSqueeze.forward: LIFTwin,
    sl.ALIF.forward: ALIFTwin,
    ALIFSqueeze.forward: ALIFTwin,
}


def choose(module: nn.Module) -> type[Twin] | str | None:
    """The mixin of a layer that can be fused, why one cannot, or None: no neuron of this framework."""
    if not isinstance(module, sl.StatefulLayer):
        return None
    if hasattr(module, "rec_connect"):
        return "recurrent: its spikes return through rec_connect at every step"
    mixin = _MIXINS.get(type(module).forward)
    return mixin if mixin is not None else "its forward is not one of sinabs's LIF, IAF, ExpLeak and ALIF"


def adopt(module: nn.Module) -> None:
    """Give a copied layer states of its own: sinabs resets them in place."""
    if isinstance(module, sl.StatefulLayer):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
