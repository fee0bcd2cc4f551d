"""The numbers of the tutorial "Learn the diffusion together with the score".

``python benchmarks/learn_a_diffusion.py docs/data/learn-a-diffusion.json`` runs the programs of the
page, and keeps the bounds of its three processes, and what became of their means.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "learn-a-diffusion.md"


def programs(page: Path) -> list[str]:
    """Code of a page that readers see, whether the page runs it or not."""
    blocks = re.findall(
        r"^```(?:\{code-cell\} )?python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )
    return [block for block in blocks if not block.startswith((":tags:", "---"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    scope: dict[str, Any] = {}
    for program in programs(PAGE):
        exec(program, scope)
    shares = {}
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for name, model in scope["models"].items():
        with torch.no_grad():
            mean, velocity = model.sde.marginal(t).mean[..., 0].T, model.sde.prior.root[1, 1]
        shares[name] = [
            [round(x, 4) for x in row.tolist()] for row in (mean[0], mean[1] / velocity)
        ]
    found = {
        "truth": round(float(scope["truth"]), 4),
        "bounds": {
            name: [[round(x, 4) for x in pair] for pair in row]
            for name, row in scope["bounds"].items()
        },
        "shares": shares,
    }
    results.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
