"""Networks that other people trained: diffusers' as denoisers, published ones as scores."""

from cldsde.pretrained.diffusers_models import from_diffusers
from cldsde.pretrained.published import load_cld_sgm, load_score_sde
from cldsde.pretrained.published_models import PublishedModel

__all__ = ["PublishedModel", "from_diffusers", "load_cld_sgm", "load_score_sde"]
