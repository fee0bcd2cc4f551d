"""Networks that other people trained, as denoisers: `from_diffusers`."""

from cldsde.pretrained.diffusers_models import from_diffusers

__all__ = ["from_diffusers"]
