"""The reverse process: signs, times and marginals."""

import pytest
import torch

from cldsde import CLD, LinearSDE, ReverseProcess
from probes import Recording, generator
from score.cases import PROCESSES, mixture, states
from tolerances import order_of, rounding

every_process = pytest.mark.parametrize("name", PROCESSES)
METHODS = ["drift", "probability_flow", "data_prediction", "full_score"]
TIMES = torch.tensor([0.1, 0.3, 0.6, 1.0], dtype=torch.float64)


class TestDrift:
    """Drifts and diffusions of every stochasticity, in the forward clock."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("axes", [(), (1, 2, 2)])
    @every_process
    def test_drift_and_diffusion_are_the_formulas(self, name, axes, dtype):
        sde = PROCESSES[name]
        k, driven = sde.components, list(sde.driven)
        z, full = torch.randn(2, 4, k, *axes, generator=generator()).to(dtype)
        process = ReverseProcess(sde, lambda z, t: full[:, driven])
        F, G = sde.drift(TIMES), sde.diffusion(TIMES)
        flow = torch.einsum("bij,bj...->bi...", F, z.double())
        # The rows of the score that are not driven do not matter.
        pull = torch.einsum("bij,bj...->bi...", G @ G.mT, full.double())
        tolerance = rounding(8 * k, float(flow.abs().max() + pull.abs().max()), dtype)
        for stochasticity in (0.0, 0.3, 1.0, 1.7):
            found = process.drift(z, TIMES, stochasticity=stochasticity)
            expected = flow - 0.5 * (1 + stochasticity**2) * pull
            assert (found.dtype, found.shape) == (dtype, z.shape)
            assert (found.double() - expected).abs().max() <= tolerance
            diffusion = process.diffusion(TIMES, stochasticity=stochasticity)
            assert torch.equal(diffusion, stochasticity * G)
        for t in (TIMES, 0.3):
            reverse, ode = (process.drift(z, t, stochasticity=x) for x in (1.0, 0.0))
            assert torch.equal(reverse, process.drift(z, t))
            assert torch.equal(ode, process.probability_flow(z, t))
        assert torch.equal(process.diffusion(TIMES), G)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_score_is_evaluated_once_at_one_time_for_each_sample(self, method):
        score = Recording(lambda z, t: torch.ones_like(z[:, 1:]))
        z, t = torch.zeros(4, 2, 3), torch.tensor([0.25, 0.5, 0.75, 1.0])
        for time in (0.25, t):
            getattr(ReverseProcess(CLD(), score), method)(z, time)
        assert [t.tolist() for t in score.times] == [[0.25] * 4, t.tolist()]
        assert score.times[0].dtype == z.dtype


class TestMarginals:
    """The probability flow has the marginals of the forward process."""

    @every_process
    def test_the_probability_flow_keeps_the_density(self, name):
        # Continuity: d log p / dt + div f + f . grad log p = 0.
        sde, data, t = PROCESSES[name], mixture(), 0.4
        process = ReverseProcess(sde, data.score(sde))
        z = states(sde, data, t, n=3)
        flow = process.probability_flow(z, t)
        jacobian = torch.func.jacrev(lambda z: process.probability_flow(z, t))(z)
        divergence = torch.einsum("biabia->b", jacobian.reshape(3, sde.components, 2, *z.shape))
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(data.log_prob(sde, leaf, t).sum(), leaf)
        transport = (flow * gradient).sum((1, 2))
        h = 1e-3
        stencil = [(-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)]
        slope = sum(w * data.log_prob(sde, z, t + i * h) for i, w in stencil) / h
        # A thirtieth of the fifth derivative, some rate^5 with rates up to 32.
        error = order_of(h, 4, 32**5 / 30)
        scale = divergence.abs() + transport.abs() + 1
        assert ((slope + divergence + transport).abs() <= error * scale).all()


def test_a_process_without_density_still_has_a_drift():
    # The formulas need no density; x_0 does.
    sde = LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])
    process = ReverseProcess(sde, lambda z, t: z[:, 1:])
    z = torch.zeros(2, 2, 1)
    assert process.drift(z, 0.5).shape == z.shape
    with pytest.raises(ValueError, match="no density"):
        process.data_prediction(z, 0.5)
