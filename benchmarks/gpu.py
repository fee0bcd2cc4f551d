"""Measurements that need a GPU: agreement with the CPU, precision, speed and memory.

``python benchmarks/gpu.py RESULTS`` measures the published CIFAR-10 network of CLD on the first GPU
and writes RESULTS as JSON, with a description of the device. Exit codes:

- 0: all checks passed.
- 1: a check failed; RESULTS is written and lists it.
- 3: there is no GPU that PyTorch can use; nothing is measured or written.

``--device cpu --small`` runs everything on a tiny network on the CPU, to test this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cldsde
from cldsde import GaussianMixture, ReverseProcess, solvers
from cldsde.images.config import RunConfig, SamplingConfig, load_config
from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.model import ImageSpace, make_model
from cldsde.images.sample.sampler import ImageSampler
from cldsde.images.train.engine import check_run, make_engine
from cldsde.images.train.learner import Learner
from cldsde.solvers.noise import RecordedNoise

NO_GPU = 3
CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_cld.toml"
SMALL = (
    "network.options.channels=[8,8]",
    "network.options.blocks=1",
    "network.options.attention=[]",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Device, sizes and number of repetitions."""

    device: str
    size: int = 32
    batches: tuple[int, ...] = (64, 128)
    evaluations: int = 20
    rounds: int = 5
    overrides: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("default", "reduce-overhead")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def config(self, *more: str) -> RunConfig:
        return load_config(CONFIG, [*self.overrides, *more])

    def space(self) -> ImageSpace:
        return ImageSpace((3, self.size, self.size))

    def seconds(self, work: Callable[[], object]) -> float:
        """Median time of some rounds, after two that warm up."""
        times = []
        for number in range(self.rounds + 2):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if number > 1:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def peak(self, found: dict[str, Any]) -> Iterator[None]:
        """Note the peak of the GPU's memory, in MiB."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.on_gpu:
            found["peak_mib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20)


def describe(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    found["cldsde"] = cldsde.__version__
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["name"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["multiprocessors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def agreement(setting: Setting) -> dict[str, Any]:
    """Largest difference between a solve on the device and on the CPU, for every grid solver."""
    data = GaussianMixture([0.5, 0.5], [[-1.0, 0.5], [1.0, 0.0]], [[[0.1, 0], [0, 0.2]]] * 2)
    worst: dict[str, float] = {}
    for sde in (cldsde.VPSDE(), cldsde.CLD(), cldsde.PSLD()):
        for name, solver in solvers.named_solvers().items():
            if solver.facts.adaptive or name.startswith("torch"):
                continue
            times = solvers.root_times(1.0, 1e-3, 8)
            found = []
            for device in ("cpu", setting.device):
                g = torch.Generator().manual_seed(0)
                normals = [torch.randn(64, 3 * sde.components, 2, generator=g) for _ in range(64)]
                start = sde.prior.sample((64, 2), generator=g).to(device)
                noise = _Rows(normals)
                process = ReverseProcess(sde, data.score(sde))
                try:
                    found.append(solvers.solve(process, solver, start, times, noise=noise).data)
                except ValueError:  # the solver does not apply to the process
                    break
            if len(found) == 2:
                difference = (found[0] - found[1].cpu()).abs().max().item()
                worst[name] = max(worst.get(name, 0.0), difference)
    return {"largest_difference": worst, "failed": [n for n, x in worst.items() if not x < 1e-3]}


class _Rows(RecordedNoise):
    """Recorded normals, as many rows as are asked for."""

    def normal(self, z: Tensor, rows: int) -> Tensor:
        return super().normal(z, rows)[:, :rows]


def precision(setting: Setting) -> dict[str, Any]:
    """Relative error of the network in half precisions, and whether it is finite."""
    network, inputs = _network(setting, setting.batches[0])
    with torch.no_grad():
        exact = network(*inputs)
        found: dict[str, Any] = {"failed": []}
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            with torch.autocast(torch.device(setting.device).type, dtype=dtype):
                out = network(*inputs).float()
            found[name] = ((out - exact).norm() / exact.norm()).item()
            if not found[name] < 0.05:
                found["failed"].append(name)
    return found


def sampling(setting: Setting) -> dict[str, Any]:
    """Images per second of sampling, its share outside the network, and peak memory."""
    found: dict[str, Any] = {"failed": []}
    kinds: list[tuple[str, Any, bool, str | None]] = [("fp32", None, False, None)]
    kinds += [
        ("bf16", torch.bfloat16, False, None),
        ("bf16, channels last", torch.bfloat16, True, None),
    ]
    kinds += [(f"bf16, compile={mode}", torch.bfloat16, True, mode) for mode in setting.modes]
    for batch in setting.batches:
        reference: Tensor | None = None
        for name, dtype, last, mode in kinds:
            network, inputs = _network(setting, batch)
            model = make_model(setting.config(), setting.space()).to(setting.device).eval()
            score = model.score
            score.network.load_state_dict(network.state_dict())
            if last:
                score.network.to(memory_format=torch.channels_last)
            if mode is not None:
                score.network = torch.compile(score.network, mode=mode)
            recipe = SamplingConfig(solver="em", nfe=setting.evaluations, grid="quadratic")
            sampler = ImageSampler(score, setting.space(), recipe, batch=batch)
            kind = torch.device(setting.device).type
            row: dict[str, Any] = {}
            cast = nullcontext() if dtype is None else torch.autocast(kind, dtype=dtype)
            with setting.peak(row), torch.no_grad(), cast:
                images = sampler.draw(range(batch)).images.double()
                seconds = setting.seconds(partial(sampler.draw, range(batch)))
                alone = setting.seconds(partial(score.network, *inputs))
            row["images_per_second"] = batch / seconds
            row["evaluations_per_second"] = batch * setting.evaluations / seconds
            row["share_outside_network"] = 1 - setting.evaluations * alone / seconds
            reference = images if reference is None else reference
            row["grey_levels_from_fp32"] = (images - reference).abs().mean().item()
            found[f"batch {batch}, {name}"] = row
    return found


def training(setting: Setting) -> dict[str, Any]:
    """Images per second of training, its share outside the network, and peak memory."""
    found: dict[str, Any] = {"failed": []}
    for batch in setting.batches:
        config = setting.config(
            f"training.batch={batch}", "training.images=1_000_000", "training.held_out=8"
        )
        g = torch.Generator().manual_seed(0)
        size = setting.size
        pixels = torch.randint(256, (2 * batch, 3, size, size), generator=g, dtype=torch.uint8)
        data = DataSet(ArrayImages(pixels), ArrayImages(pixels[:8]))
        facts = check_run(config, data, device=setting.device)
        learner = Learner(config, data, facts, make_engine(config, setting.device))
        row: dict[str, Any] = {}
        with setting.peak(row):
            loaded = learner.feed.load(0)
            seconds = setting.seconds(partial(learner.step, 0, loaded))
        network, inputs = _network(setting, batch)
        network.train()

        def alone(network: nn.Module = network, inputs: Any = inputs) -> None:
            with torch.autocast(torch.device(setting.device).type, dtype=torch.bfloat16):
                out = network(*inputs)
            out.float().square().sum().backward()

        row["images_per_second"] = batch / seconds
        row["share_outside_network"] = 1 - setting.seconds(alone) / seconds
        found[f"batch {batch}"] = row
    return found


def processes(setting: Setting) -> dict[str, Any]:
    """Difference of gradients between two processes on one device and a single process."""
    found: dict[str, Any] = {"failed": []}
    backends = ["gloo", "nccl"] if setting.on_gpu else ["gloo"]
    for backend in backends:
        with tempfile.TemporaryDirectory() as folder:
            try:
                torch.multiprocessing.spawn(
                    _half_of_a_batch, (backend, folder, setting.device), nprocs=2
                )
            except Exception as error:  # noqa: BLE001 -- what a backend cannot do is a result
                found[backend] = str(error).strip().splitlines()[-1]
                # NCCL does not let two processes share a device.
                found["failed"] += [backend] if backend == "gloo" else []
                continue
            shared, alone = (torch.load(Path(folder, f"{name}.pt")) for name in ("shared", "alone"))
        found[backend] = (shared - alone).abs().max().item()
        if not found[backend] < 1e-5:
            found["failed"].append(backend)
    return found


def _half_of_a_batch(rank: int, backend: str, folder: str, device: str) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1)).to(device)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).to(device)
    single = copy.deepcopy(network)
    shared = DistributedDataParallel(network)
    shared(x[rank::2]).mean().backward()
    single(x).mean().backward()
    if rank == 0:
        for name, made in (("shared", network), ("alone", single)):
            gradient = torch.cat([p.grad.flatten() for p in made.parameters()])  # type: ignore[union-attr]
            torch.save(gradient.cpu(), f"{folder}/{name}.pt")
    distributed.destroy_process_group()


def _network(setting: Setting, batch: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network with weights that say something, and inputs of a batch."""
    model = make_model(setting.config(), setting.space())
    network = model.score.network
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
    z = torch.randn(batch, 6, setting.size, setting.size, generator=g)
    clock = torch.linspace(0.01, 1, batch).log()
    network = network.to(setting.device).eval()
    return network, (z.to(setting.device), clock.to(setting.device))


SECTIONS = {
    "agreement": agreement,
    "precision": precision,
    "processes": processes,
    "sampling": sampling,
    "training": training,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="a tiny network, to test this file")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"no GPU: PyTorch {torch.__version__} finds no CUDA device, so nothing was measured "
            f"(exit code {NO_GPU})",
            file=sys.stderr,
        )
        return NO_GPU
    options.results.parent.mkdir(parents=True, exist_ok=True)
    setting = Setting(device=options.device)
    if options.small:
        setting = Setting(
            device=options.device,
            size=16,
            batches=(8,),
            evaluations=3,
            rounds=1,
            overrides=SMALL,
            modes=(),
        )
    found: dict[str, Any] = {"device": describe(options.device), "small": options.small}
    for name, section in SECTIONS.items():
        print(name, file=sys.stderr)
        found[name] = section(setting)
    failed = [f"{name}: {x}" for name in SECTIONS for x in found[name]["failed"]]
    options.results.write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(f"failed: {x}" for x in failed) or "all checks passed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
