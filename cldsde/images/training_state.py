"""What a training depends on from one step to the next, to and from one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cldsde.images.config import RunConfig
from cldsde.images.files import load_tensors, save_tensors
from cldsde.images.model import Statistics
from cldsde.images.runs import RunFolder

__all__ = ["KIND", "STATE", "Meter", "TrainingState"]

STATE = "training.safetensors"
"""File of a run that holds the state of its training until it is done."""

KIND = "a training state of cldsde, version 1"


class Meter:
    """Means of the loss and of the gradient's norm, read seldom: reading waits for the device."""

    def __init__(self, engine: Accelerator) -> None:
        self._engine = engine
        self.sums = torch.zeros(3, dtype=torch.float64 if engine.device.type == "cpu" else None)
        self.sums = self.sums.to(engine.device)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count a step of this process."""
        self.sums += torch.stack([loss, norm.detach().to(loss), torch.ones_like(loss)])

    def means(self) -> tuple[float, float]:
        """Mean loss and norm over all processes since `clear`; 0 where there was no step."""
        loss, norm, steps = cast(Tensor, self._engine.reduce(self.sums, "mean")).tolist()
        return (loss / steps, norm / steps) if steps else (0.0, 0.0)

    def clear(self) -> None:
        """Forget what was counted."""
        self.sums.zero_()


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

    def save(self, run: RunFolder, step: int, seconds: float) -> None:
        """Write the state after so many steps, whole or not at all."""
        tensors = {
            f"{part}.{name}": x
            for part, module in self._modules.items()
            for name, x in module.state_dict().items()
        }
        for index, values in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": x for name, x in values.items()}
        tensors |= {"meter": self._meter.sums, **self._statistics._asdict()}
        scaler = None if self._engine.scaler is None else self._engine.scaler.state_dict()
        metadata = {
            "step": str(step),
            "seconds": str(seconds),
            "scaler": json.dumps(scaler),
            "config": self._digest(),
        }
        save_tensors(run / STATE, KIND, tensors, metadata)

    def load(self, run: RunFolder) -> tuple[int, float]:
        """Take up the state of a run; return steps done and seconds spent.

        Raises
        ------
        ValueError
            If the file is damaged, or was written for other settings or other data.
        """
        try:
            tensors, metadata = load_tensors(run / STATE, KIND)
            if metadata["config"] != self._digest():
                msg = "it was written for other settings than this run's"
                raise ValueError(msg)
            for name, value in self._statistics._asdict().items():
                if not torch.equal(tensors[name], value):
                    msg = f"the data have changed since it was written: their {name} differs"
                    raise ValueError(msg)
            self._take(tensors, json.loads(metadata["scaler"]))
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
            if not 0 < step < self._config.training.steps:
                msg = f"it is of step {step}, beyond the end"
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

    def _digest(self) -> str:
        text = json.dumps(self._config.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
