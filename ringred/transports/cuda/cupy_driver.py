"""NVIDIA's driver, by CuPy (memory, handles) and cuda-bindings (flags, kernels), on the streams that torch knows.

What was seen of these calls on a device is in docs/design/cuda.md.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringred.errors import UnsupportedTensor
from ringred.transports.cuda import kernels
from ringred.transports.cuda.driver import Event, Kernel

__all__ = ["CudaDevice", "capabilities", "unavailable"]

_OWN = struct.Struct("<QQ")  # before a handle: the process that made it, and the address there
_ANY_DIRECTION = 4  # cudaMemcpyDefault: the addresses tell
_MAPPED = 3  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP
_FLAGS_OF_WAIT, _FLAGS_OF_WRITE = 0, 0  # GEQ; DEFAULT, with a barrier before the write
_LAUNCHES = 4096  # folds whose arguments are kept
_NEEDED = {
    "stream memory operations": "CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS",
    "registered host memory": "CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED",
    "unified addressing": "CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING",
}


def unavailable(index: int | None = None) -> str | None:
    """Why CUDA IPC cannot work here, on the current device or that of this `index`; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        import cupy  # noqa: F401
        from cuda.bindings import driver  # noqa: F401
    except ImportError as failure:
        return f"{failure}; pip install 'ringred[cuda12]' or 'ringred[cuda13]' brings CuPy and cuda-bindings"
    lacking = [name for name, there in capabilities(index).items() if not there]
    return f"the device lacks {', '.join(lacking)}" if lacking else None


def capabilities(index: int | None = None) -> dict[str, bool]:
    """What a device must be able to do, and whether it is."""
    from cuda.bindings import driver

    device = torch.cuda.current_device() if index is None else index
    torch.cuda.init()
    handle = _checked(driver.cuDeviceGet(device))
    return {
        name: bool(_checked(driver.cuDeviceGetAttribute(getattr(driver.CUdevice_attribute, attribute), handle)))
        for name, attribute in _NEEDED.items()
    }


def _checked(answer: Sequence[Any]) -> Any:
    """The result of a call of cuda-bindings. Raises `RuntimeError`."""
    error, *results = answer
    if int(error) != 0:
        raise RuntimeError(f"CUDA: {error}")
    return results[0] if results else None


