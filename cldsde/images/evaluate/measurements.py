"""Settings of measurements, and the share of each process in the sampling for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import distributed

from cldsde.images.sample.sampler import ImageSampler, Samples, batches_of
from cldsde.images.schema import Count, section

METRICS = ("fd", "fid", "kid", "isc", "prc", "bpd")
"""Fréchet distance in features that fit the data; FID, KID, Inception score, precision and recall
in Inception's; bits per dim."""


@section
class Measurements:
    """Metrics, and the numbers of images and the features that they need."""

    samples: Annotated[Count, Field(ge=2)] = 1000
    """Images per set. A comparison makes ``repeats`` sets for each cell of its table."""
    repeats: Count = 1
    """Sets of images with seeds of their own, whose spread is reported."""
    batch: Count = 64
    """Images per batch."""
    metrics: tuple[str, ...] = ("fd",)
    """Some of ``"fd"``, ``"fid"``, ``"kid"``, ``"isc"``, ``"prc"`` and ``"bpd"``."""
    features: str = "classifier"
    """Features of the Fréchet distance: ``"classifier"``, of a classifier trained on the data's
    classes; ``"random"``, of one with random weights, also used for data without classes; or
    ``module:attribute`` of the user's own network."""
    weights: Path | None = None
    """Inception weights, for fid, kid, isc and prc."""
    likelihood_images: Count = 64
    """Held-out images whose likelihood is computed."""


def place() -> tuple[int, int]:
    """Number of this process, 0 for the one with the results, and of all that share its work."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def of_each(own: Any) -> list[Any]:
    """An object of each process, in the order of their numbers; all processes must call it."""
    found = [own] * place()[1]
    if len(found) > 1:
        distributed.all_gather_object(found, own)
    return found


def shared(sampler: ImageSampler, seeds: range) -> Iterator[tuple[list[int], Samples]]:
    """Batches of `ImageSampler.batches` in their order, of which each process samples a share."""
    (rank, processes), batches = place(), sampler.batches(seeds)
    mine = batches_of(sampler, batches[rank::processes], shown=False)
    for _ in range(0, len(batches), processes):
        own: Any
        try:
            own = next(mine, None)
        except FloatingPointError as error:  # raised by all processes, which wait for each other
            own = error
        for made in of_each(own):
            if isinstance(made, FloatingPointError):
                raise made
            if made is not None:
                yield made
