import pickle
import sys

import torch

from cldsde import CLD, DenoiserScore, sample
from cldsde.score import ConditionalScore

sys.path.insert(0, "edm")  # the code of EDM, which has the class of the network
with open("network.pkl", "rb") as file:  # runs code from the file: trust its author
    net = pickle.load(file)["ema"].eval()


def doubled(u, sigma, **conditions):
    """Denoiser of the doubled data, which have a standard deviation of 1."""
    return 2 * net(u / 2, sigma / 2, **conditions)


sde = CLD()
levels = (2 * 0.002, 2 * 80.0)  # twice the levels that EDM samples with
score = DenoiserScore(doubled, sde, noise_levels=levels)
if net.label_dim:  # class labels are rows of zeros with a single one
    labels = torch.arange(16) % net.label_dim
    score = ConditionalScore(score, class_labels=torch.eye(net.label_dim)[labels])
shape = (16, net.img_channels, net.img_resolution, net.img_resolution)
samples = sample(sde, score, shape, nfe=20) / 2  # in [-1, 1]
images = (127.5 * samples + 128).clamp(0, 255).to(torch.uint8)
