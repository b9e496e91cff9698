"""Low-level calls of `shm`: sleep on a word of shared memory, wake its sleepers, and copy between addresses.

Python has no futex call and no copy between two addresses; the C library has both, and ctypes releases the GIL
during a call. All functions take plain addresses of memory that the caller keeps alive.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
from collections.abc import Callable
from typing import Final

from ringred import native

__all__ = ["copy", "copy_short", "fence", "give_way", "order", "sleep", "unavailable", "wake"]

_SYS_FUTEX: Final = {"x86_64": 202, "AMD64": 202, "aarch64": 98, "arm64": 98}.get(platform.machine())
_IN_ORDER: Final = platform.machine() in ("x86_64", "AMD64")  # a processor that keeps all but a store and a later load
_FUTEX_WAIT: Final = 0
_FUTEX_WAKE: Final = 1
_EVERYONE: Final = 2**31 - 1
# A copy up to this size ends before another thread could take the GIL, so that releasing the GIL does not pay.
_SHORT_BYTES: Final = 32 << 10


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def unavailable() -> str | None:
    """Why `shm` cannot work on this machine, or None. docs/design/shared-memory.md argues for these processors only."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, this is {sys.platform}"
    if _SYS_FUTEX is None or sys.maxsize < 2**32:
        return f"it needs x86-64 or arm64 of 64 bits, this processor is {platform.machine()}"
    if not _IN_ORDER and native.player is None:
        return f"on {platform.machine()} it needs the compiled player: {native.reason}"
    return None


_libc = ctypes.CDLL(None)
_libc_holding_gil = ctypes.PyDLL(None)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
)
_sched_yield = _libc.sched_yield
_long_copy, _short_copy = _libc.memcpy, _libc_holding_gil.memcpy
for _memcpy in (_long_copy, _short_copy):
    _memcpy.restype = None
    _memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


copy_short = _short_copy
"""As `copy`, without releasing the GIL: for few bytes."""


def copy(target: int, source: int, nbytes: int) -> None:
    """Copies between addresses that do not overlap; without the GIL where that is worth it."""
    if nbytes <= _SHORT_BYTES:
        _short_copy(target, source, nbytes)
    else:
        _long_copy(target, source, nbytes)


def sleep(address: int, value: int, seconds: float) -> None:
    """Blocks in the kernel while the 32-bit word at `address` is `value`: until `wake`, a signal or the time."""
    whole = int(seconds)
    limit = _Timespec(whole, int((seconds - whole) * 1e9))
    _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, value, ctypes.addressof(limit), None, 0)


def give_way() -> None:
    """Lets another thread or process have this core, if one wants it."""
    _sched_yield()


def wake(address: int) -> None:
    """Wakes all who sleep on the word at `address`, in whatever process."""
    _syscall(_SYS_FUTEX, address, _FUTEX_WAKE, _EVERYONE, None, None, 0)


def _locked_instruction() -> None:
    _take_barrier()
    _leave_barrier()


def _nothing() -> None:
    pass


_barrier = threading.Lock()
_take_barrier, _leave_barrier = _barrier.acquire, _barrier.release

fence: Callable[[], None] = _locked_instruction if _IN_ORDER or native.player is None else native.player.fence
"""Orders all earlier stores before all later loads; on x86-64 by taking a lock, which executes a locked instruction."""

order: Callable[[], None] = _nothing if _IN_ORDER else fence
"""Orders what was written before a word that tells of it, and what is read after it; x86-64 does so by itself."""
