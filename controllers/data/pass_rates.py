"""PassRates: which prompts the policy passes neither always nor never, as recipes.evaluate measured
it."""

from __future__ import annotations

import json
from pathlib import Path

from controllers.data.files import SourceRow


class PassRates:
    """PassRates("out/pass_rates.jsonl", (0.1, 0.9)).keep(row)

    A row is known by its place (file and line), so that data.train is the data that was measured.
    """

    def __init__(self, path: str, bounds: tuple[float, float]) -> None:
        self.path, (self.lowest, self.highest) = path, bounds
        self.rates: dict[str, float] = {}
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(
                f"data.pass_rates is {path!r}, which does not exist; give the pass_rates.jsonl "
                "that recipes.evaluate leaves in its output_dir"
            )
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                self.rates[row["place"]] = float(row["pass_rate"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"data.pass_rates {path!r}, line {number}: not a line with place and pass_rate "
                    f"({type(error).__name__}: {error}); give what recipes.evaluate writes"
                ) from error

    def keep(self, row: SourceRow) -> bool:
        """Whether the row's rate is within the bounds, themselves included."""
        if row.place not in self.rates:
            known = next(iter(self.rates), "none")
            raise ValueError(
                f"{row.place}: data.pass_rates={self.path!r} has no pass rate of this row (its "
                f"first is of {known!r}); measure the same data with recipes.evaluate, named the "
                "same way"
            )
        return self.lowest <= self.rates[row.place] <= self.highest
