"""Checks that fail the build: public names without text, searches and pages without figures."""

import importlib
import inspect
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util import logging

from extensions.names import LAYERS


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


def setup(app):
    app.connect("env-check-consistency", _undocumented)
    app.connect("env-check-consistency", _searched)
    app.connect("build-finished", _pictured)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
