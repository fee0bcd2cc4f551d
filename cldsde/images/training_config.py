"""Settings of a training, and of the autoencoder of a latent model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from cldsde.errors import require, setting
from cldsde.images.schema import (
    KAPPA,
    Blocks,
    Count,
    Flag,
    Natural,
    Number,
    Positive,
    Share,
    Width,
    check_name,
    section,
)

Time = Annotated[Number, Field(ge=1e-8, le=0.5)]
"""A small time."""
# Optimisers of parameters of any shape, by single steps, with weight decay.
_OPTIMISERS = ("AdamW", "Adam", "RAdam", "NAdam", "Adamax", "Adafactor", "Adagrad", "SGD")


@section
class LatentConfig:
    """The autoencoder of a model whose process lives in a latent space (LSGM)."""

    latent_channels: Count = 4
    channels: Annotated[tuple[Width, ...], Field(min_length=1)] = (32, 64)
    """Channels of the latent variables, and of each level of the autoencoder from full resolution
    down; each level has half the height and width of the one before."""
    blocks: Blocks = 1
    groups: Count = 8
    """Residual blocks per level of the encoder, one less than in the decoder, and groups of the
    group normalisation."""
    likelihood: Literal["logistic", "bernoulli"] = "logistic"
    """Distribution of a pixel. With ``"bernoulli"`` a model can be trained on images of more than
    two grey levels, but has no bits per dim for them."""
    pretraining: Count
    """Images of the first stage, in which the prior is standard normal. In the second stage, the
    rest of ``training.images``, autoencoder and prior are trained together."""
    annealing: Natural = 0
    """Images over which the weight of the divergence from the prior rises from 0 to 1 at first."""
    learning_rate: Positive = 1e-3
    joint_learning_rate: Positive = 1e-4
    """Peak learning rate of the autoencoder in the first and in the second stage; each has the
    warm-up and decay of ``training``."""


@section
class TrainingConfig:
    """Training of a score model. Lengths are in images seen by all processes together."""

    images: Count
    """Images to train on, repetitions counted."""
    batch: Count = 128
    """Images per optimiser step, over all processes."""
    micro_batch: Count | None = None
    """Largest number of images per pass through the network; None: the whole share of a process."""
    optimiser: str = "AdamW"
    optimiser_options: Mapping[str, Any] = field(default_factory=dict)
    """``"AdamW"``, ``"Adam"``, ``"RAdam"``, ``"NAdam"``, ``"Adamax"``, ``"Adafactor"``,
    ``"Adagrad"`` or ``"SGD"`` of `torch.optim`, and its further arguments."""
    learning_rate: Positive = 2e-4
    """Learning rate, which warm-up and decay multiply."""
    warmup: Natural = 0
    """Images over which the learning rate rises linearly."""
    decay: Literal["cosine", "constant", "inverse_square_root"] = "constant"
    """``"constant"``; ``"cosine"``, from the first step to zero at the end; or after the warm-up
    ``"inverse_square_root"``, √(warmup/images) with at least one batch as warm-up."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Weight decay, decoupled for AdamW and Adafactor."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient, of score and autoencoder each; None does not limit it."""
    ema_decay: Share = 0.9999
    """Decay per step of the exponential moving average of the weights, which is sampled; at first
    (n + 1)/(n + 10) after n steps, if that is smaller."""
    ema_decays: tuple[Share, ...] = ()
    """Decays of further averages, each in a file of the run, such as ``ema-0.999.safetensors``."""
    power_averages: Flag = False
    """Also save two averages with power-function profiles, to be combined to other widths."""
    reduction: Literal["mean", "sum"] = "mean"
    """``"mean"`` or ``"sum"`` of the squared error over the numbers of an image: the scale of the
    gradients that ``clip`` limits."""
    conditioning: Literal["data", "all"] = "data"
    """``"data"``: hybrid score matching; ``"all"``: denoising score matching."""
    weighting: Annotated[Literal["reweighted", "likelihood", "kappa"], KAPPA] = "reweighted"
    """``"reweighted"``, the squared error of the prediction; ``"likelihood"``; or ``"kappa"``:
    noise levels are weighted as if κ, half the log of the signal-to-noise ratio, were normal with
    `kappa_mean` and `kappa_std`, the same for every process."""
    kappa_mean: Annotated[Number, Field(ge=-20, le=20)] = 1.2
    kappa_std: Annotated[Number, Field(ge=0.01, le=20)] = 1.2
    """For ``weighting = "kappa"``; see `cldsde.score.kappa_density`."""
    times: Literal["importance", "uniform", "logit_normal", "mode"] = "importance"
    """``"importance"``: times in proportion to the loss of the untrained model, with the inverse
    weights; ``"uniform"``; or, without inverse weights, ``"logit_normal"`` or ``"mode"`` (Esser et
    al. 2024)."""
    logit_mean: Annotated[Number, Field(ge=-20, le=20)] = 0.0
    logit_std: Annotated[Number, Field(ge=0.01, le=20)] = 1.0
    """For ``times = "logit_normal"``; see `cldsde.score.logit_normal_density`."""
    mode_scale: Annotated[Number, Field(ge=-0.99, le=1.75)] = 1.29
    """For ``times = "mode"``; see `cldsde.score.mode_density`."""
    t_min: Time = 1e-3
    """Smallest time; the loss is the mean over [t_min, 1], with the density of ``times`` if they
    are ``"logit_normal"`` or ``"mode"``."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the network alone: ``"fp32"``, ``"bf16"`` or ``"fp16"``."""
    compile: Flag = False
    """Compile the network with ``torch.compile``."""
    held_out: Count = 1000
    """Largest number of held-out images whose loss is logged."""
    log_every: Count = 10_000
    save_every: Count = 100_000
    sample_every: Count = 100_000
    """Images between lines of metrics, saved states, and grids of samples."""
    sample_grid: Count = 64
    """Images of a grid."""
    snapshots: Natural = 0
    """Number of averaged weights that are kept in the folder ``snapshots``."""
    snapshots_by: Literal["last", "held_out_loss", "fd"] = "last"
    """Which are kept: the ``"last"``, or those with the smallest ``"held_out_loss"`` or
    ``"fd"``."""
    measure: Literal["fd"] | None = None
    measure_samples: Annotated[Count, Field(ge=2)] = 1000
    """``"fd"``: with each saved state, the Fréchet distance of ``measure_samples`` samples to the
    training images, in features of a classifier of their classes. None measures nothing."""
    trackers: tuple[str, ...] = ()
    """Trackers of the library accelerate to log to, such as ``"tensorboard"`` or ``"wandb"``."""
    keep_state: Flag = True
    """Keep the training state of a finished run, so that it can be trained further."""
    init_from: str | None = None
    """Run, or folder of a diffusers `UNet2DModel`, whose weights the training starts from; None:
    random weights."""

    def __post_init__(self) -> None:
        free = self.times not in ("logit_normal", "mode")
        msg = f"must be 'reweighted' if times is {self.times!r}, which is a weighting itself; "
        msg += f"got {self.weighting!r}"
        require(free or self.weighting == "reweighted", "weighting", msg)
        msg = f"must be 'data' if weighting is 'kappa'; got {self.conditioning!r}"
        fits = self.weighting != "kappa" or self.conditioning == "data"
        require(fits, "conditioning", msg)
        measured = self.snapshots_by != "fd" or self.measure == "fd"
        require(measured, "snapshots_by", "'fd' needs training.measure = 'fd'")
        check_name(self.optimiser, _OPTIMISERS, "optimiser")
        # Take a step: some options, such as ``differentiable``, fail there only.
        parameter = torch.zeros(1, device="cpu", requires_grad=True)
        parameter.grad = torch.zeros_like(parameter)
        # Some optimisers take this option on a GPU alone.
        usable = {"capturable": False} if "capturable" in self.optimiser_options else {}
        with setting("optimiser_options"):
            try:
                self.make_optimiser([parameter], **usable).step()
            except (RuntimeError, AssertionError, IndexError) as error:
                raise ValueError(error) from error

    def make_optimiser(self, parameters: Any, **options: Any) -> torch.optim.Optimizer:
        """The optimiser of parameters; raise a ValueError or TypeError if an option is wrong."""
        kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, self.optimiser)
        own = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        return kind(parameters, **own, **{**self.optimiser_options, **options})

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return -(-self.images // self.batch)
