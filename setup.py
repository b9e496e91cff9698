"""Builds the compiled player (`ringred/native`) with the package, which works without it too, and is slower then.

One file serves every Python from 3.10 on; a free-threaded one, which has no stable ABI, gets its own.
Where there is no C compiler, that of the package `ziglang` is taken. `ZIG_TARGET=aarch64-linux-gnu.2.17` takes it to
compile for another machine or an older libc, as `make wheels` does; then a failure is one.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("ringred") / "native"
TARGET = os.environ.get("ZIG_TARGET")
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
THERE = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")  # what the player is written for


def compiler() -> list[str] | None:
    """The C compiler that Python's builds take here (`CC`, or what Python was built with), if it is there."""
    for named in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc"):
        command = shlex.split(named or "")
        if command and shutil.which(command[0]):
            return command
    return None


class Build(build_ext):
    """Goes on without the player, and says so in one line, if it cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        command = None if TARGET else compiler()
        if command is None:
            command = [sys.executable, "-m", "ziglang", "cc", *(["-target", TARGET] if TARGET else [])]
        linker = [*command, "-shared"]
        self.compiler.set_executables(compiler=command, compiler_so=[*command, "-fPIC"], linker_so=linker)
        try:
            super().build_extension(ext)
        except Exception as failure:
            if TARGET:
                raise SystemExit(f"ringred: no player for {TARGET}: {failure}") from failure
            why = str(failure).replace("\n", " ")
            print(f"ringred: built without its compiled player, which makes it faster: {why:.120}...", file=sys.stderr)


setup(
    ext_modules=[
        Extension(
            "ringred.native._player",
            [str(NATIVE / name) for name in ("module.c", "recall.c", "tape.c", "folds.c", "copy.c")],
            depends=[
                str(NATIVE / name) for name in ("dlpack.h", "halves.h", "keys.h", "layout.h", "slots.h", "waits.h")
            ],
            extra_compile_args=["-O3", "-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", "-fvisibility=hidden"],
            extra_link_args=["-Wl,-s"],
            define_macros=[("Py_LIMITED_API", "0x030a0000")] if STABLE_ABI else [],
            py_limited_api=STABLE_ABI,
            optional=True,
        )
    ]
    if THERE or TARGET
    else [],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
    setup_requires=["ziglang>=0.13"] if TARGET or (THERE and not compiler()) else [],
)
