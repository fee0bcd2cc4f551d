"""Tiny trained runs; `conftest.py` makes each of them once."""

from pathlib import Path

import torch

from cldsde.cli import main
from cldsde.images.config import RunConfig
from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.runs import RunFolder
from cldsde.images.train.loop import train

NETWORK = {"channels": [8], "groups": 4}
SHORT = {"images": 96, "batch": 16, "micro_batch": 8, "ema_decay": 0.9, "log_every": 16}
SHORT |= {"save_every": 32, "sample_every": 96, "sample_grid": 4}
DIGITS = """
[network]
options = { channels = [8], groups = 4 }

[training]
images = 32
batch = 16
learning_rate = 1e-3
held_out = 8
log_every = 16
save_every = 16
sample_every = 32
sample_grid = 4

[sampling]
solver = "sscs"
nfe = 4
"""


def train_digits(folder: Path, *options: str) -> Path:
    """Train on scikit-learn's digits by the command; the configuration is beside the run."""
    config = folder.with_name("tiny.toml")
    config.write_text(DIGITS)
    assert main(["train", str(config), "--out", str(folder), "--device", "cpu", *options]) == 0
    return folder


def noise_images(
    count: int = 64, seed: int = 0, shape: tuple[int, ...] = (1, 4, 4), classes: object = None
) -> ArrayImages:
    """Images of uniform noise; with classes, their labels come in turns."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    if classes is None:
        return ArrayImages(pixels)
    number = classes if isinstance(classes, int) else len(classes)
    return ArrayImages(pixels, labels=torch.arange(count) % number, classes=classes)


def train_labelled(folder: Path) -> Path:
    """Train on colour images of three classes, until the classes matter."""
    data = DataSet(*[noise_images(shape=(3, 4, 4), classes=("dot", "stripe", "7"))] * 2)
    config = RunConfig.from_dict(
        {
            "network": {"options": NETWORK, "conditional": True},
            "training": {"images": 256, "batch": 32, "learning_rate": 0.01, "ema_decay": 0.5},
            "sampling": {"solver": "sscs", "nfe": 6, "t_end": 1e-2},
        }
    )
    train(config, data, RunFolder(folder, config.to_dict()), device="cpu")
    return folder


def save_diffusers(folder: Path) -> Path:
    """Save a pipeline of random weights with three classes; return its folder.

    It predicts data, since images without saturated pixels follow from that.
    """
    import diffusers

    torch.manual_seed(0)
    sides = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    shape |= {"layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 3}
    unet = diffusers.UNet2DModel(**sides, **shape)
    scheduler = diffusers.DDPMScheduler(prediction_type="sample")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder
