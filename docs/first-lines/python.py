import torch

from cldsde import CLD, VPSDE, DenoiserScore, RectifiedFlow, sample


def denoiser(u, sigma):  # or your network: the mean of the data, given u = data + sigma * noise
    level = sigma.unsqueeze(1) ** 2
    return (0.04 * u + level * torch.tanh(u / (level + 0.04))) / (level + 0.04)


for sde in (CLD(), VPSDE(), RectifiedFlow()):
    x = sample(sde, DenoiserScore(denoiser, sde), (5000, 1), nfe=20, seed=0)
    print(f"{type(sde).__name__}: mean of |x| {x.abs().mean():.1f}")
# prints CLD: mean of |x| 1.0
# prints VPSDE: mean of |x| 1.0
# prints RectifiedFlow: mean of |x| 1.0
