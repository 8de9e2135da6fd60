"""The state contract of the native layers, eight points, for pipelines over whole sequences, in chunks."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("brainpy")

import tracetorch as tt
from tests.bits import assert_bits
from tests.pipeline_cases import PIPELINES, N, pipeline, stimulus

# JAX compiles for every length: the default run has one pipeline with it, and sequences of 4 and 12 steps.
LONG = ("four fused", "brainpy")
NAMES = [pytest.param(name, marks=[pytest.mark.sweep] if name in LONG else []) for name in PIPELINES]


@pytest.fixture(params=NAMES)
def pipe(request):
    return pipeline(request.param)


def flat(module):
    return {f"{p}.{n}": s for p, states in tt.save_states(module).items() for n, s in states.items()}


def assert_states_equal(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert a[name] is not None
        assert_bits(a[name], b[name])


def test_chunks_are_the_whole(pipe):
    xs = stimulus()
    whole = pipe(xs)
    assert whole.shape == xs.shape
    last = flat(pipe)
    tt.reset_states(pipe)
    assert all(state is None for state in flat(pipe).values())
    assert_bits(torch.cat([pipe(part) for part in (xs[:4], xs[4:8], xs[8:])]), whole)
    for name, state in flat(pipe).items():
        assert_bits(state, last[name])


def test_1_deepcopy_in_the_middle_of_a_sequence(pipe):
    xs = stimulus()
    pipe(xs[:4])
    other = copy.deepcopy(pipe)
    assert_states_equal(other, pipe)
    assert any(state.requires_grad for state in flat(pipe).values()), "the original keeps its graph"
    assert_bits(other(xs[4:8]), pipe(xs[4:8]))
    assert_states_equal(other, pipe)


@pytest.mark.parametrize("pipe", [name for name in NAMES if name.values != ("norse",)], indirect=True)
def test_2_pickle_and_torch_save_in_the_middle_of_a_sequence(pipe):
    """Norse 1.1.0's parameters cannot be pickled, by anybody."""
    xs = stimulus()
    pipe(xs[:4])
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    others = [pickle.loads(pickle.dumps(pipe)), torch.load(file, weights_only=False)]
    rest = pipe(xs[4:8])
    for other in others:
        assert_bits(other(xs[4:8]), rest)
        assert_states_equal(other, pipe)


def test_3_another_batch_size_is_refused_before_a_reset_and_right_after_it(pipe):
    pipe(stimulus())
    kept = flat(pipe)
    with pytest.raises(ValueError, match=r"shape \[3, 5\] from the last call.*7.*reset_states"):
        pipe(stimulus(batch=7))
    assert all(value is kept[name] for name, value in flat(pipe).items()), "a refused input changes no state"
    tt.reset_states(pipe)
    xs = stimulus(batch=7)
    found = pipe(xs)
    fresh = copy.deepcopy(pipe)
    tt.reset_states(fresh)
    assert_bits(fresh(xs), found)


def test_4_state_dict_into_a_fresh_pipeline(pipe):
    xs = stimulus()
    pipe(xs)
    tt.detach_states(pipe)
    with torch.no_grad():
        for parameter in pipe.parameters():
            parameter += 0.01
    fresh = copy.deepcopy(pipe)
    tt.reset_states(fresh)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    names = set(pipe.state_dict())
    assert not {n for n in names if n.rpartition(".")[2] in ("mem", "v_mem", "V", "v", "i_syn")}
    fresh.load_state_dict(pipe.state_dict())
    assert all(state is None for state in flat(fresh).values())
    tt.reset_states(pipe)
    assert_bits(fresh(xs), pipe(xs))
    kept = flat(pipe)
    pipe.load_state_dict(pipe.state_dict())
    assert all(value is kept[name] for name, value in flat(pipe).items())


