"""A CUDA device without CUDA, for a CPU build of torch: tensors on it have shapes and no data.

    from benchmarks.rehearsal import hollow       # before torch is imported
    hollow.become_gpu()
    with hollow.Hollow() as counted:
        ...                                       # cuda tensors; what comes back to the host is ones
    counted.launches, counted.syncs, counted.copies, counted.memory.peak

Tensors on cuda are FakeTensors, so that operations of a host tensor with a device tensor fail as they
would on a GPU; host tensors are real. Numbers, times and vLLM's own kernels are left out. For one
process of its own: torch.cuda is replaced for good.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("hollow_cuda.cpp")
COMPILER = "g++"


def build() -> Path:
    """The compiled device guard, made once for each version of torch (some seconds)."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_directory = Path(spec.origin).parent
    text = SOURCE.read_bytes() + metadata.version("torch").encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hybridflow"
    library = cache / f"hollow_cuda_{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE)]
        command += [f"-I{torch_directory}/include", f"-L{torch_directory}/lib"]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    # torch looks for CUDA's hooks once, when it is first asked for a device.
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_directory / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return library


build()

import torch  # noqa: E402
import torch._dynamo.config  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from benchmarks.rehearsal.device_memory import Memory  # noqa: E402
from benchmarks.rehearsal.known_values import Known  # noqa: E402

ATEN = torch.ops.aten
# Its cache gives views of a storage on the wrong device where DeepSpeed flattens a model.
torch._dynamo.config.fake_tensor_cache_enabled = False
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
MEMORY_BYTES = 80 << 30
ACTIVE: list[Hollow] = []
"""The latest Hollow, which counts torch.cuda.synchronize."""


