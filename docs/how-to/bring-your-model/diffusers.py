# folder: where save_pretrained wrote a pipeline, or a model and its scheduler
from cldsde import CLD, DenoiserScore, pretrained, sample

sde = CLD()
denoiser = pretrained.from_diffusers(folder)
samples = sample(sde, DenoiserScore(denoiser, sde), (4, *denoiser.shape), nfe=10)
