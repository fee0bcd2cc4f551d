"""Networks that other people trained, as denoisers: `from_diffusers`."""

from cldsde.pretrained.diffusers_models import DiffusersDenoiser, from_diffusers

__all__ = ["DiffusersDenoiser", "from_diffusers"]
