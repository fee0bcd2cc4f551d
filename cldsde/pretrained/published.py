"""Networks of the codes CLD-SGM and score_sde_pytorch from their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from cldsde.errors import SettingError
from cldsde.pretrained.checkpoints import Checkpoint, load_weights, mismatch, read_checkpoint
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

    Examples
    --------
    >>> load_cld_sgm("nowhere.pth")
    Traceback (most recent call last):
        ...
    FileNotFoundError: there is no file nowhere.pth
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
        not tell VP from sub-VP.

    Returns
    -------
    PublishedScore
        See `load_cld_sgm`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    SettingError
        As `load_cld_sgm`; also if several settings fit.

    Examples
    --------
    >>> load_score_sde("nowhere.pth")
    Traceback (most recent call last):
        ...
    FileNotFoundError: there is no file nowhere.pth
    """
    return _load(path, "score-sde", config)


def recognise(
    checkpoint: Checkpoint, path: Path | str, family: Family, name: str | None = None
) -> PublishedModel:
    """Published settings of a checkpoint: by name, or those that fit the weights best.

    Raises
    ------
    SettingError
        If the name is unknown, or several settings fit equally well.
    """
    known: Mapping[str, PublishedModel] = PUBLISHED[family]
    if name is not None:
        if name not in known:
            raise SettingError("config", f"must be one of {', '.join(known)}; got {name!r}")
        return known[name]
    counts: dict[str, int] = {}  # many models share a network
    misfits = {}
    for key, model in known.items():
        kind = repr((model.process == "CLD", model.shape, model.network))
        if kind not in counts:
            counts[kind] = mismatch(model.make_network("meta"), checkpoint)
        misfits[key] = counts[kind] + (not _levels_agree(model, checkpoint))
    nearest = [key for key, count in misfits.items() if count == min(misfits.values())]
    if len(nearest) > 1:
        folders = Path(path).expanduser().resolve().parent.as_posix() + "/"
        nearest = [key for key in nearest if f"/{key}/" in folders] or nearest
    if len(nearest) > 1:
        msg = "must be given: the weights alone do not tell which of these they are: "
        raise SettingError("config", f"{msg}{', '.join(nearest)}")
    return known[nearest[0]]


def check_levels(model: PublishedModel, checkpoint: Checkpoint, path: Path | str) -> None:
    """Check the table of noise levels that score_sde_pytorch saves with the weights.

    Raises
    ------
    SettingError
        If it is missing, or not the table of the settings.
    """
    if not _levels_agree(model, checkpoint):
        found = checkpoint.weights.get("sigmas")
        got = "no table"
        if found is not None:
            known = found.numel() and found.is_floating_point()
            got = f"{found.numel()} levels{f' up to {found.max().item():g}' if known else ''}"
        wanted = "no table sigmas"
        if model.sigmas is not None:
            wanted = f"the table sigmas of {model.sigmas}"
        raise SettingError("path", f"{path} must hold {wanted}; got {got}")


def _levels_agree(model: PublishedModel, checkpoint: Checkpoint) -> bool:
    found = checkpoint.weights.get("sigmas")
    if model.sigmas is None or found is None:
        return model.sigmas is None and found is None
    largest, smallest, count = model.sigmas
    start, end = math.log(largest), math.log(smallest)
    table = torch.linspace(start, end, count, dtype=torch.float64, device="cpu").exp()
    if not found.is_floating_point() or found.shape != table.shape:
        return False
    # The code may have saved the table in single precision.
    return torch.allclose(found.double(), table, rtol=1e-5)


def _load(path: Path | str, family: Family, config: str | PublishedModel | None) -> PublishedScore:
    checkpoint = read_checkpoint(path)
    model = config
    if not isinstance(model, PublishedModel):
        model = recognise(checkpoint, path, family, model)
    network = model.make_network()
    load_weights(network, checkpoint, path)
    check_levels(model, checkpoint, path)
    score = PublishedScore(network, model.make_process(), model.parameterisation)
    return score.eval().requires_grad_(requires_grad=False)
