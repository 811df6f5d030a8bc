"""Fills the tables and numbers of docs/mapping.md from the JSON of benchmarks.mapping.

    python -m benchmarks.mapping.tables mapping.json docs/mapping.md

Text between `<!-- name -->` and `<!-- end -->` is replaced; everything else stays as written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def tables(content: dict[str, Any]) -> dict[str, str]:
    """Name -> text."""

    def plain(text: str) -> str:
        return text.replace("|", "/")

    paper = [
        (row["finding"], plain(row["paper"]), plain(row["ours"]), "yes" if row["agrees"] else "no")
        for row in content["paper"]
    ]
    stages = sorted({row["max_pipeline"] for row in content["sensitivity"]})
    cases = list(dict.fromkeys((row["model"], row["devices"]) for row in content["sensitivity"]))
    found = {
        (
            row["model"],
            row["devices"],
            row["max_pipeline"],
        ): f"{plain(row['placement'])}: {row['step_s']:.0f} s"
        for row in content["sensitivity"]
    }
    sensitivity = [
        (f"{model} on {size}", *(_short(found[model, size, stage]) for stage in stages))
        for model, size in cases
    ]
    sizes = sorted({row["devices"] for row in content["throughput"]})
    speed = {
        (row["algorithm"], row["model"], row["devices"]): row["tokens_per_s"] for row in content["throughput"]
    }
    models = list(dict.fromkeys(row["model"] for row in content["throughput"]))
    throughput = [
        (
            ", ".join(names),
            model,
            *("-" if (found := speed[names[0], model, size]) is None else f"{found:,.0f}" for size in sizes),
        )
        for names in alike(content["throughput"])
        for model in models
    ]
    seconds = content["search_seconds"]
    return {
        "search": f"{seconds['128']:.1f} s for 128 devices and 4 models, {seconds['1024']:.0f} s for 1,024 devices and 5 models",
        "paper": markdown(("finding", "paper", "here", "same"), paper),
        "sensitivity": markdown(
            ("PPO", *(f"{stage} stage{'s' * (stage > 1)}" for stage in stages)), sensitivity
        ),
        "throughput": markdown(("tokens/s", "", *(str(size) for size in sizes)), throughput),
        "prediction": prediction(content["prediction"], content["placement_order_agrees"]),
    }


def prediction(rows: Sequence[dict[str, Any]], order: bool | None) -> str:
    """A line per configuration, predicted / measured seconds per phase; how far off the worst is, and whether
    placements rank rightly."""
    if not rows:
        return "not measured"
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    found = {(row["configuration"], row["phase"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["configuration"] for row in rows):
        cells = [found.get((name, phase)) for phase in phases]
        lines.append(
            (
                name,
                *(
                    "" if cell is None else f"{cell['predicted_s']:.3g} / {cell['measured_s']:.3g}"
                    for cell in cells
                ),
            )
        )
    off = sorted(
        ((abs(row["predicted_s"] / row["measured_s"] - 1), row) for row in rows), key=lambda pair: pair[0]
    )
    text = markdown(("predicted / measured s", *(phase.replace(".", ". ") for phase in phases)), lines)
    worst, row = off[-1]
    agreed = {True: "is the measured one", False: "is NOT the measured one", None: "was not measured"}[order]
    return (
        f"{text}\n\nMedian difference {off[len(off) // 2][0]:.0%}, largest {worst:.0%} ({row['phase']} of "
        f"{row['configuration']}); "
        f"{sum(difference <= 0.3 for difference, _ in off)} of {len(off)} are within 30 %. The predicted "
        f"order of placements {agreed}."
    )


def alike(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Algorithms in groups of equal throughput: their steps make the same calls."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        groups.setdefault(tuple(row["tokens_per_s"] for row in rows if row["algorithm"] == name), []).append(
            name
        )
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
                f"the page has {count} places for {name!r}; it needs one `<!-- {name} -->` ... `<!-- end -->`"
            )
    return text


def main() -> None:
    source, page = Path(sys.argv[1]), Path(sys.argv[2])
    page.write_text(fill(page.read_text(), tables(json.loads(source.read_text()))))


if __name__ == "__main__":
    main()
