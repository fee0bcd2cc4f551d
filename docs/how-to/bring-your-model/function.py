# exact denoiser for Gaussian data with mean 0 and variance 4
from cldsde import CLD, DenoiserScore, sample


def denoiser(u, sigma):
    return u * (4 / (4 + sigma**2)).unsqueeze(1)


sde = CLD()
samples = sample(sde, DenoiserScore(denoiser, sde), (1000, 2), nfe=20)
