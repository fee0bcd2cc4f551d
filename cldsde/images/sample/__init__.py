"""Sampling of image models: one sampler for every command, and files of samples."""

from cldsde.images.sample.outputs import SampleRequest, check_unused, draw_to
from cldsde.images.sample.sampler import (
    GuidedScore,
    ImageSampler,
    Samples,
    check_sampling,
    draw_images,
    draw_of_classes,
    make_solver,
    time_grid,
)

__all__ = [
    "GuidedScore",
    "ImageSampler",
    "SampleRequest",
    "Samples",
    "check_sampling",
    "check_unused",
    "draw_images",
    "draw_of_classes",
    "draw_to",
    "make_solver",
    "time_grid",
]
