"""Plant faults in a copy of the package, and show that the tests find each of them.

    python tools/faults.py [WORD …]      all faults, or those whose names contain a word

The exit code is 1 if a fault survives. It is 2 if a measurement failed: no fault was chosen, one
could not be planted or stopped the tests, or the tests fail without a fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawTextHelpFormatter
from pathlib import Path
from typing import NamedTuple

import cldsde
from cldsde import solvers, validation

TESTS = Path(__file__).parents[1] / "tests"


class Fault(NamedTuple):
    """A text in a file of the package, its wrong replacement, and the tests that are to fail."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


CONTRACT, ORDERS = "solvers/test_contract.py", "solvers/test_orders.py"

FAULTS = [
    Fault(
        "noise × 1.001 in Euler–Maruyama",
        "solvers/euler_maruyama.py",
        ", h.sqrt() * G)",
        ", 1.001 * h.sqrt() * G)",
        ORDERS,
    ),
    Fault(
        "noise × 1.001 in a multistep method",
        "solvers/multistep_coefficients.py",
        "        noise,\n        psi[:, -1]",
        "        1.001 * noise,\n        psi[:, -1]",
        ORDERS,
    ),
    Fault(
        "fresh normals × 1.001",
        "solvers/noise.py",
        "return drawn.transpose(0, 1)",
        "return 1.001 * drawn.transpose(0, 1)",
        "solvers/test_noise.py",
    ),
    Fault(
        "fresh normals used twice",
        "solvers/noise.py",
        "generator=self.generator, dtype=z.dtype",
        "generator=self.generator and self.generator.clone_state(), dtype=z.dtype",
        "solvers/test_noise.py",
    ),
    Fault(
        "times shifted by a step",
        "solvers/staged.py",
        "return times[:-1]",
        "return times[1:]",
        ORDERS,
    ),
    Fault(
        "midpoint at the wrong time in SSCS",
        "solvers/sscs.py",
        "torch.stack([times[:-1], middle], dim=1)",
        "torch.stack([times[:-1], times[1:]], dim=1)",
        ORDERS,
    ),
    Fault(
        "half-step at the wrong time in a splitting",
        "solvers/splitting.py",
        "start - h * ((before + 1) / count)",
        "start - h * ((before + 1) / (count + 1))",
        "solvers/test_splitting.py",
    ),
    Fault(
        "noise of a sample's stream used twice",
        "solvers/noise.py",
        "done, self._used = done + count, self._used + count",
        "done, self._used = done + count, self._used + count // 2",
        "solvers/test_noise.py",
    ),
    Fault(
        "noise of a Brownian path used twice",
        "solvers/brownian.py",
        "SeedSequence([self._seed, node.key, bits])",
        "SeedSequence([self._seed, node.key.bit_length()])",
        "solvers/test_brownian.py",
    ),
    Fault(
        "evaluation beyond ε by the probability flow",
        "solvers/probability_flow.py",
        "(samples.t - nodes * h).clamp_min_(end)",
        "(samples.t - nodes * (1 + 1e-9) * h)",
        CONTRACT,
    ),
    Fault(
        "evaluation beyond ε by a method on a grid",
        "solvers/stochastic_heun.py",
        "torch.stack([times[:-1], times[1:]], dim=1)",
        "torch.stack([times[:-1], 0.999 * times[1:]], dim=1)",
        CONTRACT,
    ),
    Fault(
        "an evaluation counted twice on a grid",
        "score/reverse.py",
        "else self._counts[number]",
        "else 2 * self._counts[number]",
        CONTRACT,
    ),
    Fault(
        "evaluations of an adaptive solver not counted",
        "solvers/adaptive.py",
        "self._nfev += evaluations * self.active",
        "self._nfev += (evaluations - 1) * self.active",
        CONTRACT,
    ),
    Fault(
        "tables on the default device",
        "solvers/euler_maruyama.py",
        'dtype=torch.float64, device="cpu")',
        "dtype=torch.float64)",
        "solvers/test_device.py",
    ),
    Fault(
        "a bypassed forward",
        "score/reverse.py",
        "checked_score(self._score(z, at.argument, planned=at)",
        "checked_score(self._score.forward(z, at.argument, planned=at)",
        "solvers/test_plan.py",
    ),
]


def copied(folder: Path) -> Path:
    """A copy of the package, laid out as it is installed."""
    package = folder / "cldsde"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(cldsde.__file__).parent, package, ignore=ignore)
    for module in (solvers, validation):
        target = package / module.__name__.rpartition(".")[2]
        if not target.exists():
            shutil.copytree(Path(module.__file__).parent, target, ignore=ignore)
    return package


def run(tests: str, package: Path) -> tuple[int, str]:
    """The exit code of a file of tests, and the line that says which test failed."""
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "--tb=no", str(TESTS / tests)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        cwd=TESTS.parent,
    )
    lines = result.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return result.returncode, (failed or lines or [result.stderr])[0]


def planted(fault: Fault, package: Path) -> tuple[int, str]:
    """Plant a fault, run its tests, and remove it; return as `run` does."""
    file = package / fault.file
    source = file.read_text(encoding="utf-8")
    if source.count(fault.right) != 1:
        return 2, f"{fault.file} holds {source.count(fault.right)} times: {fault.right}"
    file.write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")
    try:
        return run(fault.tests, package)
    finally:
        file.write_text(source, encoding="utf-8")


def main() -> int:
    """Plant the faults that contain a word; return the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of names of faults")
    words = parser.parse_args().words
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if not chosen:
        print("no fault is planted: no name contains", " or ".join(words))
        return 2
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        package = copied(Path(folder))
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            failed, line = run(tests, package)
            if failed:
                print(f"FAILS     without a fault, {tests}: {line}")
                return 2
        for fault in chosen:
            found, line = planted(fault, package)
            code = max(code, {0: 1, 1: 0}.get(found, 2))
            shown = {0: "SURVIVES", 1: "found"}.get(found, "FAILS")
            print(f"{shown:8}  {fault.name}: {line}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
