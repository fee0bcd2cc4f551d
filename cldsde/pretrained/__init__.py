"""Networks that other people trained, and the pipelines in which they sample.

Networks of diffusers as denoisers, published ones as scores, a scheduler for diffusers, and a
sampler for k-diffusion and ComfyUI.
"""

from typing import TYPE_CHECKING, Any

from cldsde.pretrained.diffusers_models import from_diffusers
from cldsde.pretrained.k_diffusion import sample_k_diffusion
from cldsde.pretrained.published import load_cld_sgm, load_score_sde
from cldsde.pretrained.published_models import PublishedModel

if TYPE_CHECKING:
    from cldsde.pretrained.pipeline_scheduler import PipelineScheduler

__all__ = [
    "PipelineScheduler",
    "PublishedModel",
    "from_diffusers",
    "load_cld_sgm",
    "load_score_sde",
    "sample_k_diffusion",
]


def __getattr__(name: str) -> Any:
    """Import diffusers when the scheduler is asked for.

    diffusers loads the scheduler of a saved pipeline from this module, and looks for its own base
    class `SchedulerMixin` beside it.
    """
    if name not in ("PipelineScheduler", "SchedulerMixin"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from cldsde.pretrained import pipeline_scheduler
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        msg = f"{name} needs diffusers; install it with pip install 'cldsde[diffusers]'"
        raise ImportError(msg) from error
    return getattr(pipeline_scheduler, name)
