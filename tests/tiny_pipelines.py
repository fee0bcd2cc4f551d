"""Pipelines of diffusers with random weights, a few thousand parameters each.

    make("SD")                            a pipeline
    CASES["SD"].call(pipe, [0, 1])        its latents for samples with these numbers

Text encoders and tokenizers come from configurations, too: nothing is fetched.
"""

import functools
import inspect
from dataclasses import dataclass, field
from unittest import mock

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, T5Config

PROMPTS = ["red circle", "blue square", "a large circle"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "large", "circle", "square"]
WIDTH = 8  # of text embeddings
SD_TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_TABLE |= {"clip_sample": False, "steps_offset": 1}


def _tokenizer():
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=8, **names)


def _clip(projection=False):
    shape = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 8, "vocab_size": len(WORDS)}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": WIDTH}
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(CLIPTextConfig(**shape, **tokens)).eval()


def _t5(width=WIDTH):
    shape = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = T5Config(**shape, vocab_size=len(WORDS), pad_token_id=0, eos_token_id=2)
    return transformers.T5EncoderModel(config).eval()


def _transformer(kind, **options):
    """A transformer of latents of 4 channels."""
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
    shape |= {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    kind = getattr(diffusers, kind)
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{**{name: x for name, x in shape.items() if name in taken}, **options}).eval()


def _vae(**options):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (4, 4)}
    shape = {"norm_num_groups": 2, "layers_per_block": 1, "sample_size": 16}
    return diffusers.AutoencoderKL(**blocks, **shape, latent_channels=4, **options).eval()


def _unet(**options):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",)}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D",)}
    shape = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1}
    shape |= {"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": WIDTH}
    shape |= {"in_channels": 4, "out_channels": 4}
    return diffusers.UNet2DConditionModel(**{**blocks, **shape, **options}).eval()


