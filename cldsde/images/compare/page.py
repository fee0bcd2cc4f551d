"""HTML pages of reports: one self-contained file for light, dark and small screens."""

from __future__ import annotations

import base64
from typing import Any


def render_page(title: str, body: str, **values: Any) -> str:
    """Render an HTML page.

    Parameters
    ----------
    title
        Title and heading of the page.
    body
        Jinja2 template of the rest. Put a table into ``<div class="scroll">``, with numbers in
        ``<td class="number">`` and sentences in ``<td class="words">``.
    values
        Variables of the template; text is escaped.
    """
    from jinja2 import Environment  # imported here because it is seldom needed

    environment = Environment(autoescape=True)
    template = environment.from_string(_FRAME.replace("BODY", body))
    return template.render(title=title, **values)


def data_uri(content: bytes, kind: str) -> str:
    """Encode a file's content as the source of an image, of a kind such as ``"image/png"``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid #8884;
  vertical-align: top; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.words { min-width: 18rem; }
.PASS { color: #1a7f37; } .FAIL { color: #cf222e; font-weight: bold; }
.INCONCLUSIVE { color: #9a6700; }
@media (prefers-color-scheme: dark) {
  .PASS { color: #3fb950; } .FAIL { color: #ff7b72; } .INCONCLUSIVE { color: #d29922; }
}
img { max-width: 100%; background: white; border-radius: 4px; }
img.plot { width: 100%; min-width: 48rem; }
img.pixels { width: 100%; image-rendering: pixelated; }
figure { margin: 1rem 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
BODY
</body>
</html>
"""
