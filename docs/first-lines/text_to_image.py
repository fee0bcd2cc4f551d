import torch
from diffusers import StableDiffusionPipeline

from cldsde import CLD, DenoiserScore, GuidedScore, pretrained, sample
from cldsde.score import ConditionalScore

pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion")  # your folder
prompts, negative = ["a lighthouse", "a harbour"], ["blurry", "blurry"]
with torch.no_grad():
    text, no_text = pipe.encode_prompt(prompts, pipe.device, 1, True, negative)

sde, denoiser = CLD(), pretrained.from_diffusers(pipe)
score = DenoiserScore(denoiser, sde)
given, free = (ConditionalScore(score, encoder_hidden_states=x) for x in (text, no_text))
latents = sample(sde, GuidedScore(given, free, 7.5), (2, *denoiser.shape), nfe=20)  # 10 guided
with torch.no_grad():
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample  # in [-1, 1]
images = pipe.image_processor.postprocess(decoded)
images[0].save("lighthouse.png")
images[1].save("harbour.png")
