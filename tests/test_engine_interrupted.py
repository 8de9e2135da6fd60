"""A call that is broken off: by a signal whose handler raises, or for want of memory. The next one is right."""

import signal
import threading
import warnings

import pytest
import torch
from torch import nn

import tracetorch as tt
from tests.layer_cases import assert_bits, noise
from tests.test_compiler import child, finished
from tracetorch.fused import FuseWarning
from tracetorch.fused.untraceable import of_the_step

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no such signals here")


class Alarm(Exception):
    """What a user's handler raises."""


ACT = []  # what a step does beside its arithmetic, last first


class Native(tt.snn.Layer):
    """mem' = mem / 2 + x, and whatever is in ACT."""

    def __init__(self):
        super().__init__()
        self.define_state("mem")
        self.weight = nn.Parameter(torch.tensor(0.5))

    def step(self, x, mem):
        if ACT:
            ACT.pop()()
        mem = self.weight * mem + x
        return mem, mem


class Plain(nn.Module):
    """The same without anything of ours, for tt.fuse."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, state=None):
        if ACT:
            ACT.pop()()
        state = torch.zeros_like(x) if state is None else state
        state = self.weight * state + x
        return state, state


class Handler:
    """A handler that is no plain function."""

    def __call__(self, number, frame):
        raise Alarm("by an object")

    def method(self, number, frame):
        raise Alarm("by a method")


def function(number, frame):
    raise Alarm("by a function")


def deeper(number, frame):
    function(number, frame)


HANDLERS = {"function": function, "deeper": deeper, "object": Handler(), "method": Handler().method}


def outputs(layer, xs):
    found = layer.unroll(xs) if isinstance(layer, Native) else layer.unroll(xs)[0]
    if isinstance(layer, Native):
        layer.reset_states()
    return found


def while_tracing(kind, act):
    """A layer of no framework is called once before it is traced."""
    ACT[:] = [act] if kind == "native" else [act, lambda: None]


def made(kind):
    return Native() if kind == "native" else tt.fuse(nn.Sequential(Plain()))[0]


@pytest.fixture
def alarm():
    """Sets SIGALRM's handler, and puts back the one before."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda name: signal.signal(signal.SIGALRM, HANDLERS[name])
    signal.signal(signal.SIGALRM, before)
    ACT.clear()


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("kind", ["native", "fused"])
@pytest.mark.parametrize("name", HANDLERS)
def test_what_a_signal_s_handler_raises_while_a_step_is_traced_is_the_user_s(name, kind, backend, alarm):
    layer, xs = made(kind), noise(5, 2, 3)
    alarm(name)
    while_tracing(kind, lambda: signal.raise_signal(signal.SIGALRM))
    with tt.backend(backend), pytest.raises(Alarm):
        outputs(layer, xs)
    # Nothing is remembered of it: the next call runs through a kernel, without a word.
    with tt.backend(backend):
        ours = outputs(layer, xs)
    with tt.backend("eager"):
        assert_bits(ours, outputs(made(kind), xs))


def test_the_handler_of_another_signal_counts_too(alarm):
    before = signal.signal(signal.SIGUSR1, function)
    try:
        ACT.append(lambda: signal.raise_signal(signal.SIGUSR1))
        with pytest.raises(Alarm):
            outputs(made("native"), noise(5, 2, 3))
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("kind", ["native", "fused"])
def test_memory_that_runs_out_while_a_step_is_traced_is_no_fault_of_the_step(kind):
    def none_left():
        raise MemoryError

    layer, xs = made(kind), noise(5, 2, 3)
    while_tracing(kind, none_left)
    with pytest.raises(MemoryError):
        outputs(layer, xs)
    with tt.backend("cpu"):
        outputs(layer, xs)


@pytest.mark.parametrize("kind", ["native", "fused"])
def test_what_the_step_itself_raises_is_still_its_own(kind):
    def fails():
        raise Alarm("of the step")

    layer = made(kind)
    while_tracing(kind, fails)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        outputs(layer, noise(5, 2, 3))
    assert [each.category for each in said] == [FuseWarning]
    assert "of the step" in str(said[0].message)


def test_a_thread_can_ask_too():
    found = []

    def ask():
        try:
            raise ValueError
        except ValueError as error:
            found.append(of_the_step(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [True]


# ---- memory ----------------------------------------------------------------------------------------------------------

# The address space ends a little above what is in use, at several heights: before the output, the state, the gradient.
OUT_OF_MEMORY = """
import resource, torch, tracetorch as tt
from tracetorch.fused import memory

def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def layer():
    torch.manual_seed(0)
    return tt.snn.LIB(512, quant_fn=tt.functional.round_ste())

small, big, failed = torch.rand(20, 2, 512), torch.rand(16000, 2, 512, requires_grad=True), 0
ours = layer()
for room in (1, 20, 60, 90, 130):
    for grad in (False, True):
        ours.reset_states()
        with tt.backend("cpu"):
            ours.unroll(small)
        before = {name: state.clone() for name, state in ours.save_states().items()}
        memory.release()
        resource.setrlimit(resource.RLIMIT_AS, (used() + (room << 20), -1))
        try:
            with tt.backend("cpu"), torch.set_grad_enabled(grad):
                ys = ours.unroll(big)
        except (RuntimeError, MemoryError) as error:
            failed += 1
            assert "memory" in str(error), error
            for name, state in ours.save_states().items():
                assert torch.equal(state, before[name]), name
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        ours.load_states(before)
        with tt.backend("cpu"):
            ys = ours.unroll(small)
        theirs = layer()
        theirs.load_states(before)
        with tt.backend("eager"):
            assert torch.equal(ys, theirs.unroll(small))
print(failed)
"""


def test_a_call_that_runs_out_of_memory_leaves_the_states_and_the_next_call_right():
    failed = int(finished(child(OUT_OF_MEMORY)))
    assert 4 <= failed < 10
