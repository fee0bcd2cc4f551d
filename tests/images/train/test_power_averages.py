"""Averages with power-function profiles, and their combinations."""

import shutil

import pytest
import scipy.stats
import torch
from torch import nn

from cldsde.cli import main
from cldsde.errors import SettingError
from cldsde.images.model import load_model
from cldsde.images.power_averages import WIDTHS, combination, power
from probes import generator
from tiny_runs import NETWORK, SHORT, train_digits
from tolerances import EPS, EPS32, rounding
from trainings import configured, trained

CONFIG = {
    "network": {"options": NETWORK},
    "training": {**SHORT, "learning_rate": 1e-2, "ema_decay": 0.0, "power_averages": True}
    | {"images": 192, "save_every": 16, "sample_every": 192, "snapshots": 12}
    | {"micro_batch": 16, "log_every": 96},
    "sampling": {"solver": "sscs", "nfe": 3},
}
# Of the distance between the average and the last weights, least squares of the profiles at twelve
# times leave 0.2 % for widths up to 0.15, and 4 % for 0.25: see figure 4 of Karras et al.
LEFT = {0.07: 0.002, 0.15: 0.003, 0.25: 0.04}


def direct(trajectory: torch.Tensor, width: float) -> torch.Tensor:
    """Average of the weights of all steps by the integrals of the profile over steps."""
    n, exponent = len(trajectory), power(width) + 1
    ends = (torch.arange(n + 1, dtype=torch.float64) / n) ** exponent
    return ends.diff() @ trajectory


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_a_profile_has_the_relative_width(width):
    # The distribution with density (γ + 1) τ^γ; the root is found to 1e-13.
    found = scipy.stats.beta(power(width) + 1, 1).std()
    assert found == pytest.approx(width, rel=rounding(1000), abs=0)


@pytest.mark.parametrize("width", [*WIDTHS, *LEFT])
def test_saved_averages_combine_to_that_of_a_width(width):
    walk = torch.randn(480, 200, dtype=torch.float64, generator=generator()).cumsum(0)
    saved = [(n, w, direct(walk[:n], w)) for n in range(40, 481, 40) for w in WIDTHS]
    steps, widths, averages = zip(*saved, strict=True)
    shares = torch.tensor(combination(steps, widths, width)[0], dtype=torch.float64)
    expected = direct(walk, width)
    error = float((shares @ torch.stack(averages) - expected).norm())
    # A width that was saved is found up to rounding, with the condition of the products.
    assert error < LEFT.get(width, 1e4 * EPS) * float((walk[-1] - expected).norm())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that saved its weights at every step."""
    folder = tmp_path_factory.mktemp("power") / "run"
    trained(folder, configured(CONFIG))
    return folder


def weights(file) -> torch.Tensor:
    return nn.utils.parameters_to_vector(load_model(file).model.parameters()).double()


def test_a_width_is_loaded_from_the_snapshots_of_a_run(run):
    trajectory = torch.stack([weights(x) for x in sorted((run / "snapshots").glob("0*.safe*"))])
    assert len(trajectory) == 12
    for width in WIDTHS:
        expected = direct(trajectory, width)
        for name in (f"snapshots/power-{width}-000000000192", f"power-{width}", f"power-{width}0"):
            found = weights(run / f"{name}.safetensors")
            assert float((found - expected).norm()) < 12 * EPS32 * float(expected.norm())
    expected = direct(trajectory, 0.07)
    error = float((weights(run / "power-0.07.safetensors") - expected).norm())
    assert error < LEFT[0.07] * float((trajectory[-1] - expected).norm())
    first, second = (load_model(run / f"power-{x}.safetensors") for x in (0.06, 0.07))
    assert first.digest != second.digest
    for name, value in first.model.named_buffers():
        assert torch.equal(value, second.model.get_buffer(name)), name


@pytest.mark.slow
def test_commands_take_a_width(tmp_path):
    folder = train_digits(tmp_path / "run", "--set", "training.power_averages=true")
    file, out = folder / "power-0.08.safetensors", tmp_path / "samples.png"
    assert main(["sample", str(file), "--out", str(out), "--seeds", "0-3", "--device", "cpu"]) == 0
    words = ["--metrics", "bpd", "--likelihood-images", "2", "--device", "cpu"]
    assert main(["evaluate", str(file), *words]) == 0
    assert out.exists()
    assert (folder / "evaluation-power-0.08.jsonl").exists()
    assert not file.exists()


def test_too_few_checkpoints_are_rejected(run, tmp_path):
    few = tmp_path / "few"
    early = [f"power-*-{n:012d}.safetensors" for n in range(16, 176, 16)]
    shutil.copytree(run, few, ignore=shutil.ignore_patterns(*early))
    with pytest.raises(ValueError, match=r"power-0\.25.*: 2 checkpoints cannot give .*error .*%"):
        load_model(few / "power-0.25.safetensors")
    (few / "power-0.25.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert torch.equal(weights(few / "power-0.25.safetensors"), weights(run))


def test_widths_out_of_reach_and_runs_without_averages_are_rejected(run, tmp_path):
    for width in ("0.01", "0.3"):
        with pytest.raises(ValueError, match=rf"power-{width}.*must lie in \[0.05, 0.25\]"):
            load_model(run / f"power-{width}.safetensors")
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("power-*"))
    with pytest.raises(SettingError, match=r"training\.power_averages: .*bare has saved no"):
        load_model(bare / "power-0.1.safetensors")
