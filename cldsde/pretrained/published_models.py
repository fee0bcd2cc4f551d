"""Settings of the published networks of CLD-SGM and score_sde_pytorch, by name.

The names of ``score-sde`` are the folders of the published checkpoints, such as
``vp/cifar10_ddpmpp_deep_continuous``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from cldsde import linear
from cldsde.linear import LinearSDE
from cldsde.pretrained.ncsnpp import NCSNpp
from cldsde.pretrained.published_score import Parameterisation

Family = Literal["cld-sgm", "score-sde"]
"""Code that wrote a checkpoint."""

Sigmas = tuple[float, float, int]
"""See `PublishedModel.sigmas`."""


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """Settings of a published network, for `load_cld_sgm` and `load_score_sde`."""

    process: str  #: Class of ``cldsde.linear``.
    options: Mapping[str, Any] = field(default_factory=dict)  #: Arguments of the process.
    shape: tuple[int, int, int]  #: Channels, rows and columns of the images.
    #: Arguments of ``cldsde.pretrained.ncsnpp.NCSNpp`` beside shape and outputs.
    network: Mapping[str, Any]
    parameterisation: Parameterisation  #: How the network becomes a score.
    #: Largest and smallest noise level and their number in the table that score_sde_pytorch saves,
    #: for data in [0, 1]; None for CLD-SGM.
    sigmas: Sigmas | None = None
    batch: int = 128  #: Images per optimiser step.
    t_min: float = 1e-5  #: Smallest time in training.
    data: str = "CIFAR10"  #: Name of the data set.

    def make_process(self) -> LinearSDE:
        """The process."""
        process: LinearSDE = getattr(linear, self.process)(**self.options)
        return process

    def make_network(self, device: str = "cpu") -> NCSNpp:
        """The network, untrained; on the device ``"meta"`` without weights."""
        channels, height, width = self.shape
        inputs = channels * self.make_process().components
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return NCSNpp((inputs, height, width), channels, **self.network)


_CIFAR = (3, 32, 32)
_NCSNPP = {"channels": (128, 256, 256, 256), "attention": (16,), "dropout": 0.1}
_DDPMPP = {**_NCSNPP, "fir": False, "inputs_enter": "once"}
_FOURIER = {"fourier_scale": 16.0}
_OF_256 = {"channels": (128, 128, 256, 256, 256, 256, 256), "attention": (16,), "blocks": 2}
_OF_1024 = {"channels": (16, 32, 64, 128, 256, 512, 512, 512), "attention": (16,), "blocks": 1}
_SKIPS = {"inputs_enter": "skip", "outputs_leave": "skip", **_FOURIER}


def _cld_sgm() -> dict[str, PublishedModel]:
    cifar = PublishedModel(
        process="CLD",
        shape=_CIFAR,
        network={**_NCSNPP, "blocks": 8, **_FOURIER},
        parameterisation=Parameterisation(
            code="cld-sgm", log_clock=True, mixed=True, numerical_eps=1e-9
        ),
    )
    celeba = PublishedModel(
        process="CLD",
        shape=(3, 256, 256),
        network={**_OF_256, "dropout": 0.1, "fir": False, "inputs_enter": "once"},
        parameterisation=Parameterisation(code="cld-sgm", mixed=True, numerical_eps=1e-6),
        batch=64,
        data="celeba-hq",
    )
    return {
        "cifar10": cifar,
        "cifar10_vpsde": replace(
            cifar,
            process="VPSDE",
            parameterisation=replace(cifar.parameterisation, numerical_eps=0.0),
        ),
        "celeba_paper": celeba,
        "celeba_post_paper": replace(
            celeba,
            options={"beta": (0.1, 7.0)},
            network={**celeba.network, "blocks": 4},
            batch=96,
            t_min=1e-3,
        ),
    }


def _score_sde() -> dict[str, PublishedModel]:
    models = {}
    of_vp, of_ve = {"ddpmpp": _DDPMPP, "ncsnpp": _NCSNPP}, {"ncsnpp": _NCSNPP}
    endings = {"": (4, 1000), "_continuous": (4, None), "_deep_continuous": (8, None)}
    for family, process, networks in (
        ("vp", "VPSDE", of_vp),
        ("subvp", "SubVPSDE", of_vp),
        ("ve", "VESDE", of_ve),
    ):
        exploding = family == "ve"
        for name, network in networks.items():
            for ending, (blocks, levels) in endings.items():
                if family == "subvp" and levels:
                    continue  # not published
                fourier = exploding and levels is None
                models[f"{family}/cifar10_{name}{ending}"] = PublishedModel(
                    process=process,
                    options=_levels(50.0) if exploding else {},
                    shape=_CIFAR,
                    network={**network, "blocks": blocks, **(_FOURIER if fourier else {})},
                    parameterisation=Parameterisation(
                        code="score-sde-ve" if exploding else "score-sde-vp",
                        log_clock=fourier,
                        levels=levels,
                    ),
                    sigmas=(50.0, 0.01, 1000),
                )
    for name, size, sigma in (
        ("celebahq_256", 256, 348.0),
        ("ffhq_256", 256, 348.0),
        ("bedroom", 256, 378.0),
        ("church", 256, 380.0),
        ("ffhq_1024", 1024, 1348.0),
    ):
        models[f"ve/{name}_ncsnpp_continuous"] = PublishedModel(
            process="VESDE",
            options=_levels(sigma),
            shape=(3, size, size),
            network={**(_OF_256 if size == 256 else _OF_1024), **_SKIPS},
            parameterisation=Parameterisation(code="score-sde-ve", log_clock=True),
            sigmas=(sigma, 0.01, 2000),
            batch=64 if size == 256 else 8,
            data=name,
        )
    return models


def _levels(largest: float) -> dict[str, float]:
    """Noise levels for data in [−1, 1], twice those for data in [0, 1]."""
    return {"sigma_min": 0.02, "sigma_max": 2 * largest}


PUBLISHED: dict[Family, dict[str, PublishedModel]] = {
    "cld-sgm": _cld_sgm(),
    "score-sde": _score_sde(),
}
"""Published networks by code and name."""
