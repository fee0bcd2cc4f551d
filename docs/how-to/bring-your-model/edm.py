# net(u, sigma) estimates the data from u = data + sigma · noise
from cldsde import CLD, DenoiserScore, sample

sde = CLD()
levels = (0.002, 80.0)  # replace by the smallest and largest σ that YOUR network was trained on
score = DenoiserScore(net, sde, noise_levels=levels)
samples = sample(sde, score, (1000, 2), nfe=20)
