"""The package as a whole: imports, README, CI."""

import ast
import doctest
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean

import pytest

import cldsde

ROOT = Path(__file__).resolve().parents[1]
# Modules that every layer may import, and that import none.
SHARED = ("errors", "files", "messages", "progress", "renamed", "tables")


def test_import_loads_no_plotting_library_no_integrator_no_compiler_and_no_image_layer():
    command = [sys.executable, "-I", "-c", "import cldsde, sys; print(*sys.modules)"]
    loaded = subprocess.check_output(command, text=True).split()
    unwanted = {"matplotlib", "sklearn", "torchvision", "diffusers", "cldsde.images"}
    unwanted |= {"torchdiffeq", "torchsde", "scipy.integrate", "torch._dynamo", "pydantic_core"}
    assert not unwanted & set(loaded)


def test_the_image_layer_without_its_extra_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cldsde.images")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    found = r"cldsde\.images needs pydantic; install it with pip install 'cldsde\[images\]'"
    with pytest.raises(ModuleNotFoundError, match=found):
        importlib.import_module("cldsde.images.data")


def test_layers_import_only_the_layers_below():
    layers = ["linear", "score", "solvers", "validation", "pretrained", "images", "cli"]
    package = Path(cldsde.__file__).parent
    for place, layer in enumerate(layers):
        allowed = {*layers[:place], layer, *SHARED}
        if layer == "pretrained":
            allowed -= {"validation"}  # the two are side by side
        folder = package / layer if (package / layer).exists() else ROOT / layer
        for file in folder.glob("**/*.py"):
            text = file.read_text()
            used = set(re.findall(r"^\s*from cldsde\.(\w+)", text, re.MULTILINE))
            named = re.findall(r"^\s*from cldsde import (.+)$", text, re.MULTILINE)
            used |= {name.strip() for line in named for name in line.split(",")} & set(layers)
            assert used <= allowed, f"{file} imports {used - allowed}"


NEW = "arange empty eye full linspace ones rand randint randn tensor zeros"
FACTORIES = {f"torch.{name}" for name in NEW.split()}


@pytest.mark.parametrize(
    "folder", ["cldsde/linear", "cldsde/score", "solvers", "validation", "cldsde/pretrained"]
)
def test_every_new_tensor_names_its_device(folder):
    """Without one it would be on torch's default device, and meet tensors on others."""
    for file in (ROOT / folder).glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
                named = {word.arg for word in node.keywords}
                assert "device" in named, f"{file}:{node.lineno}: {ast.unparse(node)}"


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_a_source_folder_without_its_solvers_says_so(tmp_path):
    """As when Python starts in a clone that was installed, but not as editable."""
    (tmp_path / "cldsde").mkdir()
    source = Path(cldsde.__file__).read_text(encoding="utf-8")
    (tmp_path / "cldsde" / "__init__.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-S", "-m", "cldsde"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert f"cldsde is imported from {tmp_path / 'cldsde'}, a part of its source" in result.stderr


def test_every_folder_of_the_package_is_installed():
    """setuptools does not look for packages: their folders are listed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = (ROOT / "cldsde").glob("**/__init__.py")
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    assert set(listed) == found | {"cldsde.solvers", "cldsde.validation"}


def test_the_readme_compares_as_the_measurements_do():
    """Fréchet distances of `sample` under VP, and of the best scheduler, with five evaluations."""
    measured = []
    for network in ("fashion", "large"):
        text = (ROOT / f"docs/data/beside-diffusers-{network}.json").read_text()
        distances = {
            name: min(fmean(row["5"]["distances"]) for row in rows.values())
            for name, rows in json.loads(text)["samplers"].items()
        }
        theirs = min(x for name, x in distances.items() if not name.startswith("cldsde"))
        measured += [distances["cldsde.sample, VP"], theirs]
    text = " ".join((ROOT / "README.md").read_text().split())
    pattern = "distance of {:.1f} with 5 .* has {:.1f}.* has {:.1f} and the better of .* has {:.1f}"
    assert re.search(pattern.format(*measured), text)


@pytest.mark.parametrize("code", readme_blocks("python"))
def test_readme_examples_print_what_they_say(code, capsys):
    promised = re.findall(r"^# prints (.*)$", code, re.MULTILINE)
    assert promised
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip().splitlines() == promised


def test_readme_session_prints_what_it_shows():
    (session,) = readme_blocks("pycon")
    test = doctest.DocTestParser().get_doctest(session, {}, "README", "README.md", 0)
    assert doctest.DocTestRunner().run(test).failed == 0
