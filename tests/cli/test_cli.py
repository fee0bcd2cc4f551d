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
        ("demo --help", "--quick"),
        ("demo --help", "--seed"),
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
        ("my_typo.py", "class Mine(:\n"),
        ("my_raising.py", "raise RuntimeError('no module\\ntoday')\n"),
        ("my_leaving.py", "raise SystemExit('bye')\n"),
    ):
        (tmp_path / name).write_text(text)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    np.save("floats.npy", np.zeros((20, 8, 8)))
    for name, shape in (("one", (1, 8, 8, 1)), ("wide", (20, 8, 9)), ("colour", (20, 8, 8, 3))):
        np.savez(f"{name}.npz", images=np.zeros(shape, np.uint8), levels=17)
    return tmp_path


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "required: COMMAND"),
        ("dmo", "dmo"),
        ("demo --qick", "unrecognized arguments: --qick"),
        ("demo --seed one", "--seed: must be an integer from 0 to 2^63 - 1; got 'one'"),
        ("demo --seed -1", "seed"),
        ("demo --seed 9223372036854775808", "--seed"),
        *((f"demo --device {x}", "--device: must be auto or cpu") for x in ("gpu", "meta")),
        ("demo --device cuda:99", "--device: must be auto or cpu"),
        ("demo --out=", "--out"),
        ("demo --out file/run", "file/run"),
        *(
            pytest.param(f"demo --out {x}", x, marks=pytest.mark.slow)
            for x in ("file", "/proc/run")
        ),
        ("train", "required: CONFIG (see cldsde train --help)"),
        ("train missing.toml", "missing.toml: cannot be read"),
        ("train CONFIG --set training.btch=3", "training.btch: unknown key; did you mean batch?"),
        ("train CONFIG --set training.precision=fp8", "training.precision: must be 'fp32'"),
        ("train CONFIG --set sampling.solver=ssc", "sampling.solver: solver must be"),
        ("train CONFIG --set sampling.nfe=1000000000000", "sampling.nfe: must be less than"),
        ("train CONFIG --set network.options.channels=[9]", "network.options: groups must divide"),
        ("train CONFIG --set data.name=folder", "data.options.path: is missing"),
        ("train CONFIG --init-from nowhere", "--init-from: there is no folder nowhere"),
        ("train CONFIG --resume", "--resume: out holds no run to resume"),
        ("train CONFIG --set training.batch=32 --out RUN", "other settings (training.batch)"),
        ("train CONFIG --seed -1", "--seed: must be"),
        ("train CONFIG --device gpu", "--device: must be"),
        ("sample mistyped", "is no run of cldsde train"),
        ("sample full", "holds no config.json"),
        ("sample RUN --solver sscz", "'sscz'; did you mean sscs?"),
        ("sample RUN --solver recomended", "'recomended'; did you mean recommended?"),
        ("sample RUN --nfe 1", "--nfe: must be"),
        ("sample RUN --solver probability-flow --nfe 9", "--nfe: probability-flow is adaptive;"),
        ("sample RUN --solver probability-flow --grid root", "--grid: probability-flow is adapt"),
        *((f"sample RUN --seeds {x}", "--seeds: must be A-B") for x in ("5-3", "x")),
        ("sample RUN --seed 3-9", "--seed: must be an integer from 0 to 2^32 - 1; got '3-9'"),
        ("sample RUN --seeds 0-3 --seed 5", "--seed: --seeds is an alternative; got both"),
        ("sample RUN --grid cubic", "--grid: must be 'uniform'"),
        ("sample RUN --t-end 0", "--t-end: must be"),
        ("sample RUN --set rtol", "--set: takes"),
        ("sample RUN --set order=3", "--set order: unknown key"),
        ("sample RUN --class 1", "--class: the network was not trained with classes"),
        ("sample RUN --known x.png", "--known: needs --known and --observe"),
        ("sample RUN --known x.png --observe grey", "cannot be decoded as an image: No such file"),
        ("sample RUN --known x.png --observe dwn:2", "--observe: must be a picture, 'grey', 'down"),
        ("sample RUN --settings x.json", "--settings: x.json: No such file or directory"),
        ("sample RUN --precision fp8", "--precision: must be 'fp32', 'bf16' or 'fp16'; got 'fp8'"),
        ("sample RUN --denoise maybe", "--denoise: must be true or false; got 'maybe'"),
        ("sample RUN --t-start x", "--t-start: must be a number; got 'x'"),
        ("sample RUN --known black.png --observe black.png", "--observe: "),
        ("sample RUN --out x.gif", "--out: must be"),
        ("sample RUN --out .", "--out: must be FILE.npz"),
        ("sample RUN --process-set beta=3", "--process-set: needs --process"),
        (
            "sample RUN --process CLD --process-set beta",
            "--process-set: takes key=value, such as beta=8.0; got",
        ),
        (
            "sample RUN --compile fast",
            "--compile: must be default, reduce-overhead (CUDA graphs) or max-auto",
        ),
        ("evaluate nowhere/power-0.1.safetensors", "there is no run and no file nowhere/power"),
        *((f"sample {x}", "a run or --model is needed") for x in ("", "RUN --model MODEL")),
        ("sample --model MODEL --process CLDD", "--process: must be one of CLD"),
        ("sample --model MODEL --process CLD --process-set bet=3", "--process-set bet: unknown"),
        ("sample --model nowhere", "nowhere is no folder"),
        ("sample --model MODEL --t-start 2", "--t-start"),
        ("sample --model MODEL --t-start 1.0 --nfe 4", "trained on, 0.01"),
        ("sample --model MODEL --class 7", "--class"),
        ("evaluate one.npz --reference RUN", "fd needs at least 2 images; got 1"),
        ("evaluate wide.npz --reference RUN", "that they are compared with, 1×8×8"),
        ("evaluate colour.npz --reference RUN", "compared with, 1×8×8"),
        ("evaluate floats.npy --reference RUN", "images of uint8"),
        ("evaluate nothing", "there is no run"),
        ("evaluate RUN --metrics fdd", "--metrics: must be one of"),
        ("evaluate RUN --metrics fid", "--weights"),
        ("evaluate RUN --metrics fid --weights w.pth", "w.pth"),
        ("evaluate RUN --data x", "--data: options.path: unknown key"),
        ("evaluate RUN --samples 1", "--samples: must be greater than or equal to 2"),
        ("evaluate RUN --features nowhere:thing", "--features: 'nowhere:thing' cannot be loaded"),
        ("evaluate RUN --features torch:flatten", "fails for images (2, 1, 8, 8) (ValueError"),
        ("evaluate RUN --part test", "--part: must be"),
        ("evaluate RUN --reference RUN", "--reference: is for samples"),
        ("evaluate one.npz --reference RUN --t-end 0.1", "--t-end: must be left out for samples"),
        ("evaluate RUN --solver sscs,ssc", "--solver: solver must be"),
        ("evaluate RUN --nfe 3,x", "--nfe: must be integers with commas; got"),
        ("evaluate RUN --out file/x.json", "file cannot be made"),
        ("evaluate RUN --out full", "--out: must name a file"),
        ("compare missing.toml", "missing.toml: cannot be read"),
        ("compare cld_variant", "did you mean cld_variants?"),
        ("compare tiny.json --quick", "--quick: is a comparison of its own"),
        ("compare tiny.json --set sample=3", "sample: unknown key; did you mean samples?"),
        ("compare tiny.json --seed -1", "seed: must be"),
        ("compare tiny.json --set rows=[{model='VP',solver='sscs',nfe=[4,1]}]", "rows[0].nfe: mu"),
        ("compare tiny.json --set features=nowhere:thing", "nowhere"),
        ("sample RUN --seeds -1-3", "--seeds: must be A-B with 0 ≤ A ≤ B < 2³²; got '-1-3'"),
        (
            "compare tiny.json --set metrics=['fid']",
            "weights: the file of Inception weights is needed for fid",
        ),
        ("compare tiny.json --device gpu", "--device: must be"),
        ("compare tiny.json --out file", "file is not a folder"),
        ("compare tiny.json --out=", "--out: must be the name of a file or folder"),
        ("import --as edm", "--as: must be cld-sgm or score-sde; got 'edm'"),
        ("import --as cld-sgm --config x", "--config: must be one of cld_fourier"),
        ("import --as cld-sgm --set sampling.nfe=0", "sampling.nfe"),
        *(
            (f"import --as cld-sgm --set {key}=1", f"{key}: is determined by the checkpoint")
            for key in ("score.mixed", "process.name", "data", "data.flip", "samplings.nfe")
        ),
        ("import --as cld-sgm --out full", "holds files that are no run"),
        ("validate --solver sscss", "solver must be"),
        ("validate --solver my_typo:Mine", "'my_typo:Mine' cannot be loaded"),
        ("validate --solver my_raising:Mine", "RuntimeError: no module today"),
        ("validate --solver my_leaving:Mine", "SystemExit: bye"),
        ("validate --problem CLDD", "--problem: must be one of 'VP'"),
        ("validate --seed -1", "--seed: must be an integer from 0 to 2^63 - 1; got '-1'"),
        ("validate --json=", "--json"),
        (f"validate --json {'x' * 256}", "name too long"),
        ("validate --json full", "full is a folder"),
        ("validate --json none/x.json", "--json: cannot be written: there is no folder none"),
        ("validate --json /proc/report.json", "/proc"),
        (f"validate --out new --json new/{'x' * 256}", "name too long"),
        ("validate --out=", "--out"),
        ("validate --out file", "--out: must be a folder, new or there already; file is a file"),
        ("validate --overwrite", "--overwrite: needs --out, the folder"),
        ("validate --out full", "report.txt is a folder"),
        ("validate --out /proc/page", "/proc"),
        ("validate --quik", "unrecognized arguments: --quik"),
        ("validate --sampler own_solvers:exact", "--sampler: names a posterior sampler; add"),
        ("validate --posterior --solver em", "--solver: does not go with --posterior"),
        ("validate --posterior --problem CLD", "--problem: must be one of 'two modes'"),
        ("validate --posterior --sampler own_solvers:none", "cannot be loaded"),
    ],
    ids=lambda words: words[:60],
)
def test_wrong_arguments_are_rejected_before_any_work(
    capsys, here, digits_run, diffusers_model, command, words
):
    places = {"CONFIG": digits_run.with_name("tiny.toml"), "MODEL": diffusers_model}
    for name, place in {**places, "RUN": digits_run}.items():
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
        ("--process-set bet=3", "process.options.bet", "--process-set bet"),
        ("--set order=7", "options", "--set"),
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
