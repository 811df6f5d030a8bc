"""The program in a response: what stands in its fenced blocks of code.

A block of Python goes before one without a language, and that before others: a response often ends
with what the program prints. Of several the last one counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

OPENING = re.compile(r"(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[^`]*\Z")
PYTHON = re.compile(r"py(thon)?[\d.]*|ipython[\d.]*", re.IGNORECASE)


@dataclass(slots=True)
class Block:
    """Block(mark="```", language="python", indent=0, lines=["print(5)"])"""

    mark: str
    language: str
    indent: int
    lines: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return 2 if PYTHON.fullmatch(self.language) else int(not self.language)

    @property
    def text(self) -> str:
        """Its lines, without the white space that stands before the block's mark."""
        dedented = []
        for line in self.lines:
            blank = len(line) - len(line.lstrip())
            dedented.append(line[min(self.indent, blank) :])
        return "\n".join(dedented)


def program_of(response: str) -> str:
    """The program of a response: its last block of Python, or all of it where it has no block."""
    blocks = blocks_of(response)
    if not blocks:
        return response
    best = max(block.rank for block in blocks)
    return [block.text for block in blocks if block.rank == best][-1]


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a text, in order; the last one may lack its end."""
    blocks: list[Block] = []
    block: Block | None = None
    for line in text.split("\n"):
        if block is None:
            opening = OPENING.search(line)
            if opening is not None and line.count(opening["mark"]) == 1:
                before = line[: opening.start()]
                indent = 0 if before.strip() else len(before)
                block = Block(opening["mark"], opening["language"], indent)
                blocks.append(block)
        elif line.lstrip().startswith(block.mark):
            block = None
        elif line.rstrip().endswith(block.mark):
            block.lines.append(line.rstrip().removesuffix(block.mark))
            block = None
        else:
            block.lines.append(line)
    return blocks
