"""Train, sample and evaluate from the command line."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import tempfile
import tomllib

import numpy as np
import pytest

from cldsde.cli import main
from cldsde.files import file_lock
from cldsde.solvers import Plan
from command import refused

CONFIG = """
[network]
options = { channels = [16, 16] }

[training]
images = 64
batch = 16
learning_rate = 1e-3
log_every = 32
save_every = 32
sample_every = 64

[sampling]
solver = "sscs"
nfe = 4
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.toml"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", str(config), "--out", str(folder), "--device", "cpu"]) == 0
    return folder


def test_a_run_holds_its_configuration_metrics_samples_and_model(run):
    names = {file.name for file in run.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "model.safetensors", "samples"} | {
        "tensorboard",
        "training.safetensors",
    }
    assert json.loads((run / "config.json").read_text())["training"]["images"] == 64


def test_the_printed_configuration_is_complete_and_can_be_used(config, run, capsys, tmp_path):
    assert main(["train", str(config), "--print-config", "--set", "training.batch=32"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["training"]["batch"] == 32
    assert tomllib.loads(text)["training"]["ema_decay"] == 0.9999
    (tmp_path / "again.toml").write_text(text)
    assert main(["train", str(tmp_path / "again.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text


def test_the_same_command_on_a_finished_run_changes_nothing(config, run, capsys):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert main(["train", str(config), "--out", str(run), "--resume", "--device", "cpu"]) == 0
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_code_that_a_run_names_is_not_run(run, tmp_path, monkeypatch, capsys, command):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (tmp_path / "planted.py").write_text("raise SystemExit(99)")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["sampling"]["solver"] = "planted:Solver"
    (folder / "config.json").write_text(json.dumps(config))
    assert "planted:Solver, is code outside of cldsde" in refused(capsys, command, folder)


def test_training_refuses_in_one_line(config, run, capsys, tmp_path):
    out = tmp_path / "out"
    cases = [
        ([tmp_path / "missing.toml"], "missing.toml: cannot be read"),
        ([config, "--set", "training.btch=3"], "training.btch: unknown key; did you mean batch?"),
        (
            [config, "--set", "training.precision=fp8"],
            "training.precision: must be 'fp32'",
        ),
        ([config, "--set", "sampling.solver=ssc"], "sampling.solver: solver must be"),
        (
            [config, "--set", "sampling.nfe=1000000000000"],
            "sampling.nfe: must be less than",
        ),
        ([config, "--set", "process.options.friction=1e30"], "process.options"),
        (
            [config, "--set", "network.options.channels=[16, 17]"],
            "network.options: groups must divide",
        ),
        ([config, "--set", "data.name=folder"], "data.options.path: is missing"),
        ([config, "--resume"], "--resume"),
        ([config, "--seed", "-1"], "--seed: must be"),
        ([config, "--device", "gpu"], "--device must be"),
    ]
    for arguments, words in cases:
        assert words in refused(capsys, "train", *arguments, "--out", out), arguments
        assert not out.exists()
    message = refused(capsys, "train", config, "--set", "training.batch=32", "--out", run)
    assert "other settings (training.batch)" in message


def test_samples_go_into_a_file_a_picture_or_a_folder(run, tmp_path, capsys):
    arguments = ["sample", str(run), "--seeds", "3-7", "--device", "cpu", "--out"]
    for name in ("a.npz", "a.png", "a"):
        assert main([*arguments, str(tmp_path / name)]) == 0
        assert "5 seeds" in capsys.readouterr().out
    found = np.load(tmp_path / "a.npz")
    assert found["images"].shape == (5, 8, 8, 1)
    assert found["images"].max() <= 16  # digits have 17 levels
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        f"{i}.png" for i in range(3, 8)
    ]


def test_a_method_of_torchdiffeq_with_fixed_steps_takes_a_budget(run, tmp_path, monkeypatch):
    solved, solve = [], Plan.solve
    monkeypatch.setattr(
        Plan, "solve", lambda self, *a, **o: solved.append(self) or solve(self, *a, **o)
    )
    arguments = ["sample", str(run), "--solver", "torchdiffeq-rk4", "--nfe", "40", "--seeds", "0-1"]
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path / "a.npz")]) == 0
    # Four evaluations per step; one of the 40 denoises.
    (plan,) = solved
    assert (len(plan.times) - 1, plan.nfev) == (9, 36)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--solver", "sscz"], "'sscz'; did you mean sscs?"),
        (["--nfe", "1"], "--nfe: must be"),
        (["--solver", "probability-flow", "--nfe", "10"], "is adaptive; use --set"),
        (["--seeds", "5-3"], "--seeds must be A-B"),
        (["--seeds", "x"], "--seeds must be A-B"),
        (["--seeds", "0-3", "--seed", "5"], "alternatives"),
        (["--grid", "cubic"], "--grid: must be 'uniform'"),
        (["--t-end", "0"], "--t-end: must be"),
        (["--set", "rtol"], "--set: takes"),
        (["--set", "order=3"], "options.order: unknown key"),
        (["--class", "1"], "--class: the network was not trained with classes"),
        (["--known", "x.png"], "--known: needs observe"),
        (["--out", "x.gif"], "--out: must be"),
        (["--out", "."], "--out: must name a file, or a folder"),
    ],
)
def test_sampling_refuses_in_one_line(run, capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "sample", run, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_solver_is_found_in_the_folder_where_the_user_stands(run, tmp_path, monkeypatch):
    (tmp_path / "standing_here.py").write_text(
        "from cldsde import solvers\n\n\nclass Own(solvers.EulerMaruyama):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in {"", "."}])
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "own.npz")
    arguments = ["sample", str(run), "--solver", "standing_here:Own", "--nfe", "3", "--seeds", "0"]
    assert main([*arguments, "--device", "cpu", "--out", out]) == 0


def test_an_output_that_another_command_draws_to_is_refused(run, tmp_path, capsys):
    with file_lock(tmp_path / "x.npz.parts", wait=False):
        message = refused(capsys, "sample", run, "--out", tmp_path / "x.npz")
    assert "x.npz is being written by another process; wait, or name another" in message


def test_runs_that_cannot_be_sampled_are_refused(run, capsys, tmp_path):
    assert "is no folder" in refused(capsys, "sample", tmp_path / "mistyped")
    assert "holds no config.json" in refused(capsys, "sample", tmp_path)


def test_a_run_is_measured_and_what_is_done_is_kept(run, tmp_path, capsys):
    out = tmp_path / "results.json"
    arguments = ["evaluate", str(run), "--out", str(out), "--device", "cpu", "--samples", "30"]
    arguments += ["--solver", "sscs,em", "--nfe", "3,5", "--repeats", "2"]
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in table[2:6]] == [
        [f" {solver} ", f" {nfe} "] for solver in ("sscs", "euler-maruyama") for nfe in (3, 5)
    ]
    found = json.loads(out.read_text())
    assert [list(row["cells"]) for row in found["recipes"]] == [["0-29", "30-59"]] * 4
    spent = [cell["sampling"]["nfe"] for row in found["recipes"] for cell in row["cells"].values()]
    assert spent == [3, 3, 5, 5] * 2
    before = out.read_text()
    assert main(arguments) == 0
    assert out.read_text() == before
    assert main([*arguments, "--metrics", "bpd", "--likelihood-images", "2"]) == 0
    bits = json.loads(out.read_text())["likelihood"]
    assert bits["images"] == 2
    assert "bits per dim" in capsys.readouterr().out


