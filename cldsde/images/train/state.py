"""What a training depends on from one step to the next, to and from one file."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from cldsde.images.config import RunConfig
from cldsde.images.files import load_tensors, save_tensors
from cldsde.images.model import Statistics
from cldsde.images.runs import RunFolder

STATE = "training.safetensors"
"""File of a run that holds the state of its training, to resume from."""

KIND = "a training state of cldsde, version 2"


class Meter:
    """Means of losses and of gradients' norms, read seldom: reading waits for the device."""

    def __init__(self, engine: Accelerator, parts: Sequence[str]) -> None:
        self._engine = engine
        names = [f"{part}_{what}" for what in ("loss", "gradient_norm") for part in parts]
        self._names = ["loss", "gradient_norm", *names]
        count = len(self._names) + 1
        self.sums = torch.zeros(count, dtype=torch.float64 if engine.device.type == "cpu" else None)
        self.sums = self.sums.to(engine.device)

    def add(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Count a step of this process: losses and norms of each part, by its name."""
        each = torch.stack(list(losses.values()))
        sizes = torch.stack([norm.detach() for norm in norms.values()]).to(each)
        whole = torch.stack([each.sum(), sizes.norm()])
        self.sums += torch.cat([whole, each, sizes, torch.ones_like(each[:1])])

    def shared(self) -> Tensor:
        """Sums of losses, norms and steps, averaged over all processes; each has to ask for it."""
        return cast(Tensor, self._engine.reduce(self.sums, "mean"))

    def means(self) -> dict[str, float]:
        """Means over steps and processes since `clear`; 0 where there was no step.

        ``loss``: the sum of all losses; ``gradient_norm``: that of all parts together;
        ``PART_loss`` and ``PART_gradient_norm``: of each.
        """
        *sums, steps = self.shared().tolist()
        return {
            name: total / steps if steps else 0.0
            for name, total in zip(self._names, sums, strict=True)
        }

    def clear(self) -> None:
        """Forget what was counted."""
        self.sums.zero_()


class StopRequest:
    """SIGINT and SIGTERM, heard while a training goes on, to be obeyed between two steps.

    Of several processes each would hear them at another step: there they end the process as ever,
    as they do where this is not the main thread. A second signal ends it as ever, too.
    """

    def __init__(self, engine: Accelerator) -> None:
        main = threading.current_thread() is threading.main_thread()
        self._heard: int | None = None
        self._signals = (
            (signal.SIGINT, signal.SIGTERM) if main and engine.num_processes == 1 else ()
        )
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._hear) for number in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def wanted(self) -> bool:
        """Whether a signal was heard."""
        return self._heard is not None

    def obey(self) -> None:
        """End as the signal would have ended the process."""
        if self._heard == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signal.SIGTERM)

    def _hear(self, number: int, frame: object) -> None:
        del frame
        self._heard = number
        tqdm.write("stopping after this step; again to stop at once", file=sys.stderr)
        for each, handler in self._before.items():
            signal.signal(each, handler)


class TrainingState:
    """Weights, their average, the optimiser's moments, the scaler and the meter.

    Random numbers need no state: they are functions of the seed and of the images seen.
    """

    def __init__(
        self,
        config: RunConfig,
        statistics: Statistics,
        modules: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        meter: Meter,
        engine: Accelerator,
    ) -> None:
        self._config, self._statistics = config, statistics
        self._modules, self._optimiser = modules, optimiser
        self._meter, self._engine = meter, engine

    def save(self, run: RunFolder, step: int, seconds: float, sums: Tensor) -> None:
        """Write the state after so many steps, whole or not at all."""
        tensors = {
            f"{part}.{name}": x
            for part, module in self._modules.items()
            for name, x in module.state_dict().items()
        }
        for index, values in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": x for name, x in values.items()}
        tensors |= {"meter": sums, **self._statistics._asdict()}
        scaler = None if self._engine.scaler is None else self._engine.scaler.state_dict()
        metadata = {
            "step": str(step),
            "seconds": str(seconds),
            "scaler": json.dumps(scaler),
            "config": self._config.training_digest(),
        }
        save_tensors(run / STATE, KIND, tensors, metadata)

    def load(self, run: RunFolder) -> tuple[int, float]:
        """Take up the state of a run; return steps done and seconds spent."""
        try:
            tensors, metadata = load_tensors(run / STATE, KIND)
            if metadata["config"] != self._config.training_digest():
                msg = "it was written for other settings than this run's"
                raise ValueError(msg)
            for name, value in self._statistics._asdict().items():
                if not torch.equal(tensors[name], value):
                    msg = f"the data have changed since it was written: their {name} differs"
                    raise ValueError(msg)
            self._take(tensors, json.loads(metadata["scaler"]))
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
            if not 0 < step <= self._config.training.steps:
                images = step * self._config.training.batch
                msg = f"it has seen {images:,} images: training.images can grow, but not shrink"
                raise ValueError(msg)
        except (KeyError, ValueError, RuntimeError, TypeError, OSError) as error:
            msg = (
                f"{run / STATE} cannot be used ({' '.join(str(error).split())}); put a copy of it "
                "back, or begin again in another folder"
            )
            raise ValueError(msg) from error
        return step, seconds

    def _take(self, tensors: Mapping[str, Tensor], scaler: dict[str, float] | None) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): x
                for name, x in tensors.items()
                if name.startswith(prefix)
            }

        for name, module in self._modules.items():
            module.load_state_dict(part(f"{name}."))
        optimiser = self._optimiser.state_dict()
        for key, x in part("optimiser.").items():
            index, name = key.split(".")
            optimiser["state"].setdefault(int(index), {})[name] = x
        self._optimiser.load_state_dict(optimiser)
        if self._engine.scaler is not None and scaler is not None:
            self._engine.scaler.load_state_dict(scaler)
        self._meter.sums.copy_(tensors["meter"])
