"""The measurements of a GPU: their logic on the CPU, and what happens without a GPU."""

import json

import pytest
import torch

import gpu

REDUCED = 1e-5  # gradients in single precision that two processes add in another order


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
    assert found["tests"]["passed"] > 0
    # Both solves are on the CPU.
    assert set(found["agreement"]["largest_difference"].values()) == {0.0}
    assert found["processes"]["gloo"] < REDUCED
    speeds = [row["images_per_second"] for row in found["sampling"].values() if row]
    assert len(speeds) == 3  # fp32, bf16, channels last
    assert min(speeds) > 0
