"""The simulated device: it raises like a GPU, counts its traffic, and keeps the bits."""

import pytest
import torch
from torch import nn

from simulated_device import Generator, Traffic, needs_simulation, simulated_device

pytestmark = needs_simulation

VALUES = torch.tensor([0.5, -1.0, 2.0])
CPU_MASK, CPU_ROWS = torch.tensor([True, False, True]), torch.tensor([2, 0])

COSTS = {
    "arithmetic": (lambda x: 2 * x + torch.tensor(1.0), Traffic()),
    "double precision": (lambda x: x.double(), Traffic(float64=1)),
    "to the CPU": (lambda x: x.cpu(), Traffic(to_cpu=1)),
    "to the device": (lambda x: torch.ones(2).to(x), Traffic(to_device=1)),
    "torch.tensor": (lambda x: torch.tensor([1.0], device=x.device), Traffic(to_device=1)),
    "item": (lambda x: x[0].item(), Traffic(read_backs=1)),
    "nonzero": (lambda x: x.nonzero(), Traffic(read_backs=1)),
    "equal": (lambda x: torch.equal(x, x), Traffic(read_backs=1)),
    "its mask": (lambda x: x[x > 0], Traffic(read_backs=1, selections=1)),
    "the CPU's mask": (lambda x: x[CPU_MASK], Traffic(to_device=1, selections=1)),
    "rows written": (lambda x: x.index_put_((CPU_ROWS,), -x[1:]), Traffic(to_device=1)),
}

MIXTURES = {
    "sum": lambda x, cpu: x + cpu,
    "out": lambda x, cpu: torch.add(x, 1.0, out=cpu),
    "indices of the device": lambda x, cpu: cpu[x.argsort()],
    "CPU's generator": lambda x, cpu: x.normal_(generator=torch.Generator()),
    "the device's generator": lambda x, cpu: torch.randn(3, generator=Generator()),
}


@pytest.fixture(autouse=True)
def device():
    with simulated_device() as device:
        yield device


@pytest.mark.parametrize("case", COSTS)
def test_every_event_is_counted(case, device):
    operation, cost = COSTS[case]
    x = VALUES.to("sim")
    device.reset()
    operation(x)
    assert device.traffic() == cost


@pytest.mark.parametrize("case", MIXTURES)
def test_mixing_devices_raises(case):
    with pytest.raises(RuntimeError, match=r"Expected .* (device|generator)"):
        MIXTURES[case](VALUES.to("sim"), VALUES.clone())


def test_the_default_device_may_be_the_simulated_one():
    with torch.device("sim"):
        made = [torch.zeros(2), torch.tensor([1.0]), torch.arange(3), nn.Linear(3, 2).weight]
        made.append(torch.randn(5, generator=Generator().manual_seed(0)))
    assert {x.device.type for x in made} == {"sim"}
    assert torch.equal(made[-1].cpu(), torch.randn(5, generator=torch.Generator().manual_seed(0)))
