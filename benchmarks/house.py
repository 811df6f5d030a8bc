"""Measures how the code reads: long lines, comprehensions, conditional expressions, dense
statements, names.

    python -m benchmarks.house                            # the five packages
    python -m benchmarks.house workers/engines --worst 20 # a folder or file, and its worst places
    python -m benchmarks.house --json figures.json

Blank lines are not counted. Docstrings, imports and annotated fields are not counted as statements.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("hybridflow", "workers", "controllers", "cluster", "recipes")
"""The packages that are measured where no path is given, as folders of the repository."""

DIALECT = frozenset(
    {
        "asked",
        "beside",
        "drawn",
        "everyone",
        "found",
        "given",
        "held",
        "homeless",
        "kept",
        "made",
        "mine",
        "one",
        "ones",
        "ours",
        "own",
        "owned",
        "room",
        "rooms",
        "taken",
        "theirs",
        "told",
        "wanted",
    }
)
"""Names of variables and parameters that say nothing about their values."""

PLACES = {
    "over_100": "lines over 100 columns",
    "over_110": "lines over 110 columns",
    "comprehensions": "comprehensions",
    "nested": "comprehensions that are nested or have several fors",
    "over_two_fors": "comprehensions with more than two fors",
    "conditionals": "conditional expressions",
    "conditionals_inside": "conditional expressions inside a comprehension",
    "dialect": "names of the dialect",
    "of_docstrings": "docstrings that begin with Of",
    "what_docstrings": "docstrings that begin with What",
}
"""What is counted place by place: the key in the JSON file and its words."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
USER_GUIDE = Path("docs/python.md")
OWN_LOOP = "generate_sequences"
"""The first code block of the user guide that contains this is the example of a custom loop."""


@dataclass(frozen=True, order=True)
class Place:
    """A line that was counted. Higher `weight` is worse; `text` says what was seen there."""

    weight: int
    path: str
    line: int
    text: str


@dataclass(kw_only=True)
class Figures:
    """The counts of some files; `places` holds the lines behind each count, under the keys of
    PLACES."""

    lines: int = 0
    nodes: int = 0
    statements: int = 0
    bindings: int = 0
    places: dict[str, list[Place]] = field(default_factory=lambda: {key: [] for key in PLACES})

    def count(self, key: str) -> int:
        return len(self.places[key])

    def percent(self, key: str) -> float:
        """The share of lines, in percent."""
        return 100 * self.count(key) / max(1, self.lines)

    def per_thousand(self, key: str) -> float:
        """The number per 1,000 lines; for names of the dialect, per 1,000 bindings."""
        total = self.bindings if key == "dialect" else self.lines
        return 1000 * self.count(key) / max(1, total)

    def nodes_per_statement(self) -> float:
        return self.nodes / max(1, self.statements)

    def summary(self) -> dict[str, float]:
        """The figures of the table, as plain numbers."""
        return {
            "lines": self.lines,
            "lines_over_100_percent": self.percent("over_100"),
            "lines_over_110_percent": self.percent("over_110"),
            "comprehensions_per_1000_lines": self.per_thousand("comprehensions"),
            "nested_comprehensions_per_1000_lines": self.per_thousand("nested"),
            "comprehensions_over_two_fors": self.count("over_two_fors"),
            "conditional_expressions_per_1000_lines": self.per_thousand("conditionals"),
            "conditional_expressions_inside_comprehensions": self.count("conditionals_inside"),
            "ast_nodes_per_statement": self.nodes_per_statement(),
            "dialect_names_per_1000_bindings": self.per_thousand("dialect"),
            "docstrings_that_begin_with_of": self.count("of_docstrings"),
            "docstrings_that_begin_with_what": self.count("what_docstrings"),
        }


