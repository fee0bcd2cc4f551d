"""The best averaged weights of a training, by a metric, and their Fréchet distance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cldsde.images.data.samples import as_bytes
from cldsde.images.runs import RunFolder
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.train.learner import Learner

_FIRST_SEED = 2**31  # far from the seeds of samples and evaluations


def distance(learner: Learner, sampler: ImageSampler, folder: Path) -> float:
    """Fréchet distance of the averaged model to the training images, in a classifier's features."""
    # Evaluations of latent models need the objectives of this package.
    from cldsde.images.evaluate.evaluation import Evaluation

    samples, device = learner.config.training.measure_samples, str(learner.engine.device)
    evaluation = Evaluation(data=learner.data, samples=samples, folder=folder, device=device)
    images = sampler.sample(range(_FIRST_SEED, _FIRST_SEED + samples)).images
    [measure] = evaluation.measure(as_bytes(images, learner.space.levels), ["fd"]).values()
    return float(measure["frechet_distance"])


def keep_snapshot(
    run: RunFolder, save: Callable[[Path], object], seen: int, value: float, count: int
) -> None:
    """Write the weights to ``snapshots``, and keep as many files with the smallest values."""
    folder, name = run / "snapshots", f"{seen:012d}.safetensors"
    folder.mkdir(exist_ok=True)
    record = folder / "values.json"
    values: dict[str, float] = json.loads(record.read_text()) if record.exists() else {}
    save(folder / name)
    values[name] = value
    kept = sorted(values, key=values.__getitem__)[:count]
    run.write_json("snapshots/values.json", {name: values[name] for name in sorted(kept)})
    for file in folder.glob("*.safetensors"):
        if file.name not in kept:
            file.unlink()