def test_samples_are_as_far_from_the_data_in_a_file_a_folder_and_of_the_run(run, tmp_path):
    """Digits have 17 levels, which a file holds as they are and a picture as bytes."""
    name, device = "fd classifier train", ["--device", "cpu"]
    out = str(tmp_path / "run.json")
    assert main(["evaluate", str(run), "--samples", "30", "--out", out, *device]) == 0
    (cell,) = json.loads((tmp_path / "run.json").read_text())["recipes"][0]["cells"].values()
    for samples in (tmp_path / "folder", tmp_path / "file.npz"):
        assert main(["sample", str(run), "--seeds", "0-29", "--out", str(samples), *device]) == 0
        assert main(["evaluate", str(samples), "--reference", str(run), *device]) == 0
        text = samples.with_name(f"{samples.name}-evaluation.json").read_text()
        measured = json.loads(text)["measures"][name]
        assert measured["samples"] == 30
        # Rounding: a file gives them in another order, and features are of single precision.
        distance = pytest.approx(cell[name]["frechet_distance"], rel=1e-4)
        assert measured["frechet_distance"] == distance


def test_samples_of_every_name_have_results_of_their_own(run, tmp_path, capsys, monkeypatch):
    device = ["--device", "cpu"]
    places = [tmp_path / name for name in ("x", "x.npz")]
    for place in places:
        assert main(["sample", str(run), "--seeds", "0-9", "--out", str(place), *device]) == 0
    places.append(tmp_path / "x.v2")
    shutil.copytree(tmp_path / "x", tmp_path / "x.v2")
    for place in places:
        assert main(["evaluate", str(place), "--reference", str(run), *device]) == 0
    assert {file.name for file in tmp_path.glob("*.json")} == {
        f"{place.name}-evaluation.json" for place in places
    }
    (tmp_path / "x-evaluation.json").unlink()
    monkeypatch.chdir(tmp_path / "x")
    capsys.readouterr()
    assert main(["evaluate", ".", "--reference", str(run), *device]) == 0
    assert "| x |" in capsys.readouterr().out
    assert (tmp_path / "x-evaluation.json").exists()


