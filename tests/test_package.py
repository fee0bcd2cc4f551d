"""The package as a whole: imports, README, CI."""

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean

import pytest

import cldsde
from cldsde.solvers import authoring

ROOT = Path(__file__).resolve().parents[1]
# Modules that every layer may import, and that import none.
SHARED = ("errors", "files", "messages", "progress", "tables")


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


def test_the_files_that_contributing_names_are_there():
    named = re.findall(r"^\d+\. `(\S+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


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
    for name in SHARED:
        text = (package / f"{name}.py").read_text()
        assert not re.search(r"^\s*(from|import) cldsde", text, re.MULTILINE)


@pytest.mark.parametrize(
    "module", [cldsde, cldsde.solvers, authoring], ids=["cldsde", "solvers", "authoring"]
)
def test_every_published_name_exists_and_has_a_docstring(module):
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for name in module.__all__:
        found = getattr(module, name)
        # A type alias has no docstring of its own.
        assert found.__doc__ or not (inspect.isclass(found) or inspect.isfunction(found)), name


def test_names_for_authors_of_solvers_are_apart_from_those_for_users():
    # Users pass a source of noise, and authors derive from it.
    assert set(cldsde.solvers.__all__) & set(authoring.__all__) == {"NoiseSource"}


FACTORIES = re.split(r"\s+", """
    arange empty eye full linspace logspace normal ones rand randint randn randperm range tensor
    tril_indices triu_indices zeros
""")  # fmt: skip


@pytest.mark.parametrize(
    "folder", ["cldsde/linear", "cldsde/score", "solvers", "validation", "cldsde/pretrained"]
)
def test_every_new_tensor_names_its_device(folder):
    """Without one it would be on torch's default device, and meet tensors on others."""
    found = []
    for file in (ROOT / folder).glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="torch"), attr=name), keywords=keywords
                ) if name in FACTORIES and "device" not in {word.arg for word in keywords}:
                    found.append(f"{file}:{node.lineno}: torch.{name}")
    assert not found


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


def test_ci_calls_the_readme_test_command():
    command = next(block for block in readme_blocks("bash") if block.rstrip().endswith("tox -p"))
    assert command.strip().splitlines()[-1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_compares_as_the_measurements_do():
    def measured(network):
        """Distances of `sample` under VP, and of the best scheduler, with five evaluations."""
        file = ROOT / f"docs/data/beside-diffusers-{network}.json"
        distances = {
            name: min(fmean(row["5"]["distances"]) for row in rows.values())
            for name, rows in json.loads(file.read_text())["samplers"].items()
        }
        theirs = min(x for name, x in distances.items() if not name.startswith("cldsde"))
        return distances["cldsde.sample, VP"], theirs

    text = " ".join((ROOT / "README.md").read_text().split())
    (own, theirs), large = measured("fashion"), measured("large")
    assert f"Fréchet distance of {own:.1f} with 5 evaluations" in text
    assert f"samplers of diffusers has {theirs:.1f}" in text
    assert (
        "has {:.1f} and the better of two samplers of diffusers has {:.1f}".format(*large) in text
    )


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
