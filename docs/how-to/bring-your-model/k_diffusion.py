# model: a wrapper of k-diffusion such as CompVisDenoiser, called as model(x, sigma)
from cldsde import CLD, DenoiserScore, sample

sde = CLD()
levels = (float(model.sigma_min), float(model.sigma_max))
samples = sample(sde, DenoiserScore(model, sde, noise_levels=levels), (1000, 2), nfe=20)
