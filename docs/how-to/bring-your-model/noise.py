# network(x, index) predicts the noise at the given index of the table alphas_cumprod
from cldsde import CLD, DenoiserScore, NoisePath, PredictionDenoiser, sample

sde = CLD()
path = NoisePath.from_alphas_cumprod(alphas_cumprod)
denoiser = PredictionDenoiser(network, path, "noise", clock="index")
samples = sample(sde, DenoiserScore(denoiser, sde), (1000, 2), nfe=20)
