"""What a transport's library does by itself: MPI's own all-reduce, to compare with and to fall back on."""

from __future__ import annotations

from ringred.collectives.registry import register_native

__all__: list[str] = []

register_native("all_reduce", "native", "The transport library's own: MPI_Iallreduce over MPI.")
