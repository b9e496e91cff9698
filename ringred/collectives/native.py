"""The collective of the transport's own library: MPI's all-reduce, for comparison and as a fallback."""

from __future__ import annotations

from ringred.collectives.registry import register_native

__all__: list[str] = []

register_native("all_reduce", "native", "The transport library's own: MPI_Iallreduce over MPI.")
