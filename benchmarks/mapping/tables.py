"""Fills the tables and numbers of docs/mapping.md from the JSON of benchmarks.mapping.

    python -m benchmarks.mapping.tables mapping.json docs/mapping.md

Text between `<!-- name -->` and `<!-- end -->` is replaced; everything else stays as written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    for row in rows:
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def tables(content: dict[str, Any]) -> dict[str, str]:
    """Name -> text, for every place in the page."""
    paper = []
    for row in content["paper"]:
        same = ("no", "yes")[row["agrees"]]
        paper.append((row["finding"], plain(row["paper"]), plain(row["ours"]), same))
    seconds = content["search_seconds"]
    small = f"{seconds['128']:.1f} s for 128 devices and 4 models"
    return {
        "search": f"{small}, {seconds['1024']:.0f} s for 1,024 devices and 5 models",
        "paper": markdown(("finding", "paper", "here", "same"), paper),
        "sensitivity": sensitivity(content["sensitivity"]),
        "throughput": throughput(content["throughput"]),
        "prediction": prediction(content["prediction"], content["placement_order_agrees"]),
    }


def plain(text: str) -> str:
    """The text without the character that ends a cell."""
    return text.replace("|", "/")


def sensitivity(rows: Sequence[dict[str, Any]]) -> str:
    """A line per model and size, a column per longest pipeline."""
    stages = sorted({row["max_pipeline"] for row in rows})
    lines: dict[tuple[str, int], list[str]] = {}
    for row in sorted(rows, key=lambda row: int(row["max_pipeline"])):
        name = f"{row['model']} on {row['devices']}"
        cells = lines.setdefault((row["model"], row["devices"]), [name])
        cells.append(_short(f"{plain(row['placement'])}: {row['step_s']:.0f} s"))
    headers = [f"{stage} stage{'s' * (stage > 1)}" for stage in stages]
    return markdown(("PPO", *headers), list(lines.values()))


def throughput(rows: Sequence[dict[str, Any]]) -> str:
    """A line per algorithm and model, a column per number of devices."""
    sizes = sorted({row["devices"] for row in rows})
    speed = {(row["algorithm"], row["model"], row["devices"]): row["tokens_per_s"] for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for names, model in product(alike(rows), models):
        cells = [", ".join(names), model]
        for size in sizes:
            tokens = speed[names[0], model, size]
            cells.append("-" if tokens is None else f"{tokens:,.0f}")
        lines.append(cells)
    return markdown(("tokens/s", "", *map(str, sizes)), lines)


def prediction(rows: Sequence[dict[str, Any]], order: bool | None) -> str:
    """A line per configuration, predicted / measured seconds per phase; how far off the worst
    is, and whether placements rank rightly."""
    if not rows:
        return "not measured"
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        cells = lines.setdefault(row["configuration"], [row["configuration"], *[""] * len(phases)])
        cells[1 + phases.index(row["phase"])] = (
            f"{row['predicted_s']:.3g} / {row['measured_s']:.3g}"
        )
    off = [(abs(row["predicted_s"] / row["measured_s"] - 1), row) for row in rows]
    off.sort(key=lambda pair: pair[0])
    text = markdown(
        ("predicted / measured s", *(phase.replace(".", ". ") for phase in phases)),
        list(lines.values()),
    )
    worst, row = off[-1]
    agreed = {
        True: "is the measured one",
        False: "is NOT the measured one",
        None: "was not measured",
    }[order]
    return (
        f"{text}\n\nMedian difference {off[len(off) // 2][0]:.0%}, largest {worst:.0%} "
        f"({row['phase']} of "
        f"{row['configuration']}); "
        f"{sum(difference <= 0.3 for difference, _ in off)} of {len(off)} are within 30 %. The "
        "predicted "
        f"order of placements {agreed}."
    )


def alike(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Algorithms in groups of equal throughput: their steps make the same calls."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        tokens = tuple(row["tokens_per_s"] for row in rows if row["algorithm"] == name)
        groups.setdefault(tokens, []).append(name)
    return list(groups.values())


def _short(text: str) -> str:
    return text.replace("actor+critic+reference+reward", "all").replace("reference", "ref")


def fill(text: str, content: dict[str, str]) -> str:
    for name, value in content.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n?).*?(\n?<!-- end -->)",
            lambda match, value=value: match[1] + value + match[2],
            text,
            flags=re.S,
        )  # type: ignore[misc]
        if count != 1:
            raise ValueError(
                f"the page has {count} places for {name!r}; it needs one `<!-- {name} -->` ... "
                "`<!-- end -->`"
            )
    return text


def main() -> None:
    source, page = Path(sys.argv[1]), Path(sys.argv[2])
    page.write_text(fill(page.read_text(), tables(json.loads(source.read_text()))))


if __name__ == "__main__":
    main()
