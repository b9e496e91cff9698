"""How the ranks of a job find each other: by MPI, by a torch store, by a torch process group, or by the launcher."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringred.errors import TransportUnavailable
from ringred.runtime.config import Config, Launch, detect_launch, mpi_environment, store_outlives_ranks
from ringred.runtime.seat import Renewed, Seat, check_alive, own_address, take
from ringred.topology.detect import host_indices, host_name
from ringred.transports import routed
from ringred.transports.base import Gather, Transport
from ringred.transports.local import Hub
from ringred.transports.membership.card import Card
from ringred.transports.membership.member import Member
from ringred.transports.membership.rendezvous import Rendezvous
from ringred.transports.membership.view import LINEAGE, View

__all__ = [
    "Connected",
    "again",
    "by_launcher",
    "by_mpi",
    "by_process_group",
    "by_store",
    "end_job",
    "gatherer",
    "meeting_board",
    "torch_group",
]


_MEETING_SECONDS = 30.0  # in which ranks connect anew
_GRACE_SECONDS = 1.0  # in which peers can say what they saw, before MPI ends them


class Connected(NamedTuple):
    """The ranks of a job, connected. `hosts` has the host of each rank as a number; `gather` gives a text to all ranks;
    `leave` is called once nothing needs `gather` any more. `seat` is None for one rank."""

    transport: Transport
    hosts: tuple[int, ...]
    gather: Gather
    leave: Callable[[], None]
    seat: Seat | None = None


def gatherer(size: int, all_gather: Callable[[Tensor, Tensor], object]) -> Gather:
    """A `Gather` by the collective of `size` ranks that are connected."""

    def gather(text: str) -> list[str]:
        own, lengths = list(text.encode()), torch.empty(size, dtype=torch.int64)
        all_gather(lengths, torch.tensor([len(own)]))
        longest = int(lengths.max())
        table = torch.empty(size * longest, dtype=torch.uint8)
        if longest:
            all_gather(table, torch.tensor(own + [0] * (longest - len(own)), dtype=torch.uint8))
        rows = table.view(size, longest).tolist()
        return [bytes(row[:length]).decode() for row, length in zip(rows, lengths.tolist(), strict=True)]

    return gather


def by_mpi(comm: Any, config: Config) -> Connected:
    """The ranks of an mpi4py communicator, of which duplicates are taken; None is `COMM_WORLD`. Collective."""
    mpi_environment()  # importing mpi4py starts MPI, which then reads its settings
    try:
        from ringred.transports import mpi
    except (ImportError, RuntimeError) as failure:
        raise TransportUnavailable(
            f"MPI cannot be used: {failure}; pip install 'ringred[mpi]' brings mpi4py and an MPI"
        ) from failure
    comm = mpi.world() if comm is None else comm
    gather = mpi.gatherer(comm)
    names = gather(host_name())
    transport = _nearest(gather, comm.Get_rank(), len(names), lambda: mpi.MpiTransport(comm), config, "mpi")
    seat = _seat(gather, comm.Get_rank(), names, config)
    if seat is not None and len(names) == mpi.world().Get_size():
        seat = seat._replace(part_ways=mpi.end_without_others)
    return Connected(transport, host_indices(names), gather, _nothing, seat)


def by_store(store: Any, rank: int, size: int, config: Config, seated: bool = True) -> Connected:
    """`size` ranks that share a torch store; Gloo connects them. Collective."""
    from ringred.transports import stores, torch_p2p

    store = stores.corner(store, rank)
    gather = stores.gatherer(store, rank, size, config.timeout)
    names = gather(host_name())
    address = torch_p2p.bind_address(names, config.interface)

    def far() -> Transport:
        return torch_p2p.TorchP2PTransport(store, rank, size, config.timeout, address, len(set(names)) > 1)

    transport = _nearest(gather, rank, size, far, config, "torch_p2p")
    seat = _seat(gather, rank, names, config) if seated else None
    if seat is not None and store_outlives_ranks():
        seat.member.approved = stores.told(store)

    def leave() -> None:
        stores.leave(store, rank, size, config.timeout)

    return Connected(transport, host_indices(names), gather, leave, seat)


def _by_rendezvous(launch: Launch, config: Config) -> Connected:
    """The ranks that `ringred run` started; a process that joins them is alone until they let it in."""
    from ringred.transports.board_store import BoardStore

    rendezvous = Rendezvous(Card.from_text(launch.rendezvous), bytes.fromhex(launch.secret))
    reconnect = partial(again, config)
    if launch.joins:
        member = Member(rendezvous.secret, own_address(config.interface) if rendezvous.keeper.port else None)
        member.approved = rendezvous.tell
        seat = Seat(member, member.adopt(View(LINEAGE, -1, (member.card,), {})), reconnect, rendezvous)
        return Connected(Hub(1).transport(0), (0,), lambda text: [text], _nothing, seat)
    store = BoardStore(rendezvous.keeper, rendezvous.secret, "start", config.timeout)
    connected = by_store(store, launch.rank, launch.size, config, seated=False)
    seat = take(connected.gather, launch.rank, connected.hosts, config.interface, reconnect, rendezvous)
    return connected._replace(seat=seat)


def _seat(gather: Gather, rank: int, names: Sequence[str], config: Config) -> Seat | None:
    """The seat of `rank`, whose job goes on over shared memory and Gloo when its ranks change, MPI's too: MPI's own
    messages are not to be relied on after a rank has died."""
    if len(names) == 1:
        return None
    return take(gather, rank, names, config.interface, partial(again, config))


def again(config: Config, member: Member, view: View) -> Renewed:
    """The members of `view`, connected by a board that the first of them keeps. Collective among them; raises
    `TransportUnavailable`, or `PeerFailed` where one has ended meanwhile."""
    patient = replace(config, timeout=min(config.timeout, _MEETING_SECONDS))
    store = meeting_board(patient, member, view)
    rank = view.rank_of(member.identity)
    assert rank is not None, "who is left out does not connect"
    connected = by_store(store, rank, len(view.members), patient, seated=False)
    return Renewed(connected.transport, connected.hosts, connected.gather)


def meeting_board(config: Config, member: Member, view: View) -> Any:
    """A store that the first member of `view` keeps for all of them."""
    from ringred.transports.board_store import BoardStore

    return BoardStore(view.members[0], member.secret, view.key, config.timeout, lambda: check_alive(member, view))


def by_process_group(group: Any, config: Config) -> Connected:
    """The ranks of a torch process group, the default one if None, through its store. Collective."""
    from ringred.transports import stores

    return by_store(*stores.group_store(group), config)


def by_launcher(config: Config) -> Connected:
    """The ranks of torch's default process group where the program has made it; else those that the launcher started.

    Raises `TransportUnavailable`, and `ValueError` where the launcher started several ranks and left no way for them to
    find each other.
    """
    if config.transport != "mpi" and torch_group() is not None:
        return by_process_group(None, config)  # whatever a launcher left in the environment: the ranks are connected
    launch = detect_launch()
    asked = launch.kind if launch.kind == "run" else config.transport
    kind = {"mpi": "mpi", "torch_p2p": "store"}.get(asked or "", launch.kind)
    if kind == "run":
        connected = _by_rendezvous(launch, config)
    elif kind == "mpi":
        connected = by_mpi(None, config)
    elif kind == "store":
        from ringred.transports.stores import rendezvous

        connected = by_store(rendezvous(config.timeout, launch.restart), launch.rank, launch.size, config)
    else:
        connected = Connected(Hub(1).transport(0), (0,), lambda text: [text], _nothing)
    transport = connected.transport
    if transport.size != launch.size and torch_group() is None and not launch.joins:
        transport.close()
        raise TransportUnavailable(
            f"the launcher started {launch.size} ranks, but {transport.name} connects {transport.size}: is this "
            "mpirun of another MPI than mpi4py's (ringred doctor tells), or RINGRED_TRANSPORT set for another launcher?"
        )
    return connected


def end_job(transport: Transport) -> None:
    """Ends the whole job where `transport` is MPI's, whose own end waits for all ranks, which may wait for this one."""
    if getattr(transport, "far", transport).name == "mpi":
        from ringred.transports.mpi import abort_job

        time.sleep(_GRACE_SECONDS)
        abort_job(1)


def _nearest(
    gather: Gather, rank: int, size: int, far: Callable[[], Transport], config: Config, name: str
) -> Transport:
    """Connects the ranks: by shared memory within a host, and between hosts by `far()`, the transport named `name`.

    `config.transport` overrides this.
    """
    if config.transport == name or (size == 1 and config.transport is None):
        return far()
    only_near = config.transport == "shm"
    # MPI is connected even if shared memory reaches all ranks, because MPI's own all-reduce is one of the algorithms.
    keep_far = name == "mpi" and not only_near
    return routed.join(
        gather, rank, size, far, config.timeout, only_near=only_near, keep_far=keep_far, compiled=config.compiled
    )


def torch_group() -> Any:
    """The default process group of torch.distributed, or None where the program has made none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.group.WORLD


def _nothing() -> None:
    pass
