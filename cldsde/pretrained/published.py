"""Networks of the codes CLD-SGM and score_sde_pytorch from their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cldsde.errors import require
from cldsde.pretrained.checkpoints import (
    Checkpoint,
    load_weights,
    mismatch,
    read_checkpoint,
    same_levels,
)
from cldsde.pretrained.published_models import PUBLISHED, Family, PublishedModel
from cldsde.pretrained.published_score import PublishedScore


def load_cld_sgm(path: Path | str, config: str | PublishedModel | None = None) -> PublishedScore:
    """Score of a checkpoint of CLD-SGM (Dockhorn et al. 2022), with averaged weights.

    Parameters
    ----------
    path
        File that ``torch.save`` wrote, such as ``checkpoint_800000.pth``. Code in it is not run.
    config
        Name of the settings, ``"cifar10"``, ``"celeba_paper"``, ``"celeba_post_paper"`` or
        ``"cifar10_vpsde"``, or settings of your own. The last name is the network of ``"cifar10"``
        with VP, whose settings were not published. None: those that fit the weights.

    Returns
    -------
    PublishedScore
        Score of the driven components, in evaluation mode and without gradients; its process is
        ``score.sde``. Data are images in [−1, 1].

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    SettingError
        If the path is a folder, or the file is truncated, holds code, or is a checkpoint of another
        network; or if ``config`` is unknown. The message lists what is missing.
    """
    return _load(path, "cld-sgm", config)


def load_score_sde(path: Path | str, config: str | PublishedModel | None = None) -> PublishedScore:
    """Score of a checkpoint of score_sde_pytorch (Song et al. 2021), with averaged weights.

    Parameters
    ----------
    path
        File that ``torch.save`` wrote, such as
        ``ve/cifar10_ncsnpp_deep_continuous/checkpoint_12.pth``. Code in it is not run.
    config
        Name of the published settings, such as ``"vp/cifar10_ddpmpp_deep_continuous"``, or settings
        of your own. None: those that fit the weights and the folders of the path. The weights do
        not tell VP from sub-VP. If several settings fit, a SettingError is raised.

    Returns
    -------
    PublishedScore
        See `load_cld_sgm`, also for errors.
    """
    return _load(path, "score-sde", config)


def recognise(
    checkpoint: Checkpoint, path: Path | str, family: Family, name: str | None = None
) -> PublishedModel:
    """Published settings of a checkpoint: by name, or those that fit the weights best.

    Raises a SettingError if the name is unknown, or several settings fit equally well.
    """
    known: Mapping[str, PublishedModel] = PUBLISHED[family]
    if name is not None:
        require(name in known, "config", f"must be one of {', '.join(known)}; got {name!r}")
        return known[name]
    counts: dict[str, int] = {}  # many models share a network
    misfits = {}
    for key, model in known.items():
        kind = repr((model.process == "CLD", model.shape, model.network))
        if kind not in counts:
            counts[kind] = mismatch(model.make_network("meta"), checkpoint)
        misfits[key] = counts[kind] + (not same_levels(checkpoint, model.sigmas))
    nearest = [key for key, count in misfits.items() if count == min(misfits.values())]
    if len(nearest) > 1:
        folders = Path(path).expanduser().resolve().parent.as_posix() + "/"
        nearest = [key for key in nearest if f"/{key}/" in folders] or nearest
    msg = "must be given: the weights alone do not tell which of these they are: "
    require(len(nearest) == 1, "config", f"{msg}{', '.join(nearest)}")
    return known[nearest[0]]


def _load(path: Path | str, family: Family, config: str | PublishedModel | None) -> PublishedScore:
    checkpoint = read_checkpoint(path)
    model = config
    if not isinstance(model, PublishedModel):
        model = recognise(checkpoint, path, family, model)
    network = model.make_network()
    load_weights(network, checkpoint, path, model.sigmas)
    score = PublishedScore(network, model.make_process(), model.parameterisation)
    return score.eval().requires_grad_(requires_grad=False)
