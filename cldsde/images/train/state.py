"""State of a training in a file, signals to stop it, and the best weights."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from cldsde.errors import require
from cldsde.images.model import STATE_KIND, model_notes
from cldsde.images.runs import SNAPSHOTS, STATE, RunFolder
from cldsde.images.tensor_files import load_tensors, save_tensors
from cldsde.images.train.engine import like, load, on_cpu
from cldsde.images.train.learner import Learner
from cldsde.messages import one_line


@contextmanager
def stop_signals(engine: Accelerator) -> Iterator[Callable[[], int]]:
    """SIGINT and SIGTERM during a training: a function returns the one received, or 0.

    Several processes receive them at different steps, and agree when all call the function. A
    second signal ends a single process as usual. Outside the main thread the first one does.
    """
    received, alone = 0, engine.num_processes == 1
    before: dict[int, Any] = {}

    def receive(number: int, _: object) -> None:
        nonlocal received
        received = number
        if alone:
            tqdm.write("stopping after this step; again to stop at once", file=sys.stderr)
            restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def wanted() -> int:
        if alone:
            return received
        return int(engine.gather(torch.tensor([received], device=engine.device)).max())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield wanted
    finally:
        restore()


def save_state(learner: Learner, run: RunFolder, step: int, seconds: float) -> None:
    """Write the state of a training after so many steps and seconds.

    All processes must call it; the first one writes. Random numbers need no state.
    """
    tensors = {
        f"{part}.{name}": x
        for part, module in learner.modules.items()
        for name, x in module.state_dict().items()
    }
    for index, values in learner.optimiser.state_dict()["state"].items():
        kept = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        tensors |= {f"optimiser.{index}.{name}": x for name, x in kept.items()}
    tensors = on_cpu(tensors, kept=learner.engine.is_main_process)
    sums = learner.engine.reduce(learner.sums, "mean")
    if not tensors:
        return
    tensors |= {"meter": sums, **learner.statistics._asdict()}
    scaler = None if learner.engine.scaler is None else learner.engine.scaler.state_dict()
    metadata = {"step": str(step), "seconds": str(seconds), "scaler": json.dumps(scaler)}
    seen = step * learner.settings.batch
    metadata |= model_notes(learner.config, learner.space, seen)
    save_tensors(run / STATE, STATE_KIND, tensors, metadata)


def load_state(learner: Learner, run: RunFolder) -> tuple[int, float]:
    """Load the state of a run; return steps done and seconds spent.

    Raises a ValueError if the file is damaged, or was written for other settings or data.
    """
    settings = learner.config.training
    try:
        tensors, metadata = load_tensors(run / STATE, STATE_KIND)
        # States of 0.2 have no other digest.
        if metadata.get("training", metadata["config"]) != learner.config.training_digest():
            raise ValueError("it was written for other settings than this run's")
        for name, value in learner.statistics._asdict().items():
            if not torch.equal(tensors[name], value):
                raise ValueError(f"the data have changed since it was written: {name} differs")
        _take(learner, tensors, json.loads(metadata["scaler"]))
        step, seconds = int(metadata["step"]), float(metadata["seconds"])
    except (KeyError, ValueError, RuntimeError, TypeError, OSError) as error:
        msg = f"{run / STATE} cannot be used ({one_line(error)}); put a copy of it back, or "
        raise ValueError(f"{msg}begin again in another folder") from error
    msg = f"can grow, but not shrink; the run has seen {step * settings.batch:,}, got "
    require(step <= settings.steps, "training.images", f"{msg}{settings.images:,}")
    return step, seconds


def _take(learner: Learner, tensors: Mapping[str, Tensor], scaler: dict[str, float] | None) -> None:
    optimiser = learner.optimiser.state_dict()
    trained = [x for group in learner.optimiser.param_groups for x in group["params"]]
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in learner.modules}
    for key, x in tensors.items():
        part, _, name = key.partition(".")
        if part in weights:
            weights[part][name] = x
        elif part == "optimiser":
            index, name = name.split(".")
            optimiser["state"].setdefault(int(index), {})[name] = like(x, trained[int(index)])
    for part, module in learner.modules.items():
        load(module, weights[part])
    learner.optimiser.load_state_dict(optimiser)
    if learner.engine.scaler is not None and scaler is not None:
        learner.engine.scaler.load_state_dict(scaler)
    learner.sums.copy_(tensors["meter"])


def keep_snapshot(
    run: RunFolder, name: str, metrics: Mapping[str, float], by: str, count: int
) -> None:
    """Add a file of weights with its metrics; keep the files with the smallest metric ``by``."""
    folder = run / SNAPSHOTS
    record = folder / "values.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    # A run may be resumed with another metric, in which files from before have no value.
    known[name] = metrics
    values = {x: m.get(by, math.inf) if isinstance(m, dict) else math.inf for x, m in known.items()}
    kept = sorted(known, key=lambda x: (values[x], x))[:count]
    run.write_json(f"{SNAPSHOTS}/values.json", {name: known[name] for name in sorted(kept)})
    for file in folder.glob("[0-9]*.safetensors"):
        if file.name not in kept:
            file.unlink()
