"""What the benchmarks measured, as JSON for the documentation and as a table in Markdown.

``python benchmarks/report.py RAW RESULTS TABLE`` reads what ``pytest --benchmark-json RAW`` wrote,
where it was measured. It fails where a target is missed, when all is written; and where RESULTS
have races or rivals that RAW has not, which it leaves alone.
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
    """The machine in a few words, and each race with its medians, ratios and targets."""
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
    """What was measured, in git's words."""
    info = raw["commit_info"]
    changed = " and what was changed since" if info.get("dirty") else ""
    return f"{info['id'][:12]}{changed}" if info.get("id") else "unknown"


def races(raw: dict[str, Any]) -> list[dict[str, Any]]:
    found = [entry["extra_info"] for entry in raw["benchmarks"]]
    return [race for race in found if "question" in race]


def rounded(race: dict[str, Any]) -> dict[str, Any]:
    """Six digits, of which three are shown: a verdict is of what was measured."""
    shown = {
        key: {name: float(f"{value:.6g}") for name, value in race[key].items()}
        for key in ("seconds", "ratios", "at_most")
    }
    return {**race, **shown}


def table(found: dict[str, Any]) -> str:
    """One row a rival: time, ratio of the first one's time to its, and the target."""
    machine = found["machine"]
    described = ("processor", "system", "python", "torch", "threads", "date")
    lines = [
        "; ".join(f"{what}: {machine[what]}" for what in described),
        "",
        ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        + f"; commit {found['commit']}",
        "",
        "| race | who | time | first / this | target |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for race in found["races"]:
        for place, (name, seconds) in enumerate(race["seconds"].items()):
            label = race["question"] if place == 0 else ""
            micro = 1e6 * seconds
            time = f"{micro:,.0f}" if micro >= 100 else f"{micro:.3g}"
            time += f" µs per {race['unit']}"
            ratio, target = race["ratios"].get(name), race["at_most"].get(name)
            goal = "" if target is None else verdict(ratio <= target, f"≤ {target:.3g}")
            if place == 0 and race["below"] is not None:
                goal = verdict(seconds <= race["below"], f"≤ {1e6 * race['below']:g} µs")
            shown = "" if ratio is None else f"{ratio:.3g}"
            lines.append(f"| {label} | {name} | {time} | {shown} | {goal} |")
    return "\n".join(lines) + "\n"


def lost(file: Path, found: dict[str, Any]) -> list[str]:
    """Races and rivals of a file of results that new ones do not have."""
    if not file.exists():
        return []
    new = {race["question"]: race["seconds"] for race in found["races"]}
    return [
        f"{race['question']}: {name}"
        for race in json.loads(file.read_text())["races"]
        for name in race["seconds"]
        if name not in new.get(race["question"], {})
    ]


def missed(race: dict[str, Any]) -> list[str]:
    """Targets that a race missed."""
    names = [name for name, limit in race["at_most"].items() if race["ratios"][name] > limit]
    first = next(iter(race["seconds"].values()))
    if race["below"] is not None and first > race["below"]:
        names.append(f"{1e6 * race['below']:g} µs")
    return [f"{race['question']}: {name}" for name in names]


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
        text = table(found)
        failures = [line for race in races(raw) for line in missed(race)]
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        sys.exit(f"{arguments.raw} is no file of pytest-benchmark of these races: {error!r}")
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
            f"{arguments.results} is left as it is, as {len(lacking)} of its rivals were not "
            f"measured, such as {lacking[0]}"
        )
    else:
        arguments.results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
