"""run_command(): a recipe as a command of its own, below a command that shows what came of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def run_command(arguments: Sequence[str]) -> None:
    """python ARGUMENTS; ends this command with the other's status where that is not 0. Ctrl-C
    reaches both: the recipe says what is kept, and this command waits for it."""
    process = subprocess.Popen([sys.executable, *arguments])
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:
            continue
    if status:
        raise SystemExit(status if status > 0 else 128 - status)
