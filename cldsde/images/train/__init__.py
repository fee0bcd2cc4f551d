"""Training of image models: one loop, on any number of processes, resumable to the bit."""

from cldsde.images.train.loop import check_run, train

__all__ = ["check_run", "train"]
