import torch

from cldsde.pretrained import sample_k_diffusion


def model(x, sigma):  # or k-diffusion's wrapper of your network
    level = sigma.unsqueeze(1) ** 2
    return (0.04 * x + level * torch.tanh(x / (level + 0.04))) / (level + 0.04)


sigmas = torch.cat([torch.linspace(80 ** (1 / 7), 0.02 ** (1 / 7), 20) ** 7, torch.zeros(1)])
x = sigmas[0] * torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
data = sample_k_diffusion(model, x, sigmas)
print(f"mean of |x| {data.abs().mean():.1f}")
# prints mean of |x| 1.0
