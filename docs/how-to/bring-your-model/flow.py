# velocity(x, t) predicts noise − data at x = (1 − t) · data + t · noise
from cldsde import CLD, DenoiserScore, NoisePath, PredictionDenoiser, sample

sde = CLD()
denoiser = PredictionDenoiser(velocity, NoisePath.linear(), "flow")
samples = sample(sde, DenoiserScore(denoiser, sde), (1000, 2), nfe=20)