def test_5_two_pipelines_never_touch_each_other(pipe):
    other = copy.deepcopy(pipe)
    xs, others = stimulus(), stimulus(batch=2, seed=5)
    alone = copy.deepcopy(pipe)(xs)
    found = []
    for part, beside in zip(xs.split(4), others.split(4), strict=True):
        found.append(pipe(part))
        other(beside)
    assert_bits(torch.cat(found), alone)
    tt.reset_states(other)
    assert all(state is not None for state in flat(pipe).values())
    for (_, mine), (_, theirs) in zip(pipe.named_parameters(), other.named_parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


def test_6_double_and_to_device():
    pipe = pipeline("four")
    pipe(stimulus())
    values = {name: state.double() for name, state in flat(pipe).items()}
    pipe.double()
    for name, state in flat(pipe).items():
        assert_bits(state, values[name])
    with pytest.raises(ValueError, match="x64"):
        pipe(stimulus(dtype=torch.float64))
    pipe.to("meta")
    assert all(state.device.type == "meta" for state in flat(pipe).values())
    with pytest.raises(ValueError, match=r"seam 0.*on meta.*Remedy"):
        pipe(stimulus())


def test_7_checkpointing_gives_the_right_gradients(pipe):
    xs, gradients = stimulus(), []
    for way in (pipe, lambda part: tt.checkpoint(pipe, part)):
        tt.reset_states(pipe)
        pipe.zero_grad()
        ys = torch.cat([way(part) for part in xs.split(4)])
        ys.square().sum().backward()
        gradients.append([ys.detach(), *(p.grad.clone() for p in pipe.parameters() if p.grad is not None)])
        tt.detach_states(pipe)
    assert len(gradients[0]) > 1
    for a, b in zip(*gradients, strict=True):
        assert_bits(a, b)


def test_torchs_own_checkpointing_is_refused(pipe):
    with pytest.raises(RuntimeError, match=r"tracetorch\.checkpoint"):
        torch.utils.checkpoint.checkpoint(pipe, stimulus(), use_reentrant=False)


def test_8_a_second_backward_says_what_to_do(pipe):
    xs = stimulus()
    pipe(xs[:4]).sum().backward()
    loss = pipe(xs[4:8]).sum()
    with pytest.raises(RuntimeError, match=r"the state '[\w.]+' of an earlier call.*detach_states\(\)"):
        loss.backward()
    for ending in (tt.reset_states, tt.detach_states):
        ending(pipe)
        pipe(xs[:4]).sum().backward()
        ending(pipe)
        pipe(xs[4:8]).sum().backward()
        ending(pipe)
    pipe(xs[:4]).sum().backward(retain_graph=True)
    pipe(xs[4:8]).sum().backward()


def test_saved_states_come_back_with_their_graph(pipe):
    xs = stimulus().requires_grad_()
    pipe(xs[:4])
    saved = tt.save_states(pipe)
    after = pipe(xs[4:8])
    tt.reset_states(pipe)
    tt.load_states(pipe, saved)
    again = pipe(xs[4:8])
    assert_bits(again, after)
    (a,) = torch.autograd.grad(after.sum(), xs, retain_graph=True)
    (b,) = torch.autograd.grad(again.sum(), xs)
    assert_bits(a, b)
    assert a[:4].any(), "gradients flow through saved states"
    with pytest.raises(ValueError, match="on one side only"):
        tt.load_states(pipe, {})


def test_zero_states_keep_their_shapes(pipe):
    pipe(stimulus())
    tt.zero_states(pipe)
    assert flat(pipe)
    assert not any(state.any() for state in flat(pipe).values())


def test_a_stage_that_fails_late_leaves_all_states():
    pipe = pipeline("four")
    pipe(stimulus())
    kept = flat(pipe)
    pipe.stages[6].module = nn.Linear(N + 1, N)
    with pytest.raises(ValueError, match=r"seam 6, stage 5 \(LIB\) -> stage 6 \(Linear\)"):
        pipe(stimulus())
    assert all(value is kept[name] for name, value in flat(pipe).items())