class CudaDevice:
    """The device `index` of this process; None is torch's current one. Compiled kernels are kept under `cache`. See
    `driver.Driver`."""

    name = "cuda_ipc"
    chunk_bytes = 64 << 20

    def __init__(self, index: int | None, cache: Path) -> None:
        import cupy
        from cuda.bindings import driver

        self.index = torch.cuda.current_device() if index is None else index
        self._cache = cache
        self.cupy, self.driver, self.runtime = cupy, driver, cupy.cuda.runtime
        with self.current():
            torch.cuda.init()
            torch.zeros(1, device=f"cuda:{self.index}")  # the device's context, which torch and CuPy share
        self.processors = torch.cuda.get_device_properties(self.index).multi_processor_count
        self._kernels: dict[str, int] = {}
        self._opened: set[int] = set()
        self._programs: dict[tuple[int, int, int], torch.cuda.Stream] = {}

    def current(self) -> Any:
        """Within it, this thread's current device is this one."""
        return self.cupy.cuda.Device(self.index)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Within it, this thread may ask for events, and allocate: on this device, so that it makes no context on
        another, and while another thread captures a graph, which that would end."""
        modes = self.driver.CUstreamCaptureMode
        with self.current():
            before = _checked(self.driver.cuThreadExchangeStreamCaptureMode(modes.CU_STREAM_CAPTURE_MODE_RELAXED))
            try:
                yield
            finally:
                self.driver.cuThreadExchangeStreamCaptureMode(before)

    def program(self) -> torch.cuda.Stream:
        which = torch._C._cuda_getCurrentStream(self.index)
        stream = self._programs.get(which)
        if stream is None:
            stream = self._programs[which] = torch.cuda.current_stream(self.index)
        return stream

    def point(self, program: Any) -> Event:
        return _Event(self, program)

    def allocate(self, nbytes: int) -> int:
        with self.looking():
            try:
                return int(self.runtime.malloc(nbytes))
            except RuntimeError:
                torch.cuda.empty_cache()  # torch may keep what it does not use
                return int(self.runtime.malloc(nbytes))

    def free(self, address: int) -> None:
        with self.current():
            self.runtime.free(address)

    def export(self, address: int) -> bytes:
        with self.looking():
            return _OWN.pack(os.getpid(), address) + bytes(self.runtime.ipcGetMemHandle(address))

    def open(self, handle: bytes, nbytes: int) -> int:
        process, address = _OWN.unpack_from(handle)
        if process == os.getpid():  # a handle opens only in other processes
            return int(address)
        with self.looking():
            opened = int(self.runtime.ipcOpenMemHandle(handle[_OWN.size :]))
        self._opened.add(opened)
        return opened

    def close(self, address: int) -> None:
        if address in self._opened:  # else it is of this process
            self._opened.discard(address)
            with self.current():
                self.runtime.ipcCloseMemHandle(address)

    def tensor(self, address: int, nbytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        # Not by __cuda_array_interface__: torch would look up where the memory is, and copy what is a peer's.
        where = torch.device("cuda", self.index)
        with torch.inference_mode(False):
            flat = torch.empty(0, dtype=dtype, device=where)
            if nbytes:
                storage: Any = torch._C._construct_storage_from_data_pointer(address, where, nbytes)
                storage.owner = owner
                flat.set_(storage, 0, (nbytes // dtype.itemsize,), (1,))
            return flat

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def register(self, address: int, nbytes: int) -> int:
        with self.current():
            _checked(self.driver.cuMemHostRegister(address, nbytes, _MAPPED))
            return int(_checked(self.driver.cuMemHostGetDevicePointer(address, 0)))

    def unregister(self, address: int) -> None:
        with self.current():
            _checked(self.driver.cuMemHostUnregister(address))

    def kernel(self, name: str) -> int:
        """The handle of a kernel, which is compiled if it never was."""
        found = self._kernels.get(name)
        if found is None:
            with self.looking():
                module = _checked(self.driver.cuModuleLoadData(self._cubin(name)))
                found = self._kernels[name] = int(_checked(self.driver.cuModuleGetFunction(module, name.encode())))
        return found

    def _cubin(self, name: str) -> bytes:
        from cuda.bindings import nvrtc

        capability = torch.cuda.get_device_capability(self.index)
        compiler = [int(part) for part in nvrtc.nvrtcVersion()]
        what = f"sm {capability}, NVRTC {compiler}"
        return kernels.cached(self._cache / "kernels", name, what, lambda: self._compiled(name))

    def _compiled(self, name: str) -> bytes:
        """The kernel for this device. Not by CuPy, which has small numbers flushed to zero."""
        from cuda.bindings import nvrtc

        major, minor = torch.cuda.get_device_capability(self.index)
        options = [option.encode() for option in (*kernels.OPTIONS, f"--gpu-architecture=sm_{major}{minor}")]
        program = _checked(nvrtc.nvrtcCreateProgram(kernels.source([name]).encode(), b"folds.cu", 0, [], []))
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(error) != 0:
            log = b" " * int(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{name} does not compile for sm_{major}{minor}: {log.decode(errors='replace')}")
        cubin = b" " * int(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        nvrtc.nvrtcDestroyProgram(program)
        return cubin

    def stream(self) -> _Stream:
        return _Stream(self)


class _Event:
    """The point of a torch stream after all that was enqueued there so far."""

    def __init__(self, device: CudaDevice, stream: torch.cuda.Stream) -> None:
        self.stream, self._device = stream, device
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def seconds_since(self, earlier: _Event) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1e3

    def done(self) -> bool:
        with self._device.looking():
            return bool(self.event.query())


def _named(stream: tuple[int, int, int]) -> dict[str, int]:
    """A stream, as torch tells of it, in the form that it takes."""
    return dict(zip(("stream_id", "device_index", "device_type"), stream, strict=True))


class _Launch:
    """A fold as the driver is told of it: which kernel, how many blocks and threads, and its arguments."""

    __slots__ = ("_arguments", "_pointers", "blocks", "function", "pointers", "threads")

    def __init__(self, device: CudaDevice, name: str, out: Tensor, packed: bytes) -> None:
        self._arguments = ctypes.create_string_buffer(packed, len(packed))
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self.pointers = ctypes.addressof(self._pointers)
        self.blocks, self.threads = kernels.geometry(out.nbytes, device.processors)
        self.function = device.kernel(name)


class _Stream:
    """See `driver.Stream`."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        with device.current():
            self._own = device.cupy.cuda.Stream(non_blocking=True)
        self.handle = int(self._own.ptr)
        self.stream = torch.cuda.ExternalStream(self.handle, device=f"cuda:{device.index}")
        self._named = _named((self.stream.stream_id, device.index, self.stream.device_type))
        self._launches: OrderedDict[tuple[Any, ...], _Launch] = OrderedDict()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        with self._device.current():
            self._device.runtime.memcpyAsync(target, source, nbytes, _ANY_DIRECTION, self.handle)

    def fold(
        self, kernel: Kernel, out: Tensor, operands: Sequence[Tensor], final: bool, also: Sequence[int] = ()
    ) -> None:
        addresses, elements, divisor = [one.data_ptr() for one in operands], out.numel(), kernel.divisor(final)
        targets = [out.data_ptr(), *also]
        key = (kernel.op, kernel.dtype, elements, divisor, len(also), *targets, *addresses)
        launch = self._launches.get(key)
        if launch is None:
            name = kernels.name_of(str(kernel.op.value), kernel.dtype)
            packed = kernels.arguments(elements, addresses, targets, divisor)
            launch = self._launches[key] = _Launch(self._device, name, out, packed)
            if len(self._launches) > _LAUNCHES:
                self._launches.popitem(last=False)
        grid = (launch.blocks, 1, 1, launch.threads, 1, 1)
        with self._device.current():
            _checked(self._device.driver.cuLaunchKernel(launch.function, *grid, 0, self.handle, launch.pointers, 0))

    def set_flag(self, address: int, value: int) -> None:
        with self._device.current():
            _checked(self._device.driver.cuStreamWriteValue32(self.handle, address, value, _FLAGS_OF_WRITE))

    def wait_flag(self, address: int, value: int) -> None:
        with self._device.current():
            _checked(self._device.driver.cuStreamWaitValue32(self.handle, address, value, _FLAGS_OF_WAIT))

    def here(self) -> Event | None:
        with self._device.current():
            if torch.cuda.is_current_stream_capturing():
                raise UnsupportedTensor(
                    "a collective cannot be captured in a CUDA graph: its flags have other values in each call. Call "
                    "it between the graphs"
                )
        return _Event(self._device, self._device.program())

    @contextmanager
    def following(self, point: Event | None) -> Iterator[None]:
        assert isinstance(point, _Event), "made by `here`"
        self.stream.wait_event(point.event)
        with self._device.current():
            # As torch.cuda.stream does, in less than half of its time.
            before = torch._C._cuda_getCurrentStream(self._device.index)
            torch._C._cuda_setStream(**self._named)
            try:
                yield
            finally:
                torch._C._cuda_setStream(**_named(before))

    def precede(self, point: Event) -> bool:
        assert isinstance(point, _Event), "made by `record`"
        self._device.program().wait_event(point.event)
        return True

    def record(self) -> Event:
        return _Event(self._device, self.stream)

    def share(self, tensor: Tensor, point: Event) -> None:
        assert isinstance(point, _Event), "made by `here`"
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            part.record_stream(point.stream)

    def close(self) -> None:
        self.stream.synchronize()