def test_samples_that_cannot_be_measured_are_refused_by_what_was_given(run, tmp_path, capsys):
    np.savez(tmp_path / "one.npz", images=np.zeros((1, 8, 8, 1), np.uint8), levels=17)
    np.save(tmp_path / "floats.npy", np.zeros((20, 8, 8)))
    cases = [("one.npz", "fd needs at least 2 images; got 1"), ("floats.npy", "images of uint8")]
    for name, words in cases:
        message = refused(capsys, "evaluate", tmp_path / name, "--reference", run)
        assert words in message
        assert "held_out" not in message


def test_evaluation_refuses_in_one_line(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.py").write_text("class Network(:\n")
    (tmp_path / "lacking.py").write_text("import nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    cases = [
        ([tmp_path / "nothing"], "there is no run"),
        ([run, "--metrics", "fdd"], "--metrics: must be one of"),
        ([run, "--metrics", "fid"], "--weights"),
        ([run, "--metrics", "fid", "--weights", tmp_path / "w.pth"], "w.pth"),
        ([run, "--samples", "1"], "--samples: must be at least 2"),
        (
            [run, "--features", "nowhere:thing"],
            "--features: 'nowhere:thing' cannot be loaded",
        ),
        ([run, "--features", "math:pi"], "--features: must be callable"),
        (
            [run, "--features", "torch:flatten"],
            "flatten' fails for images (2, 1, 8, 8) (TypeError",
        ),
        (
            [run, "--features", "broken:Network"],
            "--features: 'broken:Network' cannot be loaded as module:attribute (Syntax",
        ),
        ([run, "--features", "lacking:Network"], "--features: 'lacking:Network' cannot be loaded"),
        ([run, "--part", "test"], "--part: must be"),
        ([run, "--reference", run], "--reference is for samples"),
        ([run, "--solver", "sscs,ssc"], "--solver: solver must be"),
        ([run, "--nfe", "3,x"], "--nfe must be numbers"),
    ]
    for arguments, words in cases:
        assert words in refused(capsys, "evaluate", *arguments), arguments


def test_samples_of_another_size_than_the_data_are_refused(run, tmp_path, capsys):
    for name, shape in (("wide", (8, 9)), ("coloured", (8, 8, 3))):
        file = tmp_path / f"{name}.npz"
        np.savez(file, images=np.zeros((20, *shape), np.uint8), levels=17)
        message = refused(capsys, "evaluate", file, "--reference", run)
        assert "must be of the size of those that they are compared with, 1×8×8" in message
    assert {file.name for file in tmp_path.iterdir()} == {"wide.npz", "coloured.npz"}


def test_evaluation_refuses_what_cannot_be_written_before_any_work(
    run, tmp_path, capsys, monkeypatch
):
    from cldsde.images.evaluate.evaluation import Evaluation

    monkeypatch.setattr(Evaluation, "of_run", lambda *_: pytest.fail("worked"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for out, words in (("file/x.json", "file cannot be made"), ("folder", "must name a file")):
        assert words in refused(capsys, "evaluate", run, "--out", tmp_path / out)
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((run / name).read_bytes())
    probe = tempfile.NamedTemporaryFile

    def read_only(*arguments, dir, **options):  # noqa: A002
        if dir == copy:
            raise PermissionError(errno.EACCES, "Permission denied")
        return probe(*arguments, dir=dir, **options)

    # Root may write where the mode of a folder forbids it.
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    message = refused(capsys, "evaluate", copy, "--out", tmp_path / "x.json")
    assert "run cannot be made or written (Permission denied)" in message
    assert sorted(file.name for file in copy.iterdir()) == ["config.json", "model.safetensors"]
    (copy / "classifier.safetensors").write_text("")
    with pytest.raises(pytest.fail.Exception, match="worked"):  # all that is needed is there
        main(["evaluate", str(copy), "--out", str(tmp_path / "x.json")])
