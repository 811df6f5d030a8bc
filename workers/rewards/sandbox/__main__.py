"""python -m workers.rewards.sandbox: whether it holds on this machine, and which layers do."""

from __future__ import annotations

import sys

from workers.rewards.sandbox.probing import check_once
from workers.rewards.sandbox.processes import SandboxError

try:
    print(check_once())
except SandboxError as error:
    sys.exit(str(error))
