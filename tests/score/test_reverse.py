"""The reverse process: signs and times."""

import pytest
import torch

from cldsde import ReverseProcess
from probes import generator
from score.cases import PROCESSES
from tolerances import rounding

every_process = pytest.mark.parametrize("name", PROCESSES)
TIMES = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)  # the first without a density


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_process
def test_drift_and_diffusion_of_every_stochasticity_are_the_formulas(name, dtype):
    sde = PROCESSES[name]
    k, driven = sde.components, list(sde.driven)
    z, full = torch.randn(2, 4, k, 2, 2, generator=generator()).to(dtype)
    process = ReverseProcess(sde, lambda z, t: full[:, driven])
    F, G = sde.drift(TIMES), sde.diffusion(TIMES)
    flow = torch.einsum("bij,bj...->bi...", F, z.double())
    # The rows of the score that are not driven do not matter.
    pull = torch.einsum("bij,bj...->bi...", G @ G.mT, full.double())
    tolerance = rounding(8 * k, float(flow.abs().max() + pull.abs().max()), dtype)
    for stochasticity in (0.0, 0.3, 1.7):
        found = process.drift(z, TIMES, stochasticity=stochasticity)
        expected = flow - 0.5 * (1 + stochasticity**2) * pull
        assert (found.dtype, found.shape) == (dtype, z.shape)
        assert (found.double() - expected).abs().max() <= tolerance
        diffusion = process.diffusion(TIMES, stochasticity=stochasticity)
        assert torch.equal(diffusion, stochasticity * G)
    reverse, ode = (process.drift(z, TIMES, stochasticity=x) for x in (1.0, 0.0))
    assert torch.equal(reverse, process.drift(z, TIMES))
    assert torch.equal(ode, process.probability_flow(z, TIMES))
    assert torch.equal(process.diffusion(TIMES), G)
