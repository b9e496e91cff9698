"""Builds the compiled player (`ringred/native`) with the package, which works without it too, and is slower then.

Where there is no C compiler, that of the package `ziglang` is taken.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("ringred") / "native"


def compiler() -> str | None:
    """The C compiler that Python's builds take here, if it is there."""
    named = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return next((found for name in (shlex.split(named)[0], "cc") if (found := shutil.which(name))), None)


class Build(build_ext):
    """Goes on without the player, and says so in one line, if it cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        found = compiler()
        command = [found] if found else [sys.executable, "-m", "ziglang", "cc"]
        linker = [*command, "-shared"]
        self.compiler.set_executables(compiler=command, compiler_so=[*command, "-fPIC"], linker_so=linker)
        try:
            super().build_extension(ext)
        except Exception as failure:
            print(f"ringred: built without its compiled player, which makes it faster: {failure}", file=sys.stderr)


setup(
    ext_modules=[
        Extension(
            "ringred.native._player",
            [str(NATIVE / name) for name in ("module.c", "tape.c", "folds.c")],
            depends=[str(NATIVE / name) for name in ("halves.h", "layout.h", "waits.h")],
            extra_compile_args=["-O3", "-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", "-fvisibility=hidden"],
            extra_link_args=["-Wl,-s"],
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    setup_requires=[] if compiler() else ["ziglang>=0.13"],
)
