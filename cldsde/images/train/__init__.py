"""Training of image models: one loop, on any number of processes, resumable to the bit."""

from cldsde.images.train.engine import check_run
from cldsde.images.train.loop import train
from cldsde.images.train.summary import outlook, rehearsal, rehearse, summary

__all__ = ["check_run", "outlook", "rehearsal", "rehearse", "summary", "train"]
