"""The measurements of a GPU: their logic on the CPU, and what happens without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    results = tmp_path / "gpu.json"
    assert gpu.main([str(results)]) == gpu.NO_GPU == 3
    assert "finds no CUDA device, so nothing was measured (exit code 3)" in capsys.readouterr().err
    assert not results.exists()


@pytest.mark.slow
def test_everything_is_measured_on_the_cpu_with_a_tiny_network(tmp_path, capsys):
    results = tmp_path / "gpu.json"
    assert gpu.main([str(results), "--device", "cpu", "--small"]) == 0
    assert "all checks passed" in capsys.readouterr().err
    found = json.loads(results.read_text())
    assert set(gpu.SECTIONS) <= set(found)
    assert found["device"]["torch"] == torch.__version__
    # Both solves are on the CPU.
    assert set(found["agreement"]["largest_difference"].values()) == {0.0}
    assert found["processes"]["gloo"] < 1e-5
    speeds = [row["images_per_second"] for row in found["sampling"].values() if row]
    assert min(speeds) > 0


def test_a_difference_that_is_too_large_fails(tmp_path, monkeypatch):
    failing = {"agreement": lambda _: {"failed": ["euler-maruyama"]}}
    monkeypatch.setattr(gpu, "SECTIONS", failing)
    results = tmp_path / "gpu.json"
    assert gpu.main([str(results), "--device", "cpu"]) == 1
    assert json.loads(results.read_text())["agreement"]["failed"] == ["euler-maruyama"]
