"""The command ``cldsde``, and wrong arguments of all its commands."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cldsde
from cldsde.cli import main, validate
from cldsde.errors import SettingError
from command import rejected
from comparisons import feature_module, tiny
from published_data import CLD_SGM, SCORE_SDE, save_checkpoint

# Given besides, before the arguments of a row.
GIVEN = {"train": "--out out", "import": "cld_fourier.pth --out run", "validate": "--quick"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--version", f"cldsde {cldsde.__version__}"),
        ("--help", "demo"),
        ("validate --help", "no problem confirms"),
    ],
)
def test_help_and_version_are_printed(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 0
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save_checkpoint("cld_fourier", tmp_path_factory.mktemp("published"))


@pytest.fixture
def here(published, tmp_path, monkeypatch):
    """A current folder with files and folders that commands can take or must leave alone."""
    small = {"cld-sgm": CLD_SGM, "score-sde": SCORE_SDE}
    monkeypatch.setattr("cldsde.pretrained.published.PUBLISHED", small)
    monkeypatch.setattr(validate.ReportFiles, "save", lambda *_: pytest.fail("work was done"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(feature_module(tmp_path / "modules"))])
    monkeypatch.chdir(tmp_path)
    shutil.copy(published, tmp_path)
    (tmp_path / "full" / "report.txt").mkdir(parents=True)
    for name, text in (
        ("file", "text"),
        ("full/notes.txt", "mine"),
        ("tiny.json", json.dumps(tiny())),
        ("my_raising.py", "raise RuntimeError('no module\\ntoday')\n"),
    ):
        (tmp_path / name).write_text(text)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    np.save("floats.npy", np.zeros((20, 8, 8)))
    for name, shape in (("one", (1, 8, 8, 1)), ("wide", (20, 8, 9))):
        np.savez(f"{name}.npz", images=np.zeros(shape, np.uint8), levels=17)
    return tmp_path


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "required: COMMAND"),
        ("demo --qick", "unrecognized arguments: --qick"),
        ("demo --seed -1", "--seed: must be an integer from 0 to 2^63 - 1; got '-1'"),
        ("demo --device cuda:99", "--device: must be auto or cpu"),
        ("demo --out=", "--out"),
        ("train", "required: CONFIG (see cldsde train --help)"),
        ("train missing.toml", "missing.toml: cannot be read"),
        ("train CONFIG --set data.name=folder", "data.options.path: is missing"),
        ("train CONFIG --init-from nowhere", "--init-from: there is no folder nowhere"),
        ("train CONFIG --resume", "--resume: out holds no run to resume"),
        ("train CONFIG --set training.batch=32 --out RUN", "other settings (training.batch)"),
        ("sample mistyped", "there is no run of cldsde train in mistyped"),
        ("sample RUN --solver sscz", "'sscz'; did you mean sscs?"),
        ("sample RUN --nfe 1", "--nfe: must be"),
        ("sample RUN --solver probability-flow --nfe 9", "--nfe: probability-flow is adaptive;"),
        ("sample RUN --seeds 5-3", "--seeds: must be A-B"),
        ("sample RUN --seed 3-9", "--seed: must be an integer from 0 to 2^32 - 1; got '3-9'"),
        ("sample RUN --seeds 0-3 --seed 5", "--seed: --seeds is an alternative; got both"),
        ("sample RUN --set rtol", "--set: takes"),
        ("sample RUN --set order=3", "--set order: unknown key"),
        ("sample RUN --class 1", "--class: the network was not trained with classes"),
        ("sample RUN --known x.png", "--known: needs --known and --observe"),
        ("sample RUN --known x.png --observe grey", "cannot be decoded as an image: No such file"),
        ("sample RUN --prompt red", "--prompt: needs --model and a text-to-image folder"),
        ("sample RUN --nfe 5 --settings x.json", "--nfe: must be left out with --settings"),
        ("sample RUN --settings x.json", "--settings: x.json: No such file or directory"),
        ("sample RUN --denoise maybe", "--denoise: must be true or false; got 'maybe'"),
        ("sample RUN --t-start x", "--t-start: must be a number; got 'x'"),
        ("sample RUN --known black.png --observe black.png", "--observe: "),
        ("sample RUN --out x.gif", "--out: must be"),
        ("sample RUN --out .", "--out: must be FILE.npz"),
        ("sample RUN --process-set beta=3", "--process-set: needs --process"),
        ("sample RUN --process CLD --process-set beta", "--process-set: takes key=value, such as"),
        ("sample RUN --compile fast", "--compile: must be default, reduce-overhead (CUDA graphs)"),
        ("evaluate nowhere/power-0.1.safetensors", "there is no run and no file nowhere/power"),
        ("sample RUN --model MODEL", "a run or --model is needed"),
        ("sample --model MODEL --process CLD --process-set bet=3", "--process-set bet: unknown"),
        ("sample --model MODEL --t-start 1.0 --nfe 4", "trained on, 0.01"),
        ("sample --model MODEL --class 7", "--class"),
        ("evaluate wide.npz --reference RUN", "that they are compared with, 1×8×8"),
        ("evaluate floats.npy --reference RUN", "images of uint8"),
        ("evaluate RUN --metrics fid", "--weights"),
        ("evaluate RUN --data x", "--data: options.path: unknown key"),
        ("evaluate RUN --features nowhere:thing", "--features: 'nowhere:thing' cannot be loaded"),
        ("evaluate RUN --reference RUN", "--reference: is for samples"),
        ("evaluate one.npz --reference RUN --t-end 0.1", "--t-end: must be left out for samples"),
        ("evaluate RUN --nfe 3,x", "--nfe: must be integers with commas; got"),
        ("evaluate RUN --out file/x.json", "file cannot be made"),
        ("compare cld_variant", "did you mean cld_variants?"),
        ("compare tiny.json --quick", "--quick: is a comparison of its own"),
        ("sample RUN --seeds -1-3", "--seeds: must be A-B with 0 ≤ A ≤ B < 2³²; got '-1-3'"),
        ("compare tiny.json --out file", "file is not a folder"),
        ("tune RUN --nfe 3 --tries 10 --out new", "--tries: must be at least 54 for 3 evaluations"),
        ("tune RUN --nfe 3,5 --out new.json", "--out: must be a folder for several"),
        ("tune RUN --nfe 3 --features nowhere:net --out new", "--features: 'nowhere:net'"),
        ("tune RUN --nfe 1 --out new", "--nfe: must be at least 2; got 1"),
        ("export RUN modules --solver em", "FOLDER: must not be there yet, or be empty"),
        ("export RUN file/x", "file cannot be made or written"),
        ("export RUN new", "--solver: solver must evaluate the score only at the start"),
        ("export LABELLED new", "network.conditional: must be False for a pipeline"),
        ("import --as edm", "--as: must be cld-sgm or score-sde; got 'edm'"),
        ("import --as cld-sgm --config x", "--config: must be one of cld_fourier"),
        ("import --as cld-sgm --set data.flip=1", "data.flip: is determined by the checkpoint"),
        ("validate --solver my_raising:Mine", "RuntimeError: no module today"),
        (f"validate --out new --json new/{'x' * 256}", "name too long"),
        ("validate --json none/x.json", "--json: cannot be written: there is no folder none"),
        ("validate --out file", "--out: must be a folder, new or there already; file is a file"),
        ("validate --overwrite", "--overwrite: needs --out, the folder"),
        ("validate --out full", "report.txt is a folder"),
        ("validate --sampler own_solvers:exact", "--sampler: names a posterior sampler; add"),
    ],
    ids=lambda words: words[:60],
)
def test_wrong_arguments_are_rejected_before_any_work(
    capsys, here, digits_run, labelled_run, diffusers_model, command, words
):
    places = {"CONFIG": digits_run.with_name("tiny.toml"), "MODEL": diffusers_model}
    for name, place in {**places, "RUN": digits_run, "LABELLED": labelled_run}.items():
        command = command.replace(name, str(place))
    first, _, rest = command.partition(" ")
    before = {file: file.is_file() and file.read_bytes() for file in here.rglob("*")}
    message = rejected(capsys, *[first, *GIVEN.get(first, "").split(), *rest.split()][not first :])
    assert message.startswith("cldsde")
    assert words in message.partition(": error: ")[2]
    left = [file for file in here.rglob("*") if "__pycache__" not in str(file)]
    assert {file: file.is_file() and file.read_bytes() for file in left} == before


@pytest.mark.parametrize(
    ("given", "key", "shown"),
    [
        ("--process CLDD", "process.name", "--process"),
        ("--set order=7", "options.order", "--set order"),
        ("--set order=7", "options.snr", "options.snr"),  # of the run
        ("--solver em", "options", "options"),
    ],
)
def test_an_error_names_the_option_that_was_given(capsys, monkeypatch, given, key, shown):
    def prepare(_):
        raise SettingError(key, "is wrong; or set `overwrite`")

    monkeypatch.setattr("cldsde.cli.sample.prepare", prepare)
    error = rejected(capsys, "sample", "run", *given.split())
    assert error == f"cldsde sample: error: {shown}: is wrong; or set --overwrite\n"


def test_a_lack_of_memory_is_one_line(capsys, monkeypatch):
    hungry = lambda _: lambda: torch.empty(1 << 60, dtype=torch.uint8)  # noqa: E731
    monkeypatch.setattr("cldsde.cli.demo.prepare", hungry)
    assert main(["demo"]) == 1
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("cldsde demo: error: out of memory")


def test_the_module_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cldsde", "demo", "--seed", "x"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("cldsde", run_name="__main__")
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(
    ("program", "given", "sleeps"),
    [
        (["-m", "cldsde", "--version"], {}, True),
        (["SCRIPT", "--version"], {}, True),
        (["SCRIPT", "--version"], {"OMP_WAIT_POLICY": "ACTIVE"}, False),
        (["-c", "import cldsde"], {}, False),
    ],
)
def test_waiting_threads_sleep_in_the_command_alone(tmp_path, program, given, sleeps):
    (tmp_path / "cldsde").write_text("from cldsde.cli import main; main()")
    words = [x.replace("SCRIPT", str(tmp_path / "cldsde")) for x in program]
    kept = {k: x for k, x in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment = {**kept, **given, "OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ("GOMP_SPINCOUNT = '0'" in result.stderr) == sleeps
