"""Results of the benchmarks, as JSON for the documentation and as a table in Markdown.

``python benchmarks/report.py RAW RESULTS TABLE`` reads what ``pytest --benchmark-json RAW`` wrote.
It exits with 1 if a target is missed, after it has written both files. If RESULTS has races or
rivals that RAW lacks, it leaves RESULTS as it is and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RIVALS = ("scipy", "torchsde", "torchdiffeq", "diffusers", "diffrax", "torchode")


def versions() -> dict[str, str]:
    found = {}
    for name in ("cldsde", *RIVALS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def results(raw: dict[str, Any]) -> dict[str, Any]:
    """The machine, and each race with its medians, ratios and targets."""
    machine, cpu = raw["machine_info"], raw["machine_info"]["cpu"]
    return {
        "machine": {
            "processor": cpu.get("brand_raw", machine["machine"]),
            "system": f"{machine['system']} {machine['machine']}",
            "threads": machine["threads"],
            "python": machine["python"],
            "torch": machine["torch"],
            "date": raw["datetime"][:10],
        },
        "commit": commit(raw),
        "versions": versions(),
        "races": [rounded(race) for race in races(raw)],
    }


def commit(raw: dict[str, Any]) -> str:
    """The measured commit, and whether files differed from it."""
    info = raw["commit_info"]
    changed = " with changes" if info.get("dirty") else ""
    return f"{info['id'][:12]}{changed}" if info.get("id") else "unknown"


def races(raw: dict[str, Any]) -> list[dict[str, Any]]:
    found = [entry["extra_info"] for entry in raw["benchmarks"]]
    return [race for race in found if "question" in race]


def rounded(race: dict[str, Any]) -> dict[str, Any]:
    """Round to six digits; three are shown, so that a rounded number meets the same targets."""
    shown = {
        key: {name: float(f"{value:.6g}") for name, value in race[key].items()}
        for key in ("seconds", "ratios", "at_most", "below")
    }
    return {**race, **shown}


def table(found: dict[str, Any], topic: str | None = None) -> str:
    """One row for each rival: time, ratio of the first rival's time to its time, target."""
    lines = [
        "| comparison | program | time | first / this | target |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for race in found["races"]:
        if topic not in (None, race["topic"]):
            continue
        label = race["question"]
        for name, seconds in race["seconds"].items():
            ratio = f"{race['ratios'][name]:.3g}" if name in race["ratios"] else ""
            goals = [
                verdict(value <= limit, f"≤ {shown}") for value, limit, shown in targets(race, name)
            ]
            row = (label, name, f"{duration(seconds)} per {race['unit']}", ratio, ", ".join(goals))
            lines.append(f"| {' | '.join(row)} |")
            label = ""
    return "\n".join(lines) + "\n"


def grid(found: dict[str, Any], topic: str, condition: str) -> str:
    """One row for each rival and one column for each race of a topic under a condition.

    Questions read "column, condition, threads". Times over their limit are bold.
    """
    races = {}
    for race in found["races"]:
        column, *conditions = race["question"].split(", ")
        if race["topic"] == topic and condition in conditions:
            races[column] = race
    names = dict.fromkeys(name for race in races.values() for name in race["seconds"])
    lines = [f"| | {' | '.join(races)} |", f"| --- |{' ---: |' * len(races)}"]
    for name in names:
        cells = []
        for race in races.values():
            seconds = race["seconds"].get(name)
            text = "" if seconds is None else duration(seconds)
            cells.append(f"**{text}**" if seconds and seconds > race["below"][name] else text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine(found: dict[str, Any]) -> str:
    """Where and with which versions the races were run."""
    described = ("processor", "system", "python", "torch", "threads", "date")
    facts = [f"{name}: {found['machine'][name]}" for name in described]
    versions = [f"{name} {version}" for name, version in found["versions"].items()]
    return "; ".join([*facts, *versions, f"commit {found['commit']}"])


def duration(seconds: float) -> str:
    """Format with at least three digits and a suitable unit."""
    unit, size = next((u for u in (("s", 1), ("ms", 1e-3)) if seconds >= u[1]), ("µs", 1e-6))
    value = seconds / size
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def lost(file: Path, found: dict[str, Any]) -> list[str]:
    """Races and rivals of a file of results that the new results lack."""
    if not file.exists():
        return []
    new = {race["question"]: race["seconds"] for race in found["races"]}
    return [
        f"{race['question']}: {name}"
        for race in json.loads(file.read_text())["races"]
        for name in race["seconds"]
        if name not in new.get(race["question"], {})
    ]


def targets(race: dict[str, Any], name: str) -> list[tuple[float, float, str]]:
    """Value, limit and the limit in words, for each target of a rival."""
    found = []
    if name in race["at_most"]:
        limit = race["at_most"][name]
        found.append((race["ratios"][name], limit, f"{limit:.3g}"))
    if name in race["below"]:
        limit = race["below"][name]
        found.append((race["seconds"][name], limit, duration(limit)))
    return found


def missed(race: dict[str, Any]) -> list[str]:
    """Targets that a race missed."""
    return [
        f"{race['question']}: {name}"
        for name in race["seconds"]
        if any(value > limit for value, limit, _ in targets(race, name))
    ]


def verdict(holds: bool, target: str) -> str:
    return f"{target}, holds" if holds else f"{target}, **missed**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="what pytest-benchmark wrote")
    parser.add_argument("results", type=Path, help="JSON to write")
    parser.add_argument("table", type=Path, help="Markdown to write")
    arguments = parser.parse_args()
    try:
        raw = json.loads(arguments.raw.read_text())
        found = results(raw)
        text = f"{machine(found)}\n\n{table(found)}"
        failures = [line for race in races(raw) for line in missed(race)]
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        sys.exit(f"{arguments.raw} holds no results of these races: {error!r}")
    if not found["races"]:
        sys.exit(f"{arguments.raw} has no race")
    try:
        lacking = lost(arguments.results, found)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        sys.exit(f"{arguments.results} is no file of results: {error!r}; name another")
    arguments.table.write_text(text)
    print(text)
    complaints = [f"missed: {'; '.join(failures)}"] if failures else []
    if lacking:
        complaints.append(
            f"{arguments.results} is unchanged, because {len(lacking)} of its rivals were not "
            f"measured, such as {lacking[0]}"
        )
    else:
        arguments.results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
