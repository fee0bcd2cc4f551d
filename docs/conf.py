"""Sphinx configuration. The package is read as installed: `tox -e docs` installs it first."""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import sys
import typing
from pathlib import Path

from numpydoc.docscrape import NumpyDocString
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent

# The kernels of the pages inherit these. Another backend than their own would leave figures off
# the pages; more threads than one per kernel make small tensors slower, and builds slower by far.
os.environ.pop("MPLBACKEND", None)
os.environ["MATPLOTLIBRC"] = str(HERE / "matplotlibrc")
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "cldsde"
author = "The cldsde developers"
copyright = "The cldsde developers"
release = version = importlib.metadata.version("cldsde")

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_title = f"cldsde {release}"
# Formulas need no network: MathJax is a file of the site. Its package has it as published.
_mathjax = Path(importlib.import_module("sphinx-mathjax-offline").__file__).parent / "static"
html_static_path = ["_static", str(_mathjax / "mathjax" / "tex-svg.js")]
html_css_files = ["site.css"]
mathjax_path = "tex-svg.js"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3


def _version_of_content():
    """Digest of the package and of the measurements that the pages show."""
    layers = ("cldsde", "cldsde.solvers", "cldsde.validation")
    folders = [Path(importlib.import_module(layer).__file__).parent for layer in layers]
    folders += [HERE / "data", HERE / "how-to" / "bring-your-model"]
    files = {file for folder in folders for file in folder.rglob("*") if file.is_file()}
    digest = hashlib.sha256((HERE / "matplotlibrc").read_bytes())
    for file in sorted(files):
        if file.suffix in (".py", ".json", ".toml"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# Results of code cells are kept until the page, the package or its measurements change.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "cells" / _version_of_content())
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # with tables
nb_execution_timeout = 600  # seconds per cell; some cells train a network

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
numpydoc_show_class_members = False

# Names link to their source. CLDSDE_DOCS_SOURCE is the address of the published source, such as
# https://example.org/cldsde/blob/v0.2.0; without it the site has pages of the source of its own.
_source = os.environ.get("CLDSDE_DOCS_SOURCE", "").rstrip("/")
extensions.append("sphinx.ext.linkcode" if _source else "sphinx.ext.viewcode")
if _source:
    html_theme_options = {
        "footer_icons": [{"name": "Repository", "url": _source.partition("/blob/")[0], "html": "⌂"}]
    }


def linkcode_resolve(domain, info):
    """Address of the lines that define a name."""
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


# With this variable, references into other projects become links. Their inventories come from
# the network; without the variable such references stay plain text.
if os.environ.get("CLDSDE_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "scipy": ("https://docs.scipy.org/doc/scipy", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

# Every reference into cldsde has to resolve; those into other packages need not.
_foreign = [
    *sys.stdlib_module_names,
    *("PIL", "matplotlib", "numpy", "scipy", "sklearn", "torch", "tqdm"),
]
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(map(re.escape, _foreign))})(\..*)?"),
    ("py:.*", r"Tensor|Generator|(dict|list|tuple)\[.*"),  # as docstrings write them
    ("py:.*", r"PILImage|Path|Recipe"),  # as annotations write them
    # Inside the image layer, whose reference has its verbs alone
    ("py:class", r"(cldsde\.images\.\w+\..*)?(ImageModel|ArrayImages|Images|FeatureStatistics)"),
    ("py:.*", r"(.*\.)?_[^.]*"),  # private names in annotations
    ("py:class", r"cldsde\.score\.(conversion\.WhitenedLaw|times\.Coefficients)|Block"),  # tables
    ("py:class", r"cldsde\.solvers\.path_density\.PathDensity"),  # of the driver
]


LAYERS = (
    "cldsde.linear",
    "cldsde.score",
    "cldsde.solvers",
    "cldsde.validation",
    "cldsde.pretrained",
)


def _public_reference(app, env, node, contnode):
    """Resolve a reference to a name in the layer that publishes it.

    ``cldsde.linear.processes.CLD``, as an annotation has it, and a bare ``CLD`` are both
    documented as ``cldsde.linear.CLD``.
    """
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    *path, name = target.split(".")
    objects = env.domaindata["py"]["objects"]
    if path == ["cldsde"]:
        found = [full for layer in LAYERS if (full := f"{layer}.{name}") in objects]
    elif path[:1] == ["cldsde"]:
        # cldsde.linear.sde.LinearSDE.drift: the class is published, the method goes with it
        found = [
            candidate
            for layer in (path[:2], ["cldsde", "solvers", "authoring"])
            for cut in range(2, len(path) + 1)
            if (candidate := ".".join([*layer, *path[cut:], name])) in objects
        ]
    else:
        found = [full for full in objects if full.endswith(f".{target}")]
    if len(found) != 1:
        return None
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, node.get("reftype", "obj"), found[0], node, contnode
    )


