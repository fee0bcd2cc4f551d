"""The repository's address, filled in wherever pages need it once pyproject.toml has it.

Without it the site has pages of the source of its own.
"""

import importlib
import importlib.metadata
import inspect
import tomllib
from pathlib import Path

_file = Path(__file__).parents[2] / "pyproject.toml"
_project = tomllib.loads(_file.read_text(encoding="utf-8"))["project"]
REPOSITORY = _project.get("urls", {}).get("Repository", "").rstrip("/")
_source = f"{REPOSITORY}/blob/v{importlib.metadata.version('cldsde')}"


def _with_address(app, docname, source):
    """Fill in the repository's address, or leave out the lines that need it."""
    lines = source[0].split("\n")
    if not REPOSITORY:
        lines = [line for line in lines if "@REPOSITORY@" not in line]
    source[0] = "\n".join(lines).replace("@REPOSITORY@", REPOSITORY)


def linkcode_resolve(domain, info):
    """Address of the lines that define a name."""
    if not info["module"]:  # data that a page declares
        return None
    thing = importlib.import_module(info["module"])
    try:
        for name in info["fullname"].split("."):
            thing = getattr(thing, name)
        thing = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)
        lines, first = inspect.getsourcelines(thing)
        file = Path(inspect.getsourcefile(thing))
    except (AttributeError, TypeError, OSError):  # data, and what dataclasses write
        return None
    package = Path(importlib.import_module("cldsde").__file__).parent
    if not file.is_relative_to(package):
        return None
    inside = file.relative_to(package)
    folder = "" if inside.parts[0] in ("solvers", "validation") else "cldsde/"
    return f"{_source}/{folder}{inside.as_posix()}#L{first}-L{first + len(lines) - 1}"


def _sourceless(app):
    """Take modules without a page of their source, such as builtins, off the list of pages."""
    modules = app.env._viewcode_modules
    app.env._viewcode_modules = {name: entry for name, entry in modules.items() if entry}
    return []


_trees = {}


def _share_tree(app, pagename, templatename, context, doctree):
    """Make the tree of pages once for all pages of source that are equally deep in folders."""
    if pagename.startswith("_modules/"):
        make, depth = context["toctree"], pagename.count("/")

        def tree(**options):
            if depth not in _trees:
                _trees[depth] = make(**options)
            return _trees[depth]

        context["toctree"] = tree


def setup(app):
    app.setup_extension("sphinx.ext.linkcode" if REPOSITORY else "sphinx.ext.viewcode")
    app.connect("source-read", _with_address)
    app.connect("html-page-context", _share_tree, priority=400)  # before the theme reads it
    if not REPOSITORY:
        app.connect("html-collect-pages", _sourceless, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
