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
import tomllib
import typing
from pathlib import Path

import nbformat
from docutils import nodes
from jupyter_cache import get_cache
from numpydoc.docscrape import NumpyDocString
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.parallel import make_chunks

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

default_role = "py:obj"  # `name` in a docstring leads to the name

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
nb_output_stderr = "remove"  # progress bars, and warnings about the building machine
nb_render_markdown_format = "gfm"  # with tables
nb_execution_timeout = 600  # seconds per cell; some cells train a network

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

templates_path = ["_templates"]
autosummary_generate = True  # one page for each public name, in reference/api
autosummary_filename_map = {"cldsde.solvers.Plan": "cldsde.solvers.Plan-class"}  # beside plan
# Classes that users meet as arguments or results only: described with the function or class that
# takes or returns them.
autosummary_context = {
    "related": {
        "cldsde.pretrained.from_diffusers": [
            "cldsde.pretrained.diffusers_models.DiffusersDenoiser"
        ],
        "cldsde.pretrained.load_cld_sgm": ["cldsde.pretrained.published_score.PublishedScore"],
        "cldsde.pretrained.PublishedModel": ["cldsde.pretrained.published_score.Parameterisation"],
        "cldsde.score.DenoiserScore": ["cldsde.score.denoisers.Denoiser"],
        "cldsde.score.GaussianMixture": ["cldsde.score.mixture.MixtureScore"],
        "cldsde.score.MixedScore": ["cldsde.score.network_score.NetworkScore"],
        "cldsde.score.PosteriorScore": ["cldsde.score.posterior_score.Guided"],
        "cldsde.score.flow_log_prob": ["cldsde.score.flow_density.FlowDensity"],
        "cldsde.score.log_likelihood": ["cldsde.score.likelihood.Likelihood"],
        "cldsde.solvers.sample_posterior": ["cldsde.solvers.twisted.PosteriorSamples"],
        "cldsde.validation.OrderEstimate": [
            "cldsde.validation.order_estimate.Verdict",
            "cldsde.validation.order_estimate.Level",
        ],
        "cldsde.validation.WorkPrecision": ["cldsde.validation.work_precision.WorkPrecisionPoint"],
        "cldsde.validation.calibration_ranks": ["cldsde.validation.calibration.Calibration"],
        "cldsde.validation.posterior_error": ["cldsde.validation.posterior_error.PosteriorError"],
        "cldsde.validation.posterior_methods": [
            "cldsde.validation.posterior_methods.PosteriorMethod"
        ],
        "cldsde.validation.posterior_problems": [
            "cldsde.validation.posterior_problems.PosteriorProblem"
        ],
    }
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # `root_times`, not <function root_times at 0x…>
python_maximum_signature_line_length = 88
numpydoc_show_class_members = False

# The repository's address, once pyproject.toml has it, is filled in wherever pages need it. Without
# it the site has pages of the source of its own.
_project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_repository = _project.get("urls", {}).get("Repository", "").rstrip("/")
_source = f"{_repository}/blob/v{release}"
extensions.append("sphinx.ext.linkcode" if _repository else "sphinx.ext.viewcode")
if _repository:
    html_theme_options = {
        "footer_icons": [{"name": "Repository", "url": _repository, "html": "⌂"}],
    }


def _with_address(app, docname, source):
    """Fill in the repository's address, or leave out the lines that need it."""
    lines = source[0].split("\n")
    if not _repository:
        lines = [line for line in lines if "@REPOSITORY@" not in line]
    source[0] = "\n".join(lines).replace("@REPOSITORY@", _repository)


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
    ("py:.*", r"PILImage|Path|Recipe|Scale"),  # as annotations write them
    # Types inside the layers, whose reference has the public names alone
    (
        "py:class",
        r"(cldsde\.images\.\w+\..*)?(ImageModel|TrainedModel|ImageSpace|ArrayImages|Images|VAE)",
    ),
    ("py:class", r"(cldsde\.images\.\w+\..*)?(DiffusionModel|FeatureStatistics)"),
    ("py:class", r"cldsde\.\w+\.\w+\.(Dynamics|FlowCase|PathCase|KnownTimes|NCSNpp)"),
    (
        "py:obj",
        r"UNet2DModel|from_pretrained|FolderImages|Feature(Statistics|Network)|load_features",
    ),
    ("py:obj", r"INCEPTION_FILE|RunConfig\.from_dict|Clock|log_snr_(mean|std)"),
    ("py:obj", r"cldsde\.images\.(data|networks(\.NETWORKS)?|latent\.VAE|evaluate\..*)"),
    ("py:.*", r"(.*\.)?_[^.]*"),  # private names in annotations
    # Tables of coefficients.
    ("py:class", r"cldsde\.score\.(conversion\.WhitenedKernel|times\.Coefficients)|Block"),
    (
        "py:class",
        r"cldsde\.solvers\.(path_density\.PathDensity|noise\.CheckedNoise)",
    ),  # of the driver
    ("py:class", r"cldsde\.score\.times\.PlannedTime"),
    ("py:.*", r"diffusers\..*|save_pretrained|.*\.PipelineSchedulerOutput"),
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
    # Every class also has an entry for the module that defines it.
    objects = {x for x, entry in env.domaindata["py"]["objects"].items() if not entry.aliased}
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
        # `solve` is the function, not the method of that name of a class
        fewest = min((full.count(".") for full in found), default=0)
        found = [full for full in found if full.count(".") == fewest]
    if len(found) != 1:
        return None
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, node.get("reftype", "obj"), found[0], node, contnode
    )


