"""Pages with code cells: their cache, their share of each process, and a copy to download."""

import hashlib
import importlib
import re
import shutil
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from sphinx.util.parallel import make_chunks

from extensions.address import REPOSITORY

DOCS = Path(__file__).parents[1]


def version_of_content():
    """Digest of the package and of the measurements that the pages show."""
    layers = ("cldsde", "cldsde.solvers", "cldsde.validation")
    folders = [Path(importlib.import_module(layer).__file__).parent for layer in layers]
    folders += [DOCS / "data", DOCS / "how-to" / "bring-your-model"]
    files = {file for folder in folders for file in folder.rglob("*") if file.is_file()}
    digest = hashlib.sha256((DOCS / "matplotlibrc").read_bytes())
    for file in sorted(files):
        if file.suffix in (".py", ".json", ".jsonl", ".toml"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


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
    if REPOSITORY.startswith("https://github.com/"):
        # Colab installs nothing by itself, and opens notebooks of the branch that has this site.
        cells = nbformat.read(copy, as_version=4)
        install = f"%pip install 'cldsde[images] @ git+{REPOSITORY}'"
        cells.cells.insert(0, nbformat.v4.new_code_cell(install))
        nbformat.write(cells, copy)
        colab = REPOSITORY.replace("github.com", "colab.research.google.com/github", 1)
        links += f' or <a href="{colab}/blob/gh-pages/{path}">open it in Colab</a>'
    context["body"] += f'<p class="notebook-download">{links}</p>'


def setup(app):
    app.connect("builder-inited", _cached)
    app.connect("env-before-read-docs", _spread)
    app.connect("html-page-context", _offer_notebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