class Reader(ast.NodeVisitor):
    """Adds one file's syntax tree to the figures: Reader(figures,
    "workers/actor.py").visit(tree)."""

    def __init__(self, figures: Figures, path: str) -> None:
        self.figures = figures
        self.path = path
        self.depth = 0
        """How many comprehensions are open around the node."""

    def add(
        self, key: str, node: ast.expr | ast.stmt | ast.arg, text: str, weight: int = 0
    ) -> None:
        self.figures.places[key].append(Place(weight, self.path, node.lineno, text))

    def generic_visit(self, node: ast.AST) -> None:
        self.figures.nodes += 1
        if isinstance(node, ast.stmt):
            self.read_statement(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self.read_binding(node.id, node)
        elif isinstance(node, ast.arg):
            self.read_binding(node.arg, node)
        elif isinstance(node, ast.IfExp):
            self.read_conditional(node)
        if isinstance(node, COMPREHENSIONS):
            self.read_comprehension(node)
            self.depth += 1
            super().generic_visit(node)
            self.depth -= 1
        else:
            super().generic_visit(node)

    def read_statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.AnnAssign):
            return
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            self.figures.statements += 1
        elif isinstance(node.value.value, str):
            start = node.value.value.strip()[:60]
            for word, key in (("Of ", "of_docstrings"), ("What ", "what_docstrings")):
                if start.startswith(word):
                    self.add(key, node, start)

    def read_binding(self, name: str, node: ast.Name | ast.arg) -> None:
        self.figures.bindings += 1
        if name in DIALECT:
            self.add("dialect", node, name)

    def read_conditional(self, node: ast.IfExp) -> None:
        text = short(node)
        self.add("conditionals", node, text, weight=len(text))
        if self.depth:
            self.add("conditionals_inside", node, text, weight=len(text))

    def read_comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    ) -> None:
        fors = sum(isinstance(inner, ast.comprehension) for inner in ast.walk(node))
        text = short(node)
        self.add("comprehensions", node, text, weight=fors)
        if self.depth or len(node.generators) > 1:
            self.add("nested", node, text, weight=fors)
        if fors > 2 and not self.depth:
            self.add("over_two_fors", node, text, weight=fors)


def short(node: ast.expr) -> str:
    """The source of an expression on one line of at most 100 characters."""
    text = ast.unparse(node)
    return text if len(text) <= 100 else text[:97] + "..."


def python_files(paths: list[Path]) -> Iterator[Path]:
    """Every Python file of the paths. Raises ValueError for a path that does not exist."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"path={path} does not exist; run from the repository's root")
        if path.is_dir():
            yield from sorted(path.rglob("*.py"))
        else:
            yield path


def measure(paths: list[Path]) -> Figures:
    """The figures of all Python files below the paths."""
    figures = Figures()
    for path in python_files(paths):
        source = path.read_text()
        for number, line in enumerate(source.splitlines(), start=1):
            figures.lines += bool(line.strip())
            for key, limit in (("over_100", 100), ("over_110", 110)):
                if len(line) > limit:
                    figures.places[key].append(
                        Place(len(line), str(path), number, line.strip()[:60])
                    )
        Reader(figures, str(path)).visit(ast.parse(source))
    return figures


def names_to_import(guide: Path = USER_GUIDE) -> int | None:
    """The number of names that the user guide's own loop imports; None if the guide has no such
    example."""
    if not guide.exists():
        return None
    for block in re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL):
        if OWN_LOOP in block:
            return imported_names(block)
    return None


def imported_names(source: str) -> int:
    """The number of names that the import statements of a program bind."""
    names = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += len(node.names)
    return names


def print_worst(figures: Figures, number: int) -> None:
    """Prints, for each count, the files that add most to it and its worst places."""
    for key, words in PLACES.items():
        places = figures.places[key]
        if not places:
            continue
        print(f"\n{words}: {len(places)}")
        files = Counter(place.path for place in places)
        print(
            "  files: " + ", ".join(f"{path} {count}" for path, count in files.most_common(number))
        )
        for place in sorted(places, reverse=True)[:number]:
            print(f"  {place.path}:{place.line}: {place.text}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.house", description=__doc__.splitlines()[0])
    parser.add_argument(
        "paths", nargs="*", type=Path, help="folders or files (default: the five packages)"
    )
    parser.add_argument(
        "--worst", type=int, default=0, metavar="N", help="list the N worst places of each count"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to this file"
    )
    options = parser.parse_args()
    figures = measure(options.paths or [Path(name) for name in PACKAGES])
    summary: dict[str, float | None] = dict(figures.summary())
    if not options.paths:
        summary["names_to_import_for_a_loop"] = names_to_import()
    for name, value in summary.items():
        if value is None:
            print(f"{name.replace('_', ' '):<50} -")
        else:
            print(f"{name.replace('_', ' '):<50} {value:>9,.6g}")
    if options.worst:
        print_worst(figures, options.worst)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
