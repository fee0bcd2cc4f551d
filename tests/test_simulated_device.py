"""The simulated device: it raises like a GPU, counts its traffic, and keeps the bits."""

import copy

import pytest
import torch
from torch import Tensor, nn

from simulated_device import Generator, Traffic, needs_simulation, simulated_device

pytestmark = needs_simulation

CPU_MASK, CPU_ROWS = torch.tensor([True, False, True]), torch.tensor([2, 0])

COSTS = {
    "arithmetic": (lambda x: 2 * x + x, Traffic(kernels=2)),
    "arithmetic in place": (lambda x: x.mul_(2), Traffic(kernels=1)),
    "a number of the CPU": (lambda x: x + torch.tensor(1.0), Traffic(kernels=1)),
    "views": (lambda x: x.unsqueeze(0).expand(2, -1).mT[1:].detach(), Traffic()),
    "an allocation": (lambda x: x.new_empty(4), Traffic()),
    "zeros": (lambda x: torch.zeros(4, device=x.device), Traffic(kernels=1)),
    "another dtype": (lambda x: x.to(torch.float16), Traffic(kernels=1)),
    "double precision": (lambda x: x.double(), Traffic(kernels=1, float64=1)),
    "to the CPU": (lambda x: x.cpu(), Traffic(to_cpu=1)),
    "copied to the CPU": (lambda x: torch.empty(3).copy_(x), Traffic(to_cpu=1)),
    "tolist": (lambda x: x.tolist(), Traffic(to_cpu=1)),
    "to the device": (lambda x: torch.ones(2).to(x), Traffic(to_device=1)),
    "copied to the device": (lambda x: x.copy_(torch.ones(3)), Traffic(to_device=1)),
    "torch.tensor": (lambda x: torch.tensor([1.0], device=x.device), Traffic(to_device=1)),
    "new_tensor": (lambda x: x.new_tensor([1.0]), Traffic(to_device=1)),
    "item": (lambda x: x[0].item(), Traffic(read_backs=1)),
    "float": (lambda x: float(x[0]), Traffic(read_backs=1)),
    "bool": (lambda x: bool(x[0] > 0), Traffic(kernels=1, read_backs=1)),
    "equal": (lambda x: torch.equal(x, x), Traffic(kernels=1, read_backs=1)),
    "nonzero": (lambda x: x.nonzero(), Traffic(kernels=1, read_backs=1)),
    "unique": (lambda x: x.unique(), Traffic(kernels=1, read_backs=1)),
    "its mask": (lambda x: x[x > 0], Traffic(kernels=2, read_backs=1, selections=1)),
    "selected": (lambda x: x.masked_select(x > 0), Traffic(kernels=2, read_backs=1, selections=1)),
    "the CPU's mask": (lambda x: x[CPU_MASK], Traffic(kernels=1, to_device=1, selections=1)),
    "the CPU's rows": (lambda x: x[CPU_ROWS], Traffic(kernels=1, to_device=1)),
    "rows written": (lambda x: x.index_put_((CPU_ROWS,), -x[1:]), Traffic(kernels=2, to_device=1)),
    "torch.where": (lambda x: torch.where(x > 0, x, x), Traffic(kernels=2)),
}

MIXTURES = {
    "sum": lambda x, cpu: x + cpu,
    "sum in place": lambda x, cpu: cpu.add_(x),
    "number in place": lambda x, cpu: cpu.sum().add_(x.sum()),
    "product of matrices": lambda x, cpu: torch.outer(x, cpu) @ cpu,
    "cat": lambda x, cpu: torch.cat([x, cpu]),
    "stack of numbers": lambda x, cpu: torch.stack([x.sum(), cpu.sum()]),
    "out": lambda x, cpu: torch.add(x, 1.0, out=cpu),
    "indices of the device": lambda x, cpu: cpu[x.argsort()],
    "values of the CPU": lambda x, cpu: x.index_put_((CPU_ROWS,), cpu[:2]),
    "CPU's generator": lambda x, cpu: x.normal_(generator=torch.Generator()),
    "CPU's generator for new numbers": lambda x, cpu: torch.randn(
        3, device=x.device, generator=torch.Generator()
    ),
    "numpy": lambda x, cpu: x.numpy(),
    "the device's generator": lambda x, cpu: torch.randn(3, generator=Generator()),
}


@pytest.fixture(autouse=True)
def device():
    with simulated_device() as device:
        yield device


def values():
    return torch.tensor([0.5, -1.0, 2.0])


@pytest.mark.parametrize("case", COSTS)
def test_every_event_is_counted(case, device):
    operation, cost = COSTS[case]
    x = values().to("sim")
    before = device.traffic()
    operation(x)
    assert device.traffic() - before == cost


def test_work_on_the_cpu_costs_nothing_and_a_reset_starts_again(device):
    x = values().double()
    assert float((x @ x).sqrt() * x[x > 0].sum()) > 0
    assert device.traffic() == Traffic()
    values().to("sim").cpu()
    assert device.traffic() == Traffic(to_device=1, to_cpu=1)
    device.reset()
    assert device.traffic() == Traffic()
    assert Traffic(to_device=7, to_cpu=2, read_backs=3, kernels=9).waits == 5


@pytest.mark.parametrize("case", MIXTURES)
def test_mixing_devices_raises(case):
    with pytest.raises(RuntimeError, match=r"Expected .* (device|generator)|numpy"):
        MIXTURES[case](values().to("sim"), values())


def test_results_stay_on_the_device():
    x = values().to("sim")
    assert x.device == torch.device("sim:0")
    assert (x.exp() + 1).sum().device == copy.deepcopy(x).device == x.device
    assert torch.zeros_like(x, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("change", [Tensor.t_, lambda x: x.unsqueeze_(0), Tensor.squeeze_])
def test_shapes_may_change_in_place(change):
    ours, theirs = values()[None].to("sim"), values()[None]
    change(ours), change(theirs)
    assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
    assert ours.tolist() == theirs.tolist()


def test_the_default_device_may_be_the_simulated_one():
    with torch.device("sim"):
        made = [torch.zeros(2), torch.tensor([1.0]), torch.arange(3), nn.Linear(3, 2).weight]
        drawn = torch.randn(5, generator=Generator().manual_seed(0))
    assert {x.device.type for x in [*made, drawn]} == {"sim"}
    assert made[2].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_device_generator_draws_the_bits_of_a_cpu_generator(dtype):
    ours, theirs = Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for shape in [(5,), (40, 7)]:
        drawn = torch.randn(shape, generator=ours, dtype=dtype, device="sim")
        assert torch.equal(drawn.cpu(), torch.randn(shape, generator=theirs, dtype=dtype))
    drawn = torch.multinomial(torch.ones(9).to("sim"), 4, generator=ours)
    assert torch.equal(drawn.cpu(), torch.multinomial(torch.ones(9), 4, generator=theirs))


def test_gradients_cross_the_devices_and_are_counted(device):
    """`test_device.py` trains networks to the bits of the CPU."""
    x = values().requires_grad_()
    loss = x.to("sim").square().sum()
    before = device.traffic()
    loss.backward()
    assert (device.traffic() - before).kernels >= 2  # 1 of the loss, and its product
    assert torch.equal(x.grad, 2 * values())