def _sd(kind="StableDiffusionPipeline", **unet):
    return getattr(diffusers, kind)(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        unet=_unet(**unet),
        scheduler=diffusers.DDIMScheduler(**SD_TABLE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    added |= {"projection_class_embeddings_input_dim": WIDTH + 6 * 4}
    options = {name: x for name, x in SD_TABLE.items() if name != "clip_sample"}
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(projection=True),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=_unet(cross_attention_dim=2 * WIDTH, **added),
        scheduler=diffusers.EulerDiscreteScheduler(**options),
    )


def _sd3():
    return diffusers.StableDiffusion3Pipeline(
        transformer=_transformer(
            "SD3Transformer2DModel",
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.0),
        text_encoder=_clip(projection=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(projection=True),
        tokenizer_2=_tokenizer(),
        text_encoder_3=_t5(width=2 * WIDTH),  # as wide as both of CLIP's embeddings together
        tokenizer_3=_tokenizer(),
    )


def _flux():
    return diffusers.FluxPipeline(
        transformer=_transformer(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=16,
            out_channels=None,
            num_single_layers=1,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.0),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(),
    )


def _pixart():
    return diffusers.PixArtAlphaPipeline(
        transformer=_transformer(
            "PixArtTransformer2DModel",
            caption_channels=WIDTH,
            cross_attention_dim=16,
            out_channels=8,
            use_additional_conditions=False,
        ),
        tokenizer=_tokenizer(),
        text_encoder=_t5(),
        vae=_vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def _dit():
    return diffusers.DiTPipeline(
        transformer=_transformer("DiTTransformer2DModel", out_channels=8, norm_num_groups=4),
        vae=_vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def _ddpm():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks
    )
    return diffusers.DDPMPipeline(unet.eval(), diffusers.DDIMScheduler(clip_sample=False))


@dataclass(frozen=True)
class Case:
    """A pipeline, the arguments of its calls for some prompts, and facts about its network."""

    make: object
    arguments: dict = field(default_factory=dict)  # of every call
    per_sample: dict = field(default_factory=dict)  # functions of the numbers of the samples
    guidance: float | None = None  # weight that the pipeline applies to network outputs
    network: str = "unet"
    conditional_first: bool = False

    def call(self, pipe, samples, **options):
        """Last latents of the scheduler for samples with these numbers; each has its seed."""
        return self.recorded(pipe, samples, **options)[1]

    def recorded(self, pipe, samples, **options):
        """Latents before each step of the scheduler, last latents, and the network's conditions."""
        step, seen, latents, conditions = pipe.scheduler.step, [], [], {}

        @functools.wraps(step)
        def noted(output, timestep, sample, *args, **given):
            seen.append(sample.clone())
            found = step(output, timestep, sample, *args, **given)
            latents.append(found[0].clone())
            return found

        def note(module, args, given):
            own = ("hidden_states", "timestep", "return_dict")
            conditions.update({name: x for name, x in given.items() if name not in own})

        given = {name: make(samples) for name, make in self.per_sample.items()}
        given["generator"] = [torch.Generator().manual_seed(i) for i in samples]
        network = getattr(pipe, self.network)
        with (
            network.register_forward_pre_hook(note, with_kwargs=True),
            mock.patch.object(pipe.scheduler, "step", noted),
        ):
            pipe(**self.arguments, **given, **options)
        return seen, latents[-1], conditions

    def guided(self, denoiser, conditions):
        """Guided denoiser for the conditions of a call of the pipeline's network."""
        if self.guidance is None:
            return functools.partial(denoiser, **conditions)

        def found(u, sigma):
            both = denoiser(torch.cat([u, u]), torch.cat([sigma, sigma]), **conditions)
            free, given = reversed(both.chunk(2)) if self.conditional_first else both.chunk(2)
            return free + self.guidance * (given - free)

        return found


def _images(samples):
    """Images as tensors in [0, 1]."""
    rows = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in samples]
    return torch.stack(rows)


def _masks(samples):
    """Masks of the left half: 1 is to be made anew."""
    found = torch.zeros(len(samples), 1, 16, 16)
    found[..., :8] = 1
    return found


def _prompts(samples):
    return [PROMPTS[i] for i in samples]


_TEXT = {"prompt": _prompts, "negative_prompt": lambda samples: ["a"] * len(samples)}
_INPAINT = {**_TEXT, "image": _images, "mask_image": _masks}
_SIZE = {"height": 16, "width": 16}
_PLAIN = {"num_inference_steps": 4, "output_type": "np"}
_LATENT = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0}
_PART = {**_LATENT, "num_inference_steps": 7, "strength": 0.6}
_CLEAN = {"clean_caption": False, "use_resolution_binning": False}


def _guided(make, arguments=_LATENT, per_sample=_TEXT, network="unet"):
    return Case(make, arguments, per_sample, 3.0, network)


def _inpainting(channels):
    make = functools.partial(_sd, "StableDiffusionInpaintPipeline", in_channels=channels)
    return _guided(make, {**_LATENT, **_SIZE}, _INPAINT)


CASES = {
    "DDPM": Case(_ddpm, _PLAIN, {"batch_size": len}),
    "DiT": Case(
        _dit,
        {**_PLAIN, "guidance_scale": 3.0},
        {"class_labels": list},
        3.0,
        "transformer",
        conditional_first=True,
    ),
    "SD": _guided(_sd),
    "SD-img2img": _guided(
        functools.partial(_sd, "StableDiffusionImg2ImgPipeline"), _PART, {**_TEXT, "image": _images}
    ),
    "SD-inpaint-4": _inpainting(4),
    "SD-inpaint-9": _inpainting(9),
    "SDXL": _guided(_sdxl, {**_LATENT, **_SIZE}),
    "SD3": _guided(_sd3, {**_LATENT, **_SIZE}, network="transformer"),
    "Flux": Case(
        _flux,
        {**_LATENT, **_SIZE, "max_sequence_length": 8},
        {"prompt": _prompts},
        network="transformer",
    ),
    "PixArt": _guided(_pixart, {**_LATENT, **_SIZE, **_CLEAN}, network="transformer"),
}


def make(name):
    """A pipeline with weights that do not depend on other calls."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = CASES[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe
