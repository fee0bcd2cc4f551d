"""Measurements that need a GPU: agreement with the CPU, precision, speed and memory.

``python benchmarks/gpu.py RESULTS`` runs the tests of devices on the first GPU, and measures the
published CIFAR-10 network of CLD there. RESULTS is JSON, with a description of the device. It is
written after each measurement, so that an interruption keeps what has been measured. Exit codes:

- 0: all checks passed.
- 1: a check failed; RESULTS lists it.
- 3: there is no GPU that PyTorch can use; nothing is measured or written.

``--device cpu --small`` runs everything on a tiny network on the CPU, to test this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import torch
from torch import Tensor, nn

import cldsde
from cldsde import GaussianMixture, ReverseProcess, solvers
from cldsde.files import write_whole
from cldsde.images.config import RunConfig, SamplingConfig, load_config
from cldsde.images.data import ArrayImages, DataSet
from cldsde.images.model import ImageSpace, TrainedModel, make_model
from cldsde.images.sample.sampler import ImageSampler, Precision
from cldsde.images.sample.source import CompileMode, speed_up
from cldsde.images.train.engine import check_run, make_engine
from cldsde.images.train.learner import Learner
from cldsde.solvers.named import validated_solvers
from cldsde.solvers.noise import RecordedNoise

NO_GPU = 3
ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "cifar10_cld.toml"
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
    modes: tuple[CompileMode, ...] = ("default", "reduce-overhead")
    tests: tuple[str, ...] = ()

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

    def cast(self, precision: Precision) -> AbstractContextManager[object]:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=dtype, enabled=precision != "fp32")

    def note_share(
        self,
        row: dict[str, Any],
        network: Callable[[], object],
        seconds: float,
        evaluations: int | None = None,
    ) -> None:
        """Note the share of a time that is not spent in the network, if this is a GPU.

        On a CPU the times of a tiny network vary more than the share.
        """
        if self.on_gpu:
            alone = (evaluations or self.evaluations) * self.seconds(network)
            row["share_outside_network"] = 1 - alone / seconds

    @contextmanager
    def peak(self, found: dict[str, Any]) -> Iterator[None]:
        """Note the peak of the GPU's memory, in MiB."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.on_gpu:
            found["peak_mib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20)


class Found(dict[str, Any]):
    """Results of a section; the file of all results is written when one is set."""

    def __init__(self, results: dict[str, Any], file: Path) -> None:
        super().__init__(failed=[])
        self._results, self._file = results, file

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.write()

    def write(self) -> None:
        text = json.dumps(self._results, indent=2) + "\n"
        write_whole(self._file, lambda path: path.write_text(text))


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


def tests(setting: Setting, found: Found) -> None:
    """Outcomes of the tests that run on a device, ``tests/solvers/test_device.py``."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *setting.tests]
        # -P: the installed package is tested, not the working copy.
        command = [sys.executable, "-P", "-m", "pytest", "tests/solvers/test_device.py", *options]
        run = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "CLDSDE_TEST_DEVICE": setting.device},
            capture_output=True,
            text=True,
            check=False,  # failures are results
        )
        print(run.stdout[-4000:], run.stderr[-4000:], file=sys.stderr)
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    found["skipped"] = len(skipped)
    found["failed"] = [case.attrib["name"] for case in failed]
    found["passed"] = len(cases) - found["skipped"] - len(found["failed"])
    found["failed"] += [] if found["passed"] else ["no test has passed"]


def agreement(setting: Setting, found: Found) -> None:
    """Largest difference between a solve on the device and on the CPU, for every grid solver."""
    data = GaussianMixture([0.5, 0.5], [[-1.0, 0.5], [1.0, 0.0]], [[[0.1, 0], [0, 0.2]]] * 2)
    worst: dict[str, float] = {}
    for sde in (cldsde.VPSDE(), cldsde.CLD(), cldsde.PSLD()):
        for name, solver in validated_solvers().items():
            if solver.facts.adaptive or name.startswith("torch"):
                continue
            times = solvers.root_times(1.0, 1e-3, 8)
            states = []
            for device in ("cpu", setting.device):
                g = torch.Generator().manual_seed(0)
                normals = [torch.randn(64, 3 * sde.components, 2, generator=g) for _ in range(64)]
                start = sde.prior.sample((64, 2), generator=g).to(device)
                noise = _Rows(normals)
                process = ReverseProcess(sde, data.score(sde))
                try:
                    states.append(solvers.solve(process, solver, start, times, noise=noise).data)
                except ValueError:  # the solver does not apply to the process
                    break
            if len(states) == 2:
                difference = (states[0] - states[1].cpu()).abs().max().item()
                worst[name] = max(worst.get(name, 0.0), difference)
    found["largest_difference"] = worst
    found["failed"] = [n for n, x in worst.items() if not x < 1e-3]


class _Rows(RecordedNoise):
    """Recorded normals, as many rows as are asked for."""

    def normal(self, z: Tensor, rows: int) -> Tensor:
        return super().normal(z, rows)[:, :rows]


def precision(setting: Setting, found: Found) -> None:
    """Relative error of the network in half precisions, and whether it is finite."""
    network, inputs = _network(setting, setting.batches[0])
    with torch.no_grad():
        exact = network(*inputs)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            with torch.autocast(torch.device(setting.device).type, dtype=dtype):
                out = network(*inputs).float()
            found[name] = ((out - exact).norm() / exact.norm()).item()
            if not found[name] < 0.05:
                found["failed"].append(name)


def sampling(setting: Setting, found: Found) -> None:
    """Images per second of sampling, its share outside the network, and peak memory."""
    kinds: list[tuple[Precision, bool, CompileMode | None]] = [("fp32", False, None)]
    kinds += [("bf16", last, mode) for mode in (None, *setting.modes) for last in (False, True)]
    for batch in setting.batches:
        reference: Tensor | None = None
        for kind, last, mode in kinds:
            torch.compiler.reset()  # the number of compilations of one function is limited
            network, inputs = _network(setting, batch)
            config, space = setting.config(), setting.space()
            made = make_model(config, space).to(setting.device).eval()
            made.score.network.load_state_dict(network.state_dict())
            model = TrainedModel(
                score=made.score,
                space=space,
                digest="",
                sampling=config.sampling,
                model=made,
                config=config,
                images_seen=0,
            )
            speed_up(model, mode, channels_last=last)
            recipe = SamplingConfig(solver="em", nfe=setting.evaluations, grid="quadratic")
            sampler = ImageSampler.of(model, recipe, batch=batch, precision=kind)
            work = partial(sampler.draw, list(range(batch)))
            row: dict[str, Any] = {}
            with setting.peak(row):
                images = work().images.double()
                seconds = setting.seconds(work)
            row["images_per_second"] = batch / seconds
            row["evaluations_per_second"] = batch * setting.evaluations / seconds
            reference = images if reference is None else reference
            row["grey_levels_from_fp32"] = (images - reference).abs().mean().item()
            with torch.no_grad(), setting.cast(kind):
                setting.note_share(row, partial(made.score.network, *inputs), seconds)
            words = [kind, "channels last" if last else None, mode and f"compile {mode}"]
            found[f"batch {batch}, {', '.join(word for word in words if word)}"] = row


def training(setting: Setting, found: Found) -> None:
    """Images per second of training, its share outside the network, and peak memory."""
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
            loaded = learner.load(0)
            seconds = setting.seconds(partial(learner.step, 0, loaded))
        network, inputs = _network(setting, batch)
        network.train()

        def alone(network: nn.Module = network, inputs: Any = inputs) -> None:
            with setting.cast("bf16"):
                out = network(*inputs)
            out.float().square().sum().backward()

        row["images_per_second"] = batch / seconds
        setting.note_share(row, alone, seconds, evaluations=1)
        found[f"batch {batch}"] = row


def processes(setting: Setting, found: Found) -> None:
    """Difference of gradients between two processes on one device and a single process."""
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
    # Delete DDP first. As the last owner of the process group it would join the group's threads
    # while it holds the GIL, for which they wait.
    del shared
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


SECTIONS: dict[str, Callable[[Setting, Found], None]] = {
    "tests": tests,
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
            tests=("-k", "euler-maruyama and VP"),
        )
    network = setting.config().to_dict()["network"]
    found = {"device": describe(options.device), "small": options.small, "network": network}
    for name, section in SECTIONS.items():
        print(name, file=sys.stderr)
        found[name] = Found(found, options.results)
        section(setting, found[name])
        found[name].write()
    failed = [f"{name}: {x}" for name in SECTIONS for x in found[name]["failed"]]
    print("\n".join(f"failed: {x}" for x in failed) or "all checks passed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
