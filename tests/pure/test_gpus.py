"""What NVML says of a host's GPUs, from an NVML that is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from ringred.topology import gpus


class _Error(Exception):
    pass


def nvml(count: int, linked: set[tuple[int, int]], refuses: bool = False) -> SimpleNamespace:
    def status(one: int, other: int, kind: int) -> int:
        assert kind == 2
        if refuses:
            raise _Error
        return 0 if (one, other) in linked else 3

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"NVIDIA Something" if handle else "NVIDIA Something",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 << 30),
        nvmlDeviceGetP2PStatus=status,
        nvmlDeviceGetTopologyCommonAncestor=lambda one, other: 50 if other == 3 else 30,
        NVML_P2P_CAPS_INDEX_NVLINK=2,
        NVML_P2P_STATUS_OK=0,
        NVMLError=_Error,
    )


def test_each_gpu_is_told_with_the_way_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(4, {(0, 1), (2, 3)}))
    found = gpus.gpus()
    assert found is not None
    assert [gpu.ways for gpu in found] == [
        {1: "NVLink", 2: "a PCIe host bridge", 3: "PCIe across sockets"},
        {0: "NVLink", 2: "a PCIe host bridge", 3: "PCIe across sockets"},
        {0: "a PCIe host bridge", 1: "a PCIe host bridge", 3: "NVLink"},
        {0: "PCIe across sockets", 1: "PCIe across sockets", 2: "NVLink"},
    ]
    assert str(found[3]) == "GPU 3: NVIDIA Something, 80 GiB; NVLink to 2; PCIe across sockets to 0, 1"


def test_one_gpu_has_no_way_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(1, set()))
    assert [str(gpu) for gpu in gpus.gpus() or []] == ["GPU 0: NVIDIA Something, 80 GiB"]


def test_without_nvml_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.gpus() is None
    monkeypatch.setitem(sys.modules, "pynvml", nvml(2, set(), refuses=True))
    assert gpus.gpus() is None
