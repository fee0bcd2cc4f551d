import torch
from diffusers import StableDiffusion3Pipeline

from cldsde import CLD, DenoiserScore, GuidedScore, pretrained, sample
from cldsde.score import ConditionalScore

pipe = StableDiffusion3Pipeline.from_pretrained("stable-diffusion-3")  # your folder
with torch.no_grad():
    text, no_text, pooled, no_pooled = pipe.encode_prompt(
        "a lighthouse", None, None, negative_prompt="blurry"
    )

sde, denoiser = CLD(), pretrained.from_diffusers(pipe)
score = DenoiserScore(denoiser, sde)
given = ConditionalScore(score, encoder_hidden_states=text, pooled_projections=pooled)
free = ConditionalScore(score, encoder_hidden_states=no_text, pooled_projections=no_pooled)
latents = sample(sde, GuidedScore(given, free, 7.0), (1, *denoiser.shape), nfe=20)  # 10 guided
vae = pipe.vae.config
with torch.no_grad():
    decoded = pipe.vae.decode(latents / vae.scaling_factor + vae.shift_factor).sample  # in [-1, 1]
pipe.image_processor.postprocess(decoded)[0].save("lighthouse.png")
