"""Image models from Python, as briefly as on the command line."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image as PILImage

from cldsde.images.config import RunConfig, load_config
from cldsde.images.data import DataSet
from cldsde.images.data.pixels import as_bytes, picture
from cldsde.images.model import TrainedModel, load_model
from cldsde.images.runs import RunFolder, check_folder
from cldsde.images.sample.export import export
from cldsde.images.sample.observed import ObservedImage
from cldsde.images.sample.sampler import ImageSampler, Samples, changed_recipe
from cldsde.images.train import check_run, train
from cldsde.solvers.noise import Seeds


@dataclass(frozen=True, eq=False)
class Run(TrainedModel):
    """A trained run: its model with attributes ``score``, ``process``, ``space`` and ``config``."""

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str = "cpu", *, trust: bool = False
    ) -> Run:
        """Load the model of a run folder; raise a ValueError if a file of it cannot be used.

        Runs no code of its files, unless ``trust`` allows a network named by ``module:Class``.
        """
        return cls(**vars(load_model(folder, device, trust=trust)))

    @classmethod
    def train(
        cls,
        config: RunConfig | Path | str,
        data: DataSet | None = None,
        out: Path | str = "run",
        *,
        device: str = "auto",
        progress: bool = True,
    ) -> Run:
        """Train a model, or resume its training; the same as ``cldsde train``.

        Parameters
        ----------
        config
            A configuration, or its file.
        data
            The images; None reads the data set of the configuration, with which ``cldsde evaluate``
            compares samples in any case.
        out
            Run folder, made if missing.
        device, progress
            ``"auto"`` or the name of a device; whether to show a progress bar on stderr. With
            ``"auto"`` the returned run is on the CPU.

        Raises
        ------
        SettingError
            If settings, data, device and folder do not fit.
        """
        config = config if isinstance(config, RunConfig) else load_config(Path(config).expanduser())
        data = config.data.load() if data is None else data
        out = Path(out).expanduser()
        check_folder(out, config.to_dict(), free=config.FREE)
        statistics = check_run(config, data, device=device, run=out, progress=progress)
        with closing(RunFolder(out, config.to_dict(), free=config.FREE)) as folder:
            train(config, data, folder, device=device, statistics=statistics, progress=progress)
        return cls.load(out, "cpu" if device == "auto" else device, trust=True)

    def sample(
        self,
        seeds: Seeds = range(64),
        *,
        label: int | str | None = None,
        guidance: float = 1.0,
        observed: ObservedImage | None = None,
        batch: int = 64,
        progress: bool = False,
        **sampling: Any,
    ) -> Samples:
        """Sample one image for each seed; return images, in their order, and score evaluations.

        Parameters
        ----------
        seeds
            Integers in [0, 2³²), a sequence, tensor or array. An image does not depend on the other
            seeds, up to rounding, unless the solver shares step sizes in a batch.
        label
            Class of all images, by name or number; ``"all"`` cycles through the classes by seed.
        guidance
            Weight of the class.
        observed
            A picture of what is known of the images, if anything.
        batch, progress
            Images per batch; whether to show a progress bar on stderr.
        **sampling
            Fields of `SamplingConfig` in place of the run's own, such as ``nfe=10``. ``options``
            are fields of the solver.

        Raises
        ------
        SettingError
            If a setting does not fit the model.
        """
        how: Any = {"label": self.space.label(label), "guidance": guidance, "observed": observed}
        sampler = ImageSampler.of(self, changed_recipe(self.sampling, **sampling), batch, **how)
        return sampler.sample(seeds, progress=progress)

    def to_diffusers(self, folder: Path | str) -> None:
        """Write the run as a pipeline of diffusers; the same as ``cldsde export``.

        ``DDPMPipeline.from_pretrained`` loads the folder, and ``training.init_from`` takes it.
        Raises a SettingError if the model has parts that no `UNet2DModel` has, or the folder holds
        files.
        """
        export(self, Path(folder).expanduser())


def as_array(samples: Samples) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Images as an array ``(N, H, W, C)``: uint8, or float32 for continuous data."""
    return samples.images.movedim(1, -1).numpy()


def as_pictures(samples: Samples) -> list[PILImage]:
    """Images as Pillow's, with the levels spread from black to white."""
    return [picture(image) for image in as_bytes(samples.images, samples.levels)]