class PublicNames(SphinxDirective):
    """A table of the names that a module publishes, with the first line of each."""

    required_arguments = 1

    def run(self):
        module = self.arguments[0]
        public = importlib.import_module(module)
        # Of names for types autosummary takes the signature of what they stand for, and fails.
        names = [n for n in public.__all__ if typing.get_origin(getattr(public, n)) is None]
        names.sort(key=str.lower)
        table = "\n".join(["", *(f"   {name}" for name in names)])
        text = f".. currentmodule:: {module}\n\n.. autosummary::\n{table}\n"
        return self.parse_text_to_nodes(text)


class ConfigKeys(SphinxDirective):
    """A table of the keys of a section of configurations: name, default and meaning."""

    required_arguments = 1

    def run(self):
        path = self.arguments[0]
        module, name = path.rsplit(".", 1)
        section = getattr(importlib.import_module(module), name)
        kind = name.removesuffix("Config")
        text = NumpyDocString(inspect.getdoc(section))
        fields = {field.name: field for field in dataclasses.fields(section)}
        lines = [f".. py:class:: {name}", f"   :module: {module}", "   :no-typesetting:", ""]
        lines += [*text["Summary"], ""]
        lines += [*text["Extended Summary"], ""]
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: 20 18 62", ""]
        lines += ["   * - key", "     - default", "     - meaning"]
        for row in text["Attributes"]:
            keys = row.name.split(", ")
            if kind == "Run" and "data" in keys:  # each section has a table of its own
                continue
            lines.append(f"   * - {', '.join(f'``{key}``' for key in keys)}")
            lines.append(f"     - {', '.join(_default(fields[key]) for key in keys)}")
            lines += ["     - " + row.desc[0], *(f"       {line}" for line in row.desc[1:])]
        title = "Top level" if kind == "Run" else kind
        heading = [title, "-" * len(title), ""]
        return self.parse_text_to_nodes("\n".join(heading + lines), allow_section_headings=True)


def _default(field):
    """The default of a key as TOML writes it."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        if dataclasses.is_dataclass(value) or not value:
            return "its own defaults"
    elif field.default is dataclasses.MISSING:
        return "*required*"
    else:
        value = field.default
    return "none" if value is None else f"``{json.dumps(value)}``"


def _undocumented(app, env):
    """Warn, which fails the build, of public names without a page or without a docstring."""
    logger = logging.getLogger(__name__)
    objects = env.domaindata["py"]["objects"]
    for layer in ("cldsde", *LAYERS, "cldsde.solvers.authoring", "cldsde.images"):
        module = importlib.import_module(layer)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                continue
            homes = LAYERS if layer == "cldsde" else (layer, layer.rpartition(".")[0])
            if not any(x.startswith(homes) and x.endswith(f".{name}") for x in objects):
                logger.warning("%s.%s is public and on no page", layer, name)
            if not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            members = vars(thing).items() if inspect.isclass(thing) else ()
            for member, value in [("", thing), *members]:
                if member.startswith("_") or not (
                    member == "" or isinstance(value, property) or inspect.isroutine(value)
                ):
                    continue
                if not inspect.getdoc(getattr(thing, member, thing)):
                    logger.warning("%s.%s.%s has no docstring", layer, name, member)


def _offer_notebook(app, pagename, templatename, context, doctree):
    """Let readers download a page with code cells as a notebook."""
    notebook = Path(app.outdir).parent / "jupyter_execute" / f"{pagename}.ipynb"
    if doctree is None or not notebook.is_file():
        return
    copy = (
        Path(app.outdir)
        / "_downloads"
        / "notebooks"
        / notebook.relative_to(notebook.parents[pagename.count("/")])
    )
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(notebook, copy)
    address = "../" * pagename.count("/") + copy.relative_to(app.outdir).as_posix()
    context["body"] += (
        f'<p class="notebook-download"><a download href="{address}">'
        "Download this page as a Jupyter notebook</a></p>"
    )


def _pictured(app, error):
    """Fail if a page that draws figures shows none."""
    if error is not None or app.builder.name != "html" or app.config.nb_execution_mode == "off":
        return
    for name in app.env.found_docs:
        page = Path(app.builder.get_outfilename(name))
        draws = "plt.show()" in Path(app.env.doc2path(name)).read_text(encoding="utf-8")
        if draws and "_images/" not in page.read_text(encoding="utf-8"):
            msg = f"{name} draws figures and shows none"
            raise ExtensionError(msg)


def _skip(app, what, name, obj, skip, options):
    """Leave out fields of named tuples, whose docstrings only give their number."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else skip


def _sourceless(app):
    """Take modules without a page of their source, such as builtins, off the list of pages."""
    modules = app.env._viewcode_modules
    app.env._viewcode_modules = {name: entry for name, entry in modules.items() if entry}
    return []


def setup(app):
    """Register what this file adds to Sphinx."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("html-page-context", _offer_notebook)
    if not _source:
        app.connect("html-collect-pages", _sourceless, priority=100)
    app.connect("missing-reference", _public_reference)
    app.connect("env-check-consistency", _undocumented)
    app.connect("build-finished", _pictured)
    app.add_directive("public-names", PublicNames)
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