def on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Hollow(TorchDispatchMode):
    """Counts what a GPU would be asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: set[int] = set()
        self.known = Known()
        """Integers on the device that follow from the host's."""
        self.syncs: collections.Counter[str] = collections.Counter()
        """Times that the host waits for the device, by their cause."""
        self.copies = 0
        """Copies from the host."""
        self.pageable = 0
        """Those of them for which the host waits: from ordinary memory, or asked to be waited for."""
        self.launches = 0
        """Operations on the device, views among them."""
        self.memory = Memory()
        ACTIVE[:] = [self]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if options.pop("pin_memory", False):
            return self._pinned_empty(func, args, options)
        tensors = [x for x in pytree.tree_leaves((args, options)) if isinstance(x, torch.Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not on_device and not on_cuda(options.get("device")):
            return func(*args, **options)
        self.launches += 1
        special = self._special().get(func)
        result = NotImplemented if special is None else special(args, options)
        if result is NotImplemented:
            result = self._run(func, args, options, tensors)
        self.memory.see(result, func)
        return result

    def _run(
        self, func: Any, args: Sequence[Any], options: dict[str, Any], tensors: list[torch.Tensor]
    ) -> Any:
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor) and tensor.dim() and tensor.device.type == "cpu":
                raise RuntimeError(
                    f"{func}: a host tensor {tuple(tensor.shape)} among device tensors"
                )
        if _asks_for_values(func, args, options):
            return self._sized_by_values(func, args, options)
        fake_args, fake_options = pytree.tree_map_only(torch.Tensor, _fake, (tuple(args), options))
        with FAKE:
            result = func(*fake_args, **fake_options)
        self.known.follow(func, args, options, result)
        return result

    def _sized_by_values(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """The host waits for the size of the result."""
        name = func.overloadpacket.__name__
        self.syncs[name] += 1
        values = self.known.compute(func, args, options)
        if values is None and func is ATEN.nonzero.default:  # as if all were
            return _empty((args[0].numel(), args[0].dim()), torch.int64, args[0].device)
        if values is None and func is ATEN.bincount.default:
            positional = args[2] if len(args) > 2 else 0
            return _empty((options.get("minlength", positional),), torch.int64, args[0].device)
        if values is None:
            raise RuntimeError(f"{func}: the size of its result depends on what is not known")
        device = next(x for x in pytree.tree_leaves(args) if isinstance(x, FakeTensor)).device
        return pytree.tree_map_only(
            torch.Tensor, lambda value: self._with_values(value, device), values
        )

    def _with_values(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        result = _empty(value.shape, value.dtype, device)
        self.known.put(result, value)
        return result

    def _special(self) -> dict[Any, Callable[[Sequence[Any], dict[str, Any]], Any]]:
        return {
            ATEN._local_scalar_dense.default: self._item,
            ATEN.equal.default: self._equal,
            ATEN._to_copy.default: self._to_copy,
            ATEN.copy_.default: self._copy,
            ATEN._foreach_copy_.default: self._foreach_copy,
            ATEN.index.Tensor: partial(self._index, ATEN.index.Tensor),
            ATEN.index_put.default: partial(self._index, ATEN.index_put.default),
            ATEN.index_put_.default: partial(self._index, ATEN.index_put_.default),
        }

    def _pinned_empty(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Page-locked host memory: a copy to it need not wait."""
        tensor = func(*args, **options)
        self.page_lock(tensor.untyped_storage().data_ptr())
        return tensor

    def page_lock(self, address: int) -> None:
        """Copies to and from the host memory that begins there need not wait."""
        self._pinned.add(address)

    def _item(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        self.syncs["item"] += 1
        value = self.known.get(args[0])
        if value is not None:
            return value.item()
        if args[0].dtype is torch.bool:
            return True
        return 1.0 if args[0].dtype.is_floating_point else 1

    def _equal(self, args: Sequence[Any], options: dict[str, Any]) -> bool:
        self.syncs["equal"] += 1
        return bool(self.known.compute(ATEN.equal.default, args, options))

    def _to_copy(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        source, device = args[0], options.get("device")
        dtype = options.get("dtype") or source.dtype
        if not isinstance(source, FakeTensor):
            self._count_copy(source, options.get("non_blocking", False))
            result = _empty(source.shape, dtype, torch.device(device))
            self.known.put(result, source.to(dtype, copy=True))
            return result
        if device is not None and torch.device(device).type == "cpu":
            self.syncs["to_cpu"] += 1
            value = self.known.get(source)
            if value is not None:
                return value.to(dtype, copy=True)
            return torch.ones(source.shape, dtype=dtype)
        return NotImplemented

    def _copy(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        into, source = args[0], args[1]
        if not isinstance(into, FakeTensor):
            nonblocking = (len(args) > 2 and args[2]) or options.get("non_blocking", False)
            if not nonblocking or into.untyped_storage().data_ptr() not in self._pinned:
                self.syncs["copy_to_cpu"] += 1
            value = self.known.get(source)
            return into.fill_(1) if value is None else into.copy_(value)
        if not isinstance(source, FakeTensor):
            self._count_copy(
                source, (len(args) > 2 and args[2]) or options.get("non_blocking", False)
            )
            self.known.written(into, source)
            return into
        return NotImplemented

    def _count_copy(self, source: torch.Tensor, non_blocking: bool) -> None:
        self.copies += 1
        if not non_blocking or source.untyped_storage().data_ptr() not in self._pinned:
            self.pageable += 1

    def _index(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Indices may be on the host: they are copied."""
        indexed, indices, further = args[0], list(args[1]), args[2:]
        if not isinstance(indexed, FakeTensor):
            return NotImplemented
        for place, index in enumerate(indices):
            if index is not None and not isinstance(index, FakeTensor):
                indices[place] = self._to_copy([index], {"device": indexed.device})
        moved = (indexed, indices, *further)
        tensors = [x for x in pytree.tree_leaves(moved) if isinstance(x, torch.Tensor)]
        return self._run(func, moved, options, tensors)

    def _foreach_copy(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Between devices they are copied one by one."""
        for into, source in zip(args[0], args[1], strict=True):
            into.copy_(source, *args[2:], **options)


def _asks_for_values(func: Any, args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether the size of the result depends on the values."""
    if func is ATEN.index.Tensor:
        return any(index is not None and index.dtype is torch.bool for index in args[1])
    if func is ATEN.repeat_interleave.Tensor:
        return options.get("output_size") is None
    return torch.Tag.dynamic_output_shape in func.tags


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, FakeTensor) else FAKE.from_tensor(tensor)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with FAKE:
        return torch.empty(tuple(shape), dtype=dtype, device=device)


class Stream:
    """Everything is finished at once."""

    cuda_stream = stream_id = device_index = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Event:
        return Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Event:
    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _synchronize(device: object = None) -> None:
    for hollow in ACTIVE:
        hollow.syncs["synchronize"] += 1


class Runtime:
    """torch.cuda.cudart(), as far as memory is page-locked with it."""

    class cudaError:
        success = 0

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:
        for hollow in ACTIVE:
            hollow.page_lock(address)
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        return 0


class Properties:
    """torch.cuda.get_device_properties of an H100."""

    name, major, minor = "NVIDIA H100", 9, 0
    total_memory, multi_processor_count = MEMORY_BYTES, 132
    shared_memory_per_block_optin, warp_size = 232448, 32
    is_integrated = False


def become_gpu() -> None:
    """torch.cuda of this process stands for one H100."""
    cuda: Any = torch.cuda
    stream = Stream()

    def answer(value: Any) -> Callable[..., Any]:
        """A function of its own for each name: torch.compile tells them apart."""
        return lambda *args, **options: value

    cuda.Stream, cuda.Event, torch.Event = Stream, Event, Event  # type: ignore[misc]
    cuda.current_stream, cuda.default_stream = answer(stream), answer(stream)
    cuda.stream = lambda other: contextlib.nullcontext()
    cuda.is_available, cuda.is_initialized = answer(True), answer(True)
    cuda.device_count = lambda: 1
    cuda.current_device = answer(0)
    cuda.cudart = lambda: Runtime
    cuda.synchronize = _synchronize
    for name in (
        "set_device",
        "empty_cache",
        "_lazy_init",
        "reset_peak_memory_stats",
    ):
        setattr(cuda, name, answer(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, answer(0))
    for name in ("max_memory_reserved", "_exchange_device", "_maybe_exchange_device"):
        setattr(cuda, name, answer(0))
    cuda.get_device_capability = lambda device=None: (Properties.major, Properties.minor)
    cuda.get_device_properties = lambda device=None: Properties
    cuda.get_device_name = lambda device=None: Properties.name
    cuda.mem_get_info = lambda device=None: (MEMORY_BYTES - (10 << 30), MEMORY_BYTES)
    cuda.memory_stats = lambda device=None: {}
    cuda.nvtx.range_push, cuda.nvtx.range_pop = answer(0), answer(0)
    torch.Tensor.record_stream = answer(None)  # type: ignore[assignment]
    # A FakeTensor gives its numbers one by one, a device all of them in one copy.
    FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # type: ignore[method-assign]
    plain_to = torch.nn.Module.to

    def move_module(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        """Module.to, which leaves a module alone that is where it shall be: a FakeTensor with a weak
        reference can't be put in place of another."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **options)
        tensors = [*module.parameters(), *module.buffers()]
        if dtype is None and on_cuda(device) and all(on_cuda(t.device) for t in tensors):
            return module
        return plain_to(module, *args, **options)

    torch.nn.Module.to = move_module  # type: ignore[assignment]
    plain_resize = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        """FSDP frees and takes gathered weights so."""
        result = plain_resize(storage, size)
        for hollow in ACTIVE:
            if hollow.memory.known(storage):
                hollow.memory.resized(storage)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
    host_tensor = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        result = host_tensor(data, *args, **options)
        return result.to(device) if on_cuda(device) else result

    torch.tensor = tensor
