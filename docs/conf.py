"""Sphinx configuration. The package is read as installed: `tox -e docs` installs it first."""

import importlib.metadata
import os
import re
import sys

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
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_title = f"cldsde {release}"

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Code cells are run at every build, so the numbers on the pages are those of this version.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # with tables
nb_execution_timeout = 600  # seconds a cell; some train

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

# References into other projects become links where their inventories can be fetched, which a
# build asks for with this variable. Without it they stay plain text, and so need no network.
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
    ("py:.*", r"(.*\.)?_[^.]*"),  # private names in annotations
    ("py:class", r"cldsde\.score\.conversion\.WhitenedLaw|Block"),  # tables
]


def _public_reference(app, env, node, contnode):
    """Lead a reference to the module that defines a name to the layer that publishes it.

    ``cldsde.linear.processes.CLD``, as an annotation has it, and a bare ``CLD`` are both
    documented as ``cldsde.linear.CLD``.
    """
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    *path, name = target.split(".")
    objects = env.domaindata["py"]["objects"]
    if path[:1] == ["cldsde"]:
        # cldsde.linear.sde.LinearSDE.drift: the class is published, the method goes with it
        found = [
            candidate
            for cut in range(2, len(path) + 1)
            if (candidate := ".".join([*path[:2], *path[cut:], name])) in objects
        ]
    else:
        found = [full for full in objects if full.endswith(f".{target}")]
    if len(found) != 1:
        return None
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, node.get("reftype", "obj"), found[0], node, contnode
    )


def setup(app):
    """Register what this file adds to Sphinx."""
    app.connect("missing-reference", _public_reference)
