"""Sampling of image models: one sampler for every command, and files of samples."""

from cldsde.images.sample.observed import ObservedImage
from cldsde.images.sample.outputs import SampleRequest
from cldsde.images.sample.sampler import ImageSampler, Samples
from cldsde.images.sample.source import speed_up

__all__ = ["ImageSampler", "ObservedImage", "SampleRequest", "Samples", "speed_up"]
