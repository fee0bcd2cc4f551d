"""The directive ``config-keys``: a table of the keys of a section of configurations."""

import dataclasses
import importlib
import inspect
import json

from numpydoc.docscrape import NumpyDocString
from sphinx.util.docutils import SphinxDirective


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
        if dataclasses.is_dataclass(value):
            return "the section's defaults"
    elif field.default is dataclasses.MISSING:
        return "*required*"
    else:
        value = field.default
    return "none" if value is None else f"``{json.dumps(value)}``"


def setup(app):
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
