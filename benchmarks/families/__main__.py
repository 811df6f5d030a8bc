"""Families of models that transformers and vLLM know, each tiny and odd in shape, through GRPO with
a reference and PPO with a critic, in every kind of layout.

python -m benchmarks.families --json FILE [--only NAME ...] [--cases CASE ...] [--page docs/models.md]
python -m benchmarks.families --json FILE --page docs/models.md --page-only

A row is {family, case, ok, log_prob_gap, message, seconds}: ok where training engine and
generation engine agree on every sampled token to 1e-5 in float32 over two steps of both
algorithms, or where the run is refused by one line within ten seconds, before anything starts. Rows
of earlier runs in FILE stay, so that the whole table can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.families.case import CASES, Devices
from benchmarks.families.models import FAMILIES
from benchmarks.families.page import make_page


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [family.name for family in FAMILIES]
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--page", type=Path, help="write docs/models.md here")
    parser.add_argument(
        "--page-only", action="store_true", help="run nothing: the page of the file"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    rows = read_rows(arguments.json)
    for case in () if arguments.page_only else arguments.cases:
        with tempfile.TemporaryDirectory() as folder, Devices(case, Path(folder)) as devices:
            for family in FAMILIES:
                if family.name not in arguments.only:
                    continue
                row = asdict(devices.measure(family))
                rows[family.name, case] = row
                show(row)
                if arguments.json is not None:
                    arguments.json.write_text(json.dumps(list(rows.values()), indent=1))
    if arguments.page is not None:
        arguments.page.write_text(make_page(rows))
    failed = [row for row in rows.values() if not row["ok"]]
    print(f"{len(rows)} rows, {len(failed)} failed")
    if failed:
        raise SystemExit(1)


def read_rows(path: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    """(family, case) -> the row of an earlier run."""
    if path is None or not path.exists():
        return {}
    return {(row["family"], row["case"]): row for row in json.loads(path.read_text())}


def show(row: dict[str, Any]) -> None:
    gap = "" if row["log_prob_gap"] is None else f"{row['log_prob_gap']:.1e}"
    state = "ok" if row["ok"] else "FAILED"
    print(
        f"{row['family']:<32} {row['case']:<28} {state:<7} {gap:>8} {row['seconds']:>6.1f} s  "
        f"{row['message'][:400]}",
        flush=True,
    )


if __name__ == "__main__":
    main()
