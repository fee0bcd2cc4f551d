"""Draw the moving picture of the landing page: ``python docs/hero.py docs/_static/hero.svg``.

Samples of one data dimension on their way from noise to two modes under CLD: the data over time,
the velocity over time, and both in the phase plane. The picture is an animated SVG without a
background, in colours that are readable on light and dark pages.
"""

import argparse
from pathlib import Path

import torch

from cldsde import CLD, GaussianMixture, ReverseProcess, solvers

PATHS, STEPS, SHOWN = 24, 800, 100
WIDTH, HEIGHT, TOP, GAP = 300, 220, 40, 30
GREY, COLOURS = "#7f858d", ("#e69f00", "#3d9bdb")
SECONDS = 8


def paths() -> tuple[torch.Tensor, torch.Tensor]:
    """Progress from 0 (noise) to 1 (data), and the states (time, path, component)."""
    sde = CLD()
    modes = GaussianMixture([1.0, 1.0], [[-1.0], [1.0]], [[[0.02]], [[0.02]]])
    generator = torch.Generator().manual_seed(5)
    times = solvers.root_times(sde.T, 1e-3, STEPS)
    found = solvers.solve(
        ReverseProcess(sde, modes.score(sde)),
        solvers.EulerMaruyama(),
        sde.prior.sample((PATHS, 1), generator=generator),
        times,
        generator=generator,
        t_eval=times,
    )
    every = torch.linspace(0, STEPS, SHOWN + 1).round().long()
    return torch.linspace(0, 1, SHOWN + 1), found.y[every, :, :, 0]


def scaled(values: torch.Tensor, bound: float, low: float, high: float) -> list[str]:
    """Values from -bound to bound as coordinates from low to high."""
    share = (values / bound).clamp(-1, 1) * 0.5 + 0.5
    return [f"{low + (high - low) * s:.1f}" for s in share.tolist()]


def animated(name: str, values: list[str]) -> str:
    """An animation that runs through the values, and then rests at the last for a third."""
    held = values + [values[-1]] * (len(values) // 2)
    listed = ";".join(held)
    return (
        f'<animate attributeName="{name}" values="{listed}" dur="{SECONDS}s" '
        'repeatCount="indefinite"/>'
    )


def panel(left, title, below, horizontal, vertical, ends, *, traced=True) -> str:
    """One panel: a frame, a moving dot for each path, and the path as a faint line."""
    frame = f'x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" rx="4"'
    centred = f'x="{left + WIDTH / 2}" text-anchor="middle"'
    parts = [
        f'<rect {frame} fill="none" stroke="{GREY}" stroke-opacity=".5"/>',
        f'<text {centred} y="{TOP - 10}">{title}</text>',
        f'<text {centred} y="{TOP + HEIGHT + 30}">{below}</text>',
    ]
    for x, y, end in zip(horizontal, vertical, ends, strict=True) if traced else ():
        colour = COLOURS[int(end > 0)]
        line = " ".join(f"{a},{b}" for a, b in zip(x, y, strict=True))
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity=".35"/>'
        )
    for x, y, end in zip(horizontal, vertical, ends, strict=True):
        colour = COLOURS[int(end > 0)]
        parts.append(
            f'<circle cx="{x[-1]}" cy="{y[-1]}" r="4" fill="{colour}">'
            f"{animated('cx', x)}{animated('cy', y)}</circle>"
        )
    return "\n".join(parts)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    progress, states = paths()
    ends = states[-1, :, 0].tolist()
    lefts = [4 + i * (WIDTH + GAP) for i in range(3)]

    def across(left: float, values: torch.Tensor, bound: float) -> list:
        return [scaled(row, bound, left + 6, left + WIDTH - 6) for row in values]

    def up(values: torch.Tensor, bound: float) -> list:
        return [scaled(row, bound, TOP + HEIGHT - 6, TOP + 6) for row in values]

    x, v = states[:, :, 0].T, states[:, :, 1].T
    time = [across(left, (2 * progress - 1).expand(PATHS, -1), 1.0) for left in lefts[:2]]
    x_bound, v_bound = (1.1 * values.abs().quantile(0.995).item() for values in (x, v))
    arrow = "noise → data"
    body = "\n".join(
        (
            panel(lefts[0], "data x", arrow, time[0], up(x, x_bound), ends),
            panel(lefts[1], "velocity v", arrow, time[1], up(v, v_bound), ends),
            panel(
                lefts[2],
                "both",
                "→ x, ↑ v",
                across(lefts[2], x, x_bound),
                up(v, v_bound),
                ends,
                traced=False,
            ),
        )
    )
    width, height = lefts[2] + WIDTH + 4, TOP + HEIGHT + 40
    arguments.picture.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif" font-size="26" fill="{GREY}">\n'
        "<title>Samples of critically-damped Langevin diffusion move from noise to two modes: "
        "the data follow smooth curves, the velocities jitter.</title>\n"
        f"{body}\n</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
