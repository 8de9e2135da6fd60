"""An exported program's kernel takes whatever the program is called with: right, or refused."""

import pytest
import torch
from torch import nn

from tests.layer_cases import Mine, assert_bits, noise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Mine(4)

    def forward(self, xs):
        self.layer.reset_states()
        return self.layer.unroll(xs)


@pytest.fixture(scope="module")
def exported():
    net = Net()
    return net, torch.export.export(net, (noise(5, 3, 4),)).module()


def test_an_input_of_another_layout_is_read_as_what_it_is(exported):
    net, program = exported
    xs = noise(3, 5, 4).transpose(0, 1)
    gradients = []
    for run in (net, program):
        given = xs.clone().requires_grad_()  # keeps its strides
        assert not given.is_contiguous()
        ys = run(given)
        assert_bits(ys, net(xs))
        (ys * noise(4, 3, 5, seed=1).permute(2, 1, 0)).sum().backward()
        gradients.append(given.grad)
    assert_bits(*gradients)


def test_an_input_of_another_dtype_is_refused(exported):
    with pytest.raises(TypeError, match=r"torch\.float64"):
        exported[1](noise(5, 3, 4).double())


def test_the_operation_itself_refuses_what_its_kernel_would_read_past(exported):
    from tracetorch.fused import library

    name = next(name for name, kernel in library._KERNELS.items() if kernel.signature.states == ("mem", "slow"))
    given = [noise(5, 3, 4), noise(3, 4), noise(3, 4), noise(4), noise(1)]
    for wrong in (given[:3], given, [noise(5, 3, 4), noise(4), *given[2:]]):
        with pytest.raises(TypeError, match="tracetorch::scan"):
            torch.ops.tracetorch.scan(name, 0, wrong)
