"""Training of image models: one loop, on any number of processes, resumable to the bit."""

from cldsde.images.train.engine import check_run
from cldsde.images.train.loop import Rehearsal, rehearse, train
from cldsde.images.train.summary import summary

__all__ = ["Rehearsal", "check_run", "rehearse", "summary", "train"]
