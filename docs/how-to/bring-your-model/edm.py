# net(u, sigma) estimates the data from u = data + sigma · noise
from cldsde import CLD, DenoiserScore, sample

sde = CLD()
score = DenoiserScore(net, sde, noise_levels=(0.002, 80.0))
samples = sample(sde, score, (1000, 2), nfe=20)
