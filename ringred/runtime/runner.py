"""Runs the calls of one communicator in order, on one thread at a time, and turns a failure into one exception."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from ringred.errors import CollectiveMismatch, PeerFailed, RingredError
from ringred.runtime import tensors
from ringred.runtime.call_site import call_site
from ringred.runtime.calls import Call, Native, Post, Prepared
from ringred.runtime.doing import Doing, Doings
from ringred.runtime.enqueued import Enqueued
from ringred.runtime.executor import Plan, run
from ringred.runtime.failures import RAISED, Report, diagnose
from ringred.runtime.on_device import OnDevice
from ringred.runtime.recall import Never, contract, recall, remember
from ringred.runtime.trace import Tracer
from ringred.runtime.work import Progress, Work
from ringred.transports.base import Fault, FaultKind, Request, Tape, Transport

__all__ = ["Runner"]

_OUTGOING = 32  # greatest number of asynchronous sends in flight
_SHORT_WAIT = 0.05  # the same, before this rank says what it saw
_REPORT_WAIT = 0.5  # seconds to wait for the reports of other ranks when a collective failed
_LONGEST_NS = 1 << 61


class Runner:
    """Puts the calls of a communicator in one order, and runs one at a time; each may take `timeout` seconds.

    On a device a call is done once it is enqueued, if the program goes on there too, and is watched from then on by a
    thread of its own. `blocking` makes the host wait for the device instead. With `sites`, ranks must call a collective
    at the same place of the program.
    """

    def __init__(
        self, transport: Transport, timeout: float, name: str, blocking: bool = False, sites: bool = False
    ) -> None:
        self.transport, self._sites = transport, sites
        self.order = threading.RLock()
        self.doings = Doings()
        if not sites:
            calls = self._resume, self._abandon, self.doings.noted
            self.doings.recall = recall(transport, self.order, self.doings, *calls)
        self.recall = self.doings.recall
        """Calls that were made before; who has found none there calls `launch`."""
        self.set_timeout(timeout)
        self.device = OnDevice(transport, name, blocking, self._failed, self.abort)
        self.rank, self.size = transport.rank, transport.size
        self._tracer: Tracer | None = None
        self.closed = False
        self._purpose = ""
        self._progress = Progress(f"ringred-{name}-{self.rank}")
        self._failing = threading.RLock()  # a signal's handler may close or abort in the middle of either
        self._pairs: dict[tuple[int, int], array[int]] = {}
        self._outgoing: deque[list[Request]] = deque()
        self._started: deque[Work[None]] = deque()  # to find those that failed while nobody waited for them
        self._failure: RingredError | None = None
        self._told = False  # whether a call has raised that
        self.followers: list[Callable[[BaseException], None]] = []
        """Called with what this communicator failed with."""

    failed = property(
        lambda self: self._failure is not None, doc="Whether a call has failed: there are no others then."
    )

    @property
    def purpose(self) -> str:
        """The purpose of the calls that are launched from now on, see `Call.for_purpose`."""
        return self._purpose

    @purpose.setter
    def purpose(self, purpose: str) -> None:
        self._purpose, self.recall.armed = purpose, False

    @property
    def tracer(self) -> Tracer | None:
        """What records the calls from now on."""
        return self._tracer

    @tracer.setter
    def tracer(self, tracer: Tracer | None) -> None:
        self._tracer, self.recall.armed = tracer, False

    def play_by_python(self) -> None:
        """From here on no plan is played in one call: the transport sees every message."""
        self.recall = self.doings.recall = Never(self.recall.number)

    def set_timeout(self, seconds: float) -> None:
        """From now on, each call may take so long."""
        self.timeout_ns = self.recall.timeout_ns = int(min(seconds * 1e9, _LONGEST_NS))
        if hasattr(self.transport, "timeout"):  # what it waits for by itself
            self.transport.timeout = seconds

    def launch(
        self,
        prepared: Prepared,
        async_op: bool = False,
        holding: object = None,
        identity: tuple[Any, ...] | None = None,
    ) -> Work[None] | None:
        """Runs `prepared` after all calls before it: here if nothing is in flight, else on the progress thread.

        `holding` is kept until it is done, even if nobody waits. If all that the call depends on is in its `identity`,
        the next such one is recalled.
        """
        given, call, pair = prepared, prepared.call, prepared.pair
        with self.order:
            self.recall.armed = False
            if self._failure is not None or self.closed:
                self._refuse(call)
            if self.purpose:
                prepared = prepared._replace(call=call.for_purpose(self.purpose))
            elif self._sites and pair is None and not call.purpose:
                prepared = prepared._replace(call=call.at_site(call_site(sys._getframe(1))))
            if not async_op and self._progress.is_current():
                raise RingredError(
                    f"rank {self.rank}: {call.text}: called from a callback on the progress thread, which would wait "
                    "for itself; use async_op=True there"
                )
            if self.doings.current is not None and self._progress.idle():
                under_way = self.doings.now().text
                raise RingredError(
                    f"rank {self.rank}: {call.text}: called in the middle of {under_way}, from a signal handler?"
                )
            point = self.device.here()
            number = self._next(pair)
            if not async_op and self._progress.idle():
                held = None if self.device.queue is None else tensors.holding(holding)
                rest = self._run(prepared, number, sys._getframe(1), point=point, held=held)
                if rest is not None:
                    rest.wait(None)
                if identity is not None:
                    remember(self.recall, given, 0 if pair is None else self._count(pair).buffer_info()[0], identity)
                self._arm()
                return None
            site = call_site(sys._getframe(1))
            work: Work[None] = Work(f"rank {self.rank}: {prepared.call.numbered(number)} at {site}")

            def job(held: object = tensors.holding(holding)) -> None:
                work.rest = self._run(prepared, number, site, point=point, held=held, timed=True)

            if self.size == 1:  # nobody to wait for; and on a device the caller's stream orders it
                work.finish(job)
                return work
            self._started.append(work)
            self._progress.submit(lambda: work.finish(job))
            while self._started and self._started[0].is_completed() and self._started[0].exception() is None:
                self._started.popleft()
        if async_op:
            return work
        work.wait()
        return None

    def _arm(self) -> None:
        """Lets calls be recalled, while nothing else is under way. Another thread may say why not meanwhile."""
        self.recall.armed = True
        if self._failure is not None or self.closed or self._purpose or self._tracer or self.doings.current:
            self.recall.armed = False

    def rearm(self) -> None:
        """Lets calls be recalled again if all that was under way has ended; asynchronous calls leave that undone."""
        with self.order:
            if self._progress.idle():
                self._arm()

    def _resume(self, prepared: Prepared) -> None:
        """Goes on with a call that was recalled and did not end at once, which is the current one."""
        plan: Any = prepared.plan
        words, current = plan.tape.words, self.doings.current
        assert current is not None, "who recalled it has said so"
        began = words[Tape.DEADLINE] - self.timeout_ns if words[Tape.PLAYING] else None
        self._run(prepared, current[0], current[2], began)
        self._arm()

    def _abandon(self, prepared: Prepared, failure: BaseException) -> None:
        """Ends a call that was recalled, and that an exception kept from going on."""
        if self.doings.current is not None:
            assert self.transport.player is not None, "it was playing"
            plan: Any = prepared.plan
            self.transport.player.drop(plan.tape)
            self.abort(failure)
            self.doings.ended()

    def _next(self, pair: tuple[int, int] | None) -> int:
        """The number of a new call."""
        if pair is None:
            self.recall.number += 1
            return self.recall.number
        count = self._count(pair)
        count[0] += 1
        return count[0]

    def _count(self, pair: tuple[int, int]) -> array[int]:
        """The number of the last call between two ranks."""
        return self._pairs.setdefault(pair, array("q", [0]))

    def abort(self, cause: BaseException) -> None:
        """Tells every rank that this one failed with `cause` and takes no further part."""
        with self._failing:  # who raises lets tensors go, which the device may use until it is drained
            if self._failure is not None or self.closed:
                return
            self._failure = PeerFailed(f"rank {self.rank}: gave this communicator up after {cause!r}")
            self._told, self.recall.armed = True, False
            number, call, site = self.doings.now()
            what = f"{type(cause).__name__}: {cause}"[:1000]
            self.transport.abort(Report(self.rank, RAISED, -1, number, call, site, 0.0, 0.0, what).dump())
        for follow in self.followers:
            follow(cause)

    def rest_of_job(self, ready: Any, began: Any, made: object, job: object) -> Enqueued | None:
        """As `OnDevice.rest_of_job`, from now on."""
        return self.device.rest_of_job(ready, began, self._deadline(), made, job)

    def synchronize(self) -> None:
        """Returns once a device has done all that was started. Raises as the call that failed would."""
        for work in list(self._started):
            work.wait()
        self.device.finish()
        if self._failure is not None:
            self._told = True
            raise self._failure

    def close(self) -> None:
        """Finishes what is in flight and closes the transport. A second call does nothing.

        Raises `CollectiveMismatch` where this rank was done with a collective, and now hears that another rank called
        something else in its place.
        """
        with self.order, self._failing:  # what aborts has done so before
            if self.closed:
                return
            self.closed, self.recall.armed = True, False
        self._progress.close()
        self.device.close()
        mismatch: CollectiveMismatch | None = None
        if self._failure is None:
            with contextlib.suppress(Fault):  # it is no error of this rank if a peer no longer receives
                while self._outgoing:
                    self._wait_sent(self._outgoing.popleft())
            mismatch = self._settle()
        self.transport.close()
        for work in self._started:
            if work.failed_unheard():
                print(f"ringred: {work.exception()} (nobody waited for it)", file=sys.stderr, flush=True)
                break
        if self.tracer is not None:
            self.tracer.write()
        if mismatch is not None:
            raise mismatch
        late = [rest.failure for rest in self.device.failed if rest.failure is not None]
        if late and not self._told and not any(rest.heard for rest in self.device.failed):
            raise late[0]  # of a call that had returned; no later one has told of it

    def _settle(self) -> CollectiveMismatch | None:
        """Waits until the peers have received what this rank sent in its last collectives, if they may not have yet."""
        if not self.doings.left_others:
            return None
        began = time.monotonic()
        try:
            self.transport.settle(self._deadline())
        except Fault as fault:
            if fault.kind == FaultKind.TIMEOUT:  # the peer may still come, and finds what was sent to it
                return None
            error = self._diagnosed(fault, time.monotonic() - began)
            if isinstance(error, CollectiveMismatch):
                return error
        return None

    def _wait_sent(self, requests: Sequence[Request]) -> None:
        deadline = self._deadline()
        for request in requests:
            self.transport.wait(request, deadline)
        self.device.passed(deadline)

    def _refuse(self, call: Call) -> None:
        self._told = True
        where = f"rank {self.rank}: {call.text}"
        if self._failure is None:
            raise PeerFailed(f"{where}: this communicator is closed")
        raise type(self._failure)(
            f"{where}: this communicator is unusable since an earlier failure: {self._failure}"
        ) from self._failure

    def _run(
        self,
        prepared: Prepared,
        number: int,
        site: str | FrameType,
        began_ns: int | None = None,
        point: Any = None,
        held: object = None,
        timed: bool = False,
    ) -> Enqueued | None:
        """Runs a call; on a device, after `point`. Returns what the device has still to do, and if `timed`, where that
        began."""
        call, of_a_pair = prepared.call, prepared.pair is not None
        if self._failure is not None:
            self._refuse(call)
        self.doings.current = number, call, site, of_a_pair
        sent = self.transport.counters.bytes_sent if prepared.one_way else 0
        began = time.monotonic() if began_ns is None else began_ns / 1e9
        rest: Enqueued | None = None
        try:
            with self.device.following(point, timed) as begun:
                if prepared.fill or prepared.scaled is not None:
                    self.device.torch_follows(self._deadline())
                for target, source in prepared.fill:
                    target.copy_(source)
                self._play(prepared, contract(call.digest, number), -1 if of_a_pair else number)
                if prepared.back:
                    self.device.torch_follows(self._deadline())
                for target, source in prepared.back:
                    target.copy_(source)
            deadline = began + self.timeout_ns / 1e9
            rest = self.device.rest(point, begun, deadline, self.doings.now(), (prepared, held))
            if self._failure is not None:  # the watch has found an earlier call failed meanwhile
                self._refuse(call)
        except Fault as fault:
            failed = self._failed(fault, time.monotonic() - began, self.doings.now())
            self._told = True
            self.device.hold((prepared, held))
            raise failed from fault
        except RingredError:
            self.device.hold((prepared, held))
            raise
        except BaseException as failure:
            named = self.device.named(failure, self.doings.now())
            self.abort(named)
            self.device.hold((prepared, held))
            if named is not failure:
                raise named from failure
            raise
        else:
            self.doings.note(prepared, number, site, prepared.one_way and self.transport.counters.bytes_sent > sent)
            if self.tracer is not None:
                _, text, where = self.doings.now()
                self.tracer.span("collective", text, int(began * 1e9), time.monotonic_ns(), site=where)
        finally:
            self.doings.ended()
        return rest

    def _play(self, prepared: Prepared, contract: int, turn: int) -> None:
        plan = prepared.plan
        if type(plan) is Plan:
            if prepared.scaled is not None:
                assert plan.folder is not None, "only a reduction scales"
                plan.folder.scale_first(prepared.scaled)
            run(plan, self.transport, contract, turn, self.timeout_ns, self.tracer)
            return
        self.transport.begin(contract, turn)
        if isinstance(plan, Native):
            native: Any = self.transport
            native.native_all_reduce(plan.tensor, plan.op.value, self._deadline())
        elif isinstance(plan, Post):
            self._outgoing.append([self.transport.isend(plan.peer, part) for part in plan.parts])
            if len(self._outgoing) > _OUTGOING:
                self._wait_sent(self._outgoing.popleft())

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_ns / 1e9

    def _failed(self, fault: Fault, waited: float, doing: Doing) -> RingredError:
        """The exception for a fault, after which nothing can be called any more; of two threads' faults, the first."""
        with self._failing:
            if self._failure is not None:
                return self._failure
            failure = self._failure = self._diagnosed(fault, waited, doing)
            self.recall.armed = False
        for follow in self.followers:
            follow(failure)
        return failure

    def _diagnosed(self, fault: Fault, waited: float, doing: Doing | None = None) -> RingredError:
        """Publishes this rank's report, reads those of the other ranks and combines them into one exception."""
        number, call, site = doing or self.doings.now()
        if self.doings.left_others:
            # Peers fail in the first collective that they see differently; this rank may have left that one.
            patience = _SHORT_WAIT if fault.kind == FaultKind.MISMATCH else 0.0  # whoever sees it too says so at once
            said = self.transport.reports(patience).values()
            heard = [report for report in map(Report.load, said) if report is not None]
            number, call, site = self.doings.differed({report.number for report in heard}, doing)
        timeout = self.timeout_ns / 1e9
        mine = Report(self.rank, fault.kind, fault.peer, number, call, site, waited, timeout, fault.detail[:1000])
        self.transport.abort(mine.dump())
        loaded = {rank: Report.load(text) for rank, text in self.transport.reports(_REPORT_WAIT).items()}
        return diagnose(mine, {rank: report for rank, report in loaded.items() if report is not None}, self.size)
