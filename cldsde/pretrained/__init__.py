"""Networks that other people trained: models of diffusers as denoisers, published ones as scores."""

from cldsde.pretrained.diffusers_models import from_diffusers
from cldsde.pretrained.published import load_cld_sgm, load_score_sde
from cldsde.pretrained.published_models import PUBLISHED, PublishedModel
from cldsde.pretrained.published_score import Parameterisation, PublishedScore

__all__ = [
    "PUBLISHED",
    "Parameterisation",
    "PublishedModel",
    "PublishedScore",
    "from_diffusers",
    "load_cld_sgm",
    "load_score_sde",
]
