"""Sphinx configuration. The package is read as installed: `tox -e docs` installs it first."""

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from extensions.address import REPOSITORY, linkcode_resolve  # noqa: E402, F401
from extensions.notebooks import version_of_content  # noqa: E402

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
    "extensions.address",
    "extensions.checks",
    "extensions.config_keys",
    "extensions.names",
    "extensions.notebooks",
]
exclude_patterns = ["_build", "jupyter_execute"]

default_role = "py:obj"  # `name` in a docstring leads to the name

html_theme = "furo"
html_title = f"cldsde {release}"
# Formulas need no network: MathJax is a file of the site. Its package has it as published.
_mathjax = Path(importlib.import_module("sphinx-mathjax-offline").__file__).parent / "static"
html_static_path = ["_static", str(_mathjax / "mathjax" / "tex-svg-full.js")]
html_css_files = ["site.css"]
mathjax_path = "tex-svg-full.js"
# Formulas of Markdown that a code cell returns keep their dollars.
myst_update_mathjax = False
mathjax3_config = {
    "tex": {"inlineMath": [["\\(", "\\)"], ["$", "$"]]},
    "options": {"processHtmlClass": "tex2jax_process|mathjax_process|math|cell_output"},
}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Results of code cells are kept until the page, the package or its measurements change.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "cells" / version_of_content())
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
        "cldsde.validation.calibration_ranks": ["cldsde.validation.posterior_error.Calibration"],
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

if REPOSITORY:
    html_theme_options = {
        "footer_icons": [{"name": "Repository", "url": REPOSITORY, "html": "⌂"}],
    }

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
    ("py:.*", r"PILImage|Path|Choice|Scale|Seeds"),  # as annotations write them
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
    ("py:obj", r"INCEPTION_FILE|RunConfig\.from_dict|Clock|kappa_(mean|std)"),
    ("py:obj", r"cldsde\.images\.(data|networks(\.NETWORKS)?|latent\.VAE|evaluate\..*)"),
    ("py:.*", r"(.*\.)?_[^.]*"),  # private names in annotations
    # Tables of coefficients.
    ("py:class", r"cldsde\.score\.(conversion\.WhitenedKernel|times\.Coefficients)|Block"),
    (
        "py:class",
        r"cldsde\.solvers\.(path_density\.PathDensity|noise\.CheckedNoise)",
    ),  # of the driver
    ("py:class", r"cldsde\.score\.times\.PlannedTime"),
    ("py:.*", r"diffusers\..*|save_pretrained|.*DDPMSchedulerOutput"),
]


def setup(app):
    # Pages of names that are no longer public would stay otherwise.
    shutil.rmtree(HERE / "reference" / "api", ignore_errors=True)
