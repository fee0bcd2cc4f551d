import torch
from diffusers import StableDiffusionPipeline

from cldsde.pretrained import PipelineScheduler

pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion")  # your folder
pipe.scheduler = PipelineScheduler(pipe.scheduler, "CLD")

generator = torch.Generator().manual_seed(0)
image = pipe("a lighthouse", num_inference_steps=10, generator=generator).images[0]
image.save("lighthouse.png")