class ConfigKeys(SphinxDirective):
    """A table of the keys of a section of configurations: name, default and meaning."""

    required_arguments = 1

    def run(self):
        path = self.arguments[0]
        module, name = path.rsplit(".", 1)
        section = getattr(importlib.import_module(module), name)
        kind = name.removesuffix("Config")
        text = NumpyDocString(inspect.getdoc(section))
        lines = [f".. py:class:: {name}", f"   :module: {module}", "   :no-typesetting:", ""]
        lines += [*text["Summary"], ""]
        lines += [*text["Extended Summary"], ""]
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: 20 18 62", ""]
        lines += ["   * - key", "     - default", "     - meaning"]
        fields = []
        for field in dataclasses.fields(section):
            fields.append(field)
            own = [getattr(base, "__pydantic_fields__", {}) for base in section.__mro__]
            texts = (one[field.name].description for one in own if field.name in one)
            meaning = next(filter(None, texts), None)  # pydantic keeps none of a base class
            if meaning is None:  # the text below is about this key, too
                continue
            if not (kind == "Run" and field.name == "sampling"):  # they have own tables
                lines.append(f"   * - {', '.join(f'``{one.name}``' for one in fields)}")
                lines.append(f"     - {', '.join(map(_default, fields))}")
                lines.append(f"     - {' '.join(meaning.split())}")
            fields = []
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


# Words that people search for, and the page that must be the first result. Entries of the index
# with an exclamation mark come before all other results.
SEARCHES = {
    "scheduler": "how-to/sample-in-a-pipeline",
    "stable diffusion": "how-to/sample-in-a-pipeline",
    "comfyui": "how-to/sample-in-comfyui",
    "few steps": "how-to/tune-a-sampler",
    "tune": "how-to/tune-a-sampler",
    "inpainting": "how-to/inpaint",
    "noise schedule": "how-to/declare-a-process",
    "pretrained": "how-to/bring-your-model",
    "edm": "how-to/bring-your-model",
    "convergence order": "tutorials/validate-a-solver",
}


