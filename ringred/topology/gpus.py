"""The GPUs of this host and how they reach each other, as NVIDIA's management library (NVML) tells."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

__all__ = ["Gpu", "gpus"]

# By the level of the nearest common ancestor (nvmlGpuTopologyLevel_t), where no NVLink joins two.
_WAYS = {
    0: "one board",
    10: "one PCIe switch",
    20: "PCIe switches",
    30: "a PCIe host bridge",
    40: "PCIe",
    50: "PCIe across sockets",
}


class Gpu(NamedTuple):
    """One GPU, by NVML's number: name, memory, and the way to each of the others ("NVLink", or a kind of PCIe)."""

    number: int
    name: str
    memory_bytes: int
    ways: dict[int, str]

    def __str__(self) -> str:
        kinds = sorted(set(self.ways.values()))
        own = f"GPU {self.number}: {self.name}, {self.memory_bytes / 2**30:.0f} GiB"
        others = [f"{kind} to {', '.join(str(o) for o, way in self.ways.items() if way == kind)}" for kind in kinds]
        return "; ".join([own, *others])


def gpus() -> list[Gpu] | None:
    """This host's GPUs; None where NVML cannot be asked (`nvidia-ml-py` is missing, or the driver)."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # ImportError, or one of NVML's own
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        ways: list[dict[int, str]] = [{} for _ in handles]
        for a, b in combinations(range(len(handles)), 2):
            ways[a][b] = ways[b][a] = _way(nvml, handles[a], handles[b])
        found = []
        for index, handle in enumerate(handles):
            name = nvml.nvmlDeviceGetName(handle)
            name = name.decode() if isinstance(name, bytes) else name
            nbytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            found.append(Gpu(index, name, nbytes, dict(sorted(ways[index].items()))))
        return found
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _way(nvml: Any, one: Any, other: Any) -> str:
    if nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
        return "NVLink"
    level = int(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other))
    return _WAYS.get(level, "PCIe")
