"""Lets torchvision's published build, which is for CUDA, be imported beside a PyTorch for CPUs.

    python cluster/torchvision_operators.py     # by make install: for every process of that Python

Its compiled operators don't load there, and one of its modules describes two of them all the same:
"operator torchvision::nms does not exist", with which transformers' models can't be imported either.
Where they have not loaded, the two are declared first. Nothing here calls them, nor can: torchvision
says so. Where its operators load this changes nothing. Standard library only.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

DESCRIBES = "torchvision._meta_registrations"
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareBefore:
    """A finder of sys.meta_path that finds nothing, and is asked before each import."""

    declared: Any = None
    """torch forgets a library that nobody holds."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name != DESCRIBES or cls.declared is not None:
            return
        import torch
        from torchvision.extension import _has_ops

        if not _has_ops():
            cls.declared = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                cls.declared.define(f"{operator}{SCHEMA}")


def install() -> None:
    """Has every process of this Python import this module when it starts."""
    packages = Path(sysconfig.get_path("purelib"))
    module = Path(__file__)
    shutil.copy(module, packages / module.name)
    (packages / f"{module.stem}.pth").write_text(f"import {module.stem}\n")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, DeclareBefore)
