"""The device's folds: compiled for each architecture, and run on the host against the folds of runtime/folds.py."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ringred.runtime.folds import SUPPORTED, Folder, ReduceOp
from ringred.transports.cuda import kernels

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")
EXACT = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """folds.cu as a library for this machine."""
    if COMPILER is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("no C++ compiler, or a processor without F16C")
    folder = tmp_path_factory.mktemp("cuda")
    library = folder / "folds.so"
    (folder / "folds.cu").write_text(kernels.source(kernels.NAMES))
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-mf16c", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
    command = [COMPILER, *flags, f"-I{HERE}", f"-I{folder}", str(HERE / "cuda_on_host.cpp"), "-o", str(library)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return ctypes.CDLL(str(library))


def values(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    if not dtype.is_floating_point and not dtype.is_complex:
        bounds = torch.iinfo(dtype)
        return torch.randint(bounds.min, bounds.max, (count,), generator=generator, dtype=dtype)
    found = torch.randn(count, generator=generator, dtype=torch.float64)
    if dtype.is_complex:
        return torch.complex(found, found.flip(0)).to(dtype)
    special = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-7, 65504.0, 3e38], dtype=torch.float64
    )
    if count > 20:
        found[seed : seed + 8] = special
    return found.to(dtype)


def folded_on_host(
    host: ctypes.CDLL, op: ReduceOp, operands: list[Tensor], targets: list[Tensor], divisor: int, blocks: int
) -> None:
    addresses = [operand.data_ptr() for operand in operands], [target.data_ptr() for target in targets]
    block = kernels.arguments(operands[0].numel(), *addresses, divisor)
    kernel = getattr(host, kernels.name_of(op.value, operands[0].dtype))
    host.launch(kernel, block, blocks, 32)


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
def test_folds_are_those_of_the_host(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    for op in SUPPORTED[dtype]:
        for count, size, offset, blocks in [
            (1, 2, 0, 1),
            (37, 2, 0, 1),
            (1000, 3, 0, 3),
            (1000, 5, 1, 2),
            (4099, 4, 0, 2),
        ]:
            folder = Folder(op, dtype, size)
            operands = [values(count + offset, dtype, seed)[offset:] for seed in range(size)]
            expected = torch.empty_like(operands[0])
            folder(expected, [operand.clone() for operand in operands], True)
            targets = [torch.empty(count + offset, dtype=dtype)[offset:] for _ in range(2)] + [operands[size - 1]]
            folded_on_host(host, op, operands, targets, folder.divisor(True), blocks)
            for target in targets:
                if dtype.is_complex:
                    torch.testing.assert_close(target, expected)
                else:
                    assert (
                        torch.equal(target.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0))
                        if (dtype.is_floating_point)
                        else torch.equal(target, expected)
                    ), (op, count, size, offset)
                    if dtype.is_floating_point:
                        assert torch.equal(target.isnan(), expected.isnan())


def test_every_kernel_is_named_and_nothing_else() -> None:
    text = kernels.source([])
    assert len(kernels.NAMES) == len(set(kernels.NAMES)) == 55
    needed = {kernels.name_of(op.value, dtype) for dtype, ops in SUPPORTED.items() for op in ops}
    assert needed == set(kernels.NAMES)
    most = re.search(r"MOST = (\d+)", text)
    assert most is not None
    assert int(most[1]) == kernels.MOST


def test_too_many_operands_are_refused() -> None:
    with pytest.raises(ValueError, match="65 operands into 1 targets: expected 1 to 64"):
        kernels.arguments(1, [0] * 65, [0], 0)
    with pytest.raises(ValueError, match="2 operands into 0 targets"):
        kernels.arguments(1, [0] * 2, [], 0)


@pytest.mark.parametrize(("nbytes", "blocks"), [(4, 1), (8192, 1), (8193, 2), (1 << 30, 264)])
def test_a_launch_is_as_large_as_it_needs_to_be(nbytes: int, blocks: int) -> None:
    assert kernels.geometry(nbytes, 132) == (blocks, 512)


def nvrtc() -> ctypes.CDLL | None:
    """NVIDIA's run-time compiler, which needs no GPU, where its package is installed."""
    try:
        import nvidia.cuda_nvrtc as package  # type: ignore[import-not-found]
    except ImportError:
        return None
    (library,) = Path(package.__path__[0], "lib").glob("libnvrtc.so.*")
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_all_kernels_compile_for(architecture: str) -> None:
    compiler = nvrtc()
    if compiler is None:
        pytest.skip("no nvidia-cuda-nvrtc-cu12")
    program = ctypes.c_void_p()
    text = kernels.source(kernels.NAMES).encode()
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), text, b"folds.cu", 0, None, None) == 0
    options = [option.encode() for option in (*kernels.OPTIONS, f"--gpu-architecture={architecture}")]
    failed = compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    length = ctypes.c_size_t()
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(length))
    log = ctypes.create_string_buffer(length.value)
    compiler.nvrtcGetProgramLog(program, log)
    assert failed == 0, log.value.decode()
    compiler.nvrtcGetCUBINSize(program, ctypes.byref(length))
    cubin = ctypes.create_string_buffer(length.value)
    assert compiler.nvrtcGetCUBIN(program, cubin) == 0
    assert cubin.raw[:4] == b"\x7fELF"
    for name in kernels.NAMES:
        assert f".text.{name}\0".encode() in cubin.raw, name
    compiler.nvrtcDestroyProgram(ctypes.byref(program))


def test_a_compiled_kernel_is_kept_and_found_again(tmp_path: Path) -> None:
    made: list[str] = []

    def compiles(text: str) -> bytes:
        made.append(text)
        return text.encode()

    folder = tmp_path / "kernels"
    for turn in range(2):
        for what in ("sm 90", "sm 100"):
            for name in ("sum_f32", "max_f32"):
                found = kernels.cached(folder, name, what, partial(compiles, f"{what} {name}"))
                assert found.decode() == f"{what} {name}", turn
    assert len(made) == len(set(made)) == len(list(folder.iterdir())) == 4
    nowhere = tmp_path / "sum.txt"
    nowhere.write_text("no folder")
    assert kernels.cached(nowhere, "sum_f32", "sm 90", lambda: b"made") == b"made"