def _searched(app, env):
    """Warn, which fails the build, of searches that another page or none answers."""
    found = {}
    for page, entries in env.domaindata["index"]["entries"].items():
        for _, words, _, importance, _ in entries:
            if importance == "main":
                found.setdefault(words.lower(), set()).add(page)
    for words, page in SEARCHES.items():
        if found.get(words) != {page}:
            message = "a search for '%s' should lead to %s, not to %s"
            logging.getLogger(__name__).warning(message, words, page, found.get(words))


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
    path = copy.relative_to(app.outdir).as_posix()
    here = "../" * pagename.count("/") + path
    links = f'<a download href="{here}">Download this page as a Jupyter notebook</a>'
    if _repository.startswith("https://github.com/"):
        # Colab installs nothing by itself, and opens notebooks of the branch that has this site.
        cells = nbformat.read(copy, as_version=4)
        install = f"%pip install 'cldsde[images] @ git+{_repository}'"
        cells.cells.insert(0, nbformat.v4.new_code_cell(install))
        nbformat.write(cells, copy)
        colab = _repository.replace("github.com", "colab.research.google.com/github", 1)
        links += f' or <a href="{colab}/blob/gh-pages/{path}">open it in Colab</a>'
    context["body"] += f'<p class="notebook-download">{links}</p>'


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
    """Leave out what a page of a class need not repeat.

    These are fields of named tuples, of which Python says their number only, and methods that
    implement a protocol: the class that declares the protocol describes them once.
    """
    if str(getattr(obj, "__doc__", "")).startswith("Alias for field number"):
        return True
    function = inspect.unwrap(getattr(obj, "fget", None) or getattr(obj, "__func__", obj))
    path = getattr(function, "__qualname__", "").split(".")
    owner = getattr(sys.modules.get(getattr(function, "__module__", "")), path[0], None)
    if len(path) != 2 or not inspect.isclass(owner):
        return skip
    protocols = [base for base in owner.__mro__[1:] if base.__module__.startswith("cldsde.")]
    return True if any(path[1] in vars(base) for base in protocols) else skip


def _readable(app, domain, kind, content):
    """Write constants in signatures as their formulas."""
    formulas = {"_CRITICAL_COUPLING": "2√2", "_CRITICAL_FRICTION": "3√3"}
    for text in list(content.parent[0].findall(nodes.Text)):
        if text in formulas:
            text.parent.replace(text, nodes.Text(formulas[text]))


def _sourceless(app):
    """Take modules without a page of their source, such as builtins, off the list of pages."""
    modules = app.env._viewcode_modules
    app.env._viewcode_modules = {name: entry for name, entry in modules.items() if entry}
    return []


def _plain_types(app, obj, bound_method):
    """Show the types of checked arguments without the ranges that `pydantic` checks."""
    function = inspect.unwrap(obj)
    if function is not obj:
        function.__annotations__ = obj.__annotations__ = typing.get_type_hints(function)


def _cached(app):
    """Make the database of the cells' results before several processes do so at once."""
    if app.config.nb_execution_mode == "cache":
        get_cache(app.config.nb_execution_cache_path).list_cache_records()


def _spread(app, env, docnames):
    """Give each process pages whose cells take about equally long.

    Sphinx hands out the pages in pieces of their order, which has most pages with cells together.
    """
    pieces = [[] for _ in make_chunks(docnames, app.parallel)]
    size = len(make_chunks(docnames, app.parallel)[0]) if pieces else 0
    code = {name: _lines_of_code(Path(env.doc2path(name))) for name in docnames}
    for i, name in enumerate(sorted(docnames, key=lambda name: -code[name])):
        pieces[i % len(pieces)].append(name)
    # The last piece may be smaller than the others, which take its last pages.
    ordered = [name for piece in pieces for name in piece[:size]]
    docnames[:] = ordered + [name for piece in pieces for name in piece[size:]]


def _lines_of_code(page):
    cells = re.findall(
        r"^```\{code-cell\}.*?^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return sum(cell.count("\n") for cell in cells)


def setup(app):
    """Register what this file adds to Sphinx."""
    # Pages of names that are no longer public would stay otherwise.
    shutil.rmtree(HERE / "reference" / "api", ignore_errors=True)
    app.connect("builder-inited", _cached)
    app.connect("env-before-read-docs", _spread)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-before-process-signature", _plain_types)
    app.connect("object-description-transform", _readable)
    app.connect("html-page-context", _offer_notebook)
    app.connect("html-page-context", _share_tree, priority=400)  # before the theme reads it
    app.connect("source-read", _with_address)
    if not _repository:
        app.connect("html-collect-pages", _sourceless, priority=100)
    app.connect("missing-reference", _public_reference)
    app.connect("env-check-consistency", _undocumented)
    app.connect("env-check-consistency", _searched)
    app.connect("build-finished", _pictured)
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
