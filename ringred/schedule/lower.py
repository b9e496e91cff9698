"""Translates (lowers) one rank's schedule and a buffer's unit boundaries into the instructions that run it.

It handles only integers: the executor binds the instructions to memory, and the cost model predicts their time.
Messages are divided into segments, so that the fold of one segment overlaps the arrival of the next. The order of the
instructions is fixed here, so that nothing has to be decided at run time:

- data of many segments is processed part by part, each part one step ahead of the next, so that the result of a step
  is sent on while it is still in the cache;
- receives are waited for in this order; if the receives of a step come from different peers, their segments alternate,
  so that no receive waits for all segments of another;
- a segment is sent as soon as the last receive that wrote it is done, even if that is several steps early, but
  segments to the same peer stay in order;
- a receive that overwrites memory waits only for the sends that still read that memory;
- a chunk that is sent and received in one step is copied to a slot (temporary memory) and sent from there; over a
  transport that buffers, it is sent directly instead, and overwritten once the transport has copied it;
- receives are posted in advance, as early as their destination is free, and, where messages take long, before sends;
- a rank that turns from one sender to another tells it so (`order.turns`), over a transport that is slower than memory:
  data that came before its step would share the way with what is needed first, and who is late would fall further
  behind;
- in a step in which a rank only sends, its receivers have little to do, so the work is shared: every second segment to
  a receiver may be put (written by the sender), and the receiver fetches the others;
- at the end every send is waited for, so that the caller may write to the buffer again.

There is no deadlock: a segment depends only on segments of the same part, in steps on which its own step depends. The
verifier proves that there is an order in which all steps can finish. All ranks go through steps and parts in one order
that keeps the steps of each part in sequence, and the instructions can run in any such order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from ringred.schedule.ir import Chunk, Recv, Send, Step, fold_groups, is_final, last_writes
from ringred.schedule.program import Fold, Instruction, PostReceive, PostSend, Program, Snapshot, Take, WaitSent

__all__ = ["lower"]

# How many folds in advance a lending receive is posted; each one holds staging memory in the transport.
LEND_AHEAD = 2
# The same for receives that replace data in the buffer; these hold nothing but a request.
REPLACE_AHEAD = 16
# The part of a segment from which on a message is worth the word that it may be sent. Between 8 hosts of 250 Mbit/s,
# with TCP's BBR, halving-doubling's 1 MiB took 64 to 128 ms without words, 69 to 91 with them from 256 KiB on; less was
# not tried.
TOLD_PART = 1 / 4


class _Span(NamedTuple):
    """Elements `lo:hi` that are written or read at event `at`, by request `request` if there is one (else −1)."""

    lo: int
    hi: int
    at: int
    request: int
    peer: int


class _Receives(NamedTuple):
    """All receives of one chunk in one step: a fold of several peers, or one replacement."""

    chunk: Chunk
    reduce: bool
    peers: list[int]
    segments: list[tuple[int, int]]


def lower(
    rank: int,
    steps: Iterable[Step],
    bounds: Sequence[tuple[int, int]],
    segment: int,
    *,
    keep: Callable[[int], bool] = lambda unit: True,
    put_safe: Callable[[int, int], bool] = lambda step, op: False,
    merge: bool = True,
    in_parts: bool = False,
    snapshots: bool = True,
    buffers: bool = False,
    depth: int = 1,
    turns: Container[tuple[int, int, int]] = (),
) -> Program:
    """The program of `rank`.

    `bounds[u]` are the elements (lo, hi) of unit `u`, in an address space that all ranks share; `segment` is
    the greatest number of elements in one message; `keep(u)` says whether the rank must hold unit `u` at the
    end. `put_safe(step, op)` says which sends may be puts.
    Adjacent units are sent in one message; with `merge=False` each unit is its own message, for units that are
    separate tensors. With `in_parts=True` a step of many segments need not finish before the next step starts; this is
    for schedules that are `order.in_step`, if all ranks know the same `bounds`.
    `depth` is how many parts a step may be ahead, and how early receives are posted: more than one for a transport on
    whose way much is under way at once, where a receive that is posted late holds its sender up; so it is posted before
    the sends of its moment, if these wait for nothing.
    `turns` are the messages whose sender is to wait for its receiver's word, if they are long; steps then run one after
    the other.
    `snapshots=False` omits the slots and gives wrong results; it exists for the test that shows this. `buffers=True`
    also omits them, for a transport that can buffer at least one segment between any two ranks. That cannot deadlock:
    a segment then waits for room, room becomes free with the receiver's folds of earlier segments, and these wait
    for nothing that is sent later.
    """
    lowering = _Lowering(rank, [tuple(step) for step in steps], bounds, segment, keep, merge, in_parts, depth)
    lowering.put_safe = put_safe
    lowering.buffers, lowering.turns = buffers, turns
    return lowering.run(snapshots)


class _Lowering:
    """State of one lowering. Event `e` is the moment before the `e`-th fold or take; sends and receives are posted at
    events."""

    put_safe: Callable[[int, int], bool]
    buffers: bool
    turns: Container[tuple[int, int, int]]

    def __init__(
        self,
        rank: int,
        steps: list[Step],
        bounds: Sequence[tuple[int, int]],
        segment: int,
        keep: Callable[[int], bool],
        merge: bool,
        in_parts: bool,
        depth: int,
    ) -> None:
        self.rank, self.steps, self.bounds, self.segment, self.keep = rank, steps, bounds, segment, keep
        self.merge, self.in_parts, self.depth = merge, in_parts, depth
        longest = max((hi - lo for lo, hi in bounds), default=0)
        self.parts = -(-longest // segment) if in_parts and longest else 1
        self.events = 0
        self.requests = 0
        self.slot_elements = 0
        self.sends: dict[int, list[Instruction]] = defaultdict(list)
        self.posts: dict[int, list[Instruction]] = defaultdict(list)
        self.arrivals: list[list[Instruction]] = []
        self.written: dict[int, list[_Span]] = defaultdict(list)
        self.read: dict[int, list[_Span]] = defaultdict(list)
        self.waited: dict[int, int] = {}  # send request -> the first event at which it is known to be done
        self.step_over: list[int] = []  # by request: the first event after the step and part that it belongs to
        self.last_send: dict[int, int] = defaultdict(int)
        self.words: dict[int, Take] = {}  # by peer: the word that the next send waits for
        self.last_request: dict[int, tuple[int, int]] = {}  # by peer: step and request of the last send
        self.last_post: dict[int, int] = defaultdict(int)
        self.last_write = last_writes(steps)

    def run(self, snapshots: bool) -> Program:
        overwritten = [{u for op in step if not isinstance(op, Send) for u in op.chunk.units} for step in self.steps]
        slots: list[dict[tuple[int, int], int]] = [{} for _ in self.steps]
        one_way = [all(isinstance(op, Send) for op in step) for step in self.steps]
        every_second: dict[int, Iterator[int]] = defaultdict(count)
        for index, part in self.order():
            step = self.steps[index]
            if part == 0 and self.turns:
                self.clear_to_send(index)
            for at, op in enumerate(step):
                if isinstance(op, Send):
                    exposed = not overwritten[index].isdisjoint(op.chunk.units)
                    for lo, hi in self.segments(op.chunk, part):
                        if exposed and self.buffers:
                            self.post_send(index, op.peer, op.chunk, lo, hi, buffered=True)
                        elif exposed and snapshots:
                            slot = self.snapshot(op.chunk, lo, hi, slots[index])
                            self.post_send(index, op.peer, op.chunk, lo, hi, slot=slot)
                        else:
                            put = self.put_safe(index, at) and not (one_way[index] and next(every_second[op.peer]) % 2)
                            self.post_send(index, op.peer, op.chunk, lo, hi, put=put, exposed=exposed)
            for receives, lo, hi in self.in_turn(step, part):
                self.receive(index, receives, lo, hi)
            self.step_over += [self.events] * (self.requests - len(self.step_over))
        instructions: list[Instruction] = []
        for event in range(self.events + 1):
            instructions += self.posted_at(event)
            if event < self.events:
                instructions += self.arrivals[event]
        for posted in [op for op in instructions if isinstance(op, PostSend) and op.request not in self.waited]:
            instructions.append(WaitSent(posted.request, posted.peer))
        return Program(tuple(instructions), self.requests, self.slot_elements)

    def posted_at(self, event: int) -> list[Instruction]:
        """What is posted at an event, sends first: their data is in the cache. Where messages take long, and only sends
        and receives are there, receives are first, since a peer may not send before it knows of them."""
        sends, posts = self.sends.get(event, []), self.posts.get(event, [])
        first = self.depth > 1 and all(isinstance(op, PostSend) and not op.buffered for op in sends)
        return posts + sends if first and not any(isinstance(op, WaitSent) for op in posts) else sends + posts

    def order(self) -> Iterable[tuple[int, int]]:
        """Steps and parts in the order in which they run. With a depth of one: (0, 0), (0, 1), (1, 0), (0, 2), (1, 1),
        (2, 0), ... Step by step if there are turns.

        A part consists of one segment of every unit. Steps never mix different elements, so the parts are independent
        of each other, and a part may be a step ahead of the part that follows it by the depth.
        """
        steps, depth = len(self.steps), self.parts if self.turns else self.depth
        for wave in range((steps - 1) * depth + self.parts):
            first = max(0, -(-(wave - self.parts + 1) // depth))
            for index in range(first, min(steps, wave // depth + 1)):
                yield index, wave - depth * index

    def segments(self, chunk: Chunk, part: int) -> list[tuple[int, int]]:
        """The segments of `chunk` in `part`. If there is only one part, these are all segments of the chunk: at least
        one, even if it is empty."""
        if self.parts > 1:
            bounds = (self.bounds[u] for u in chunk.units)
            cut = [(lo + part * self.segment, min(lo + (part + 1) * self.segment, hi)) for lo, hi in bounds]
            return [(lo, hi) for lo, hi in cut if lo < hi]
        runs: list[tuple[int, int]] = []
        for u in chunk.units:
            lo, hi = self.bounds[u]
            if lo == hi:
                continue
            if self.merge and runs and runs[-1][1] == lo:
                runs[-1] = (runs[-1][0], hi)
            else:
                runs.append((lo, hi))
        runs = runs or [self.bounds[chunk.start]]
        return [
            (start, min(start + self.segment, hi))
            for lo, hi in runs
            for start in range(lo, max(hi, lo + 1), self.segment)
        ]

    def spans(self, table: dict[int, list[_Span]], chunk: Chunk, lo: int, hi: int) -> Iterable[_Span]:
        for u in chunk.units:
            for span in table.get(u, ()):
                if span.lo < hi and lo < span.hi:
                    yield span

    def ready(self, chunk: Chunk, lo: int, hi: int) -> int:
        """The first event at which all writes of the earlier steps to `lo:hi` are done."""
        return max((span.at for span in self.spans(self.written, chunk, lo, hi)), default=0)

    def snapshot(self, chunk: Chunk, lo: int, hi: int, slots: dict[tuple[int, int], int]) -> int:
        """The slot element that holds a copy of `lo:hi`: one copy for all sends of a step."""
        if (lo, hi) not in slots:
            slots[lo, hi] = self.slot_elements
            at = self.ready(chunk, lo, hi)
            self.sends[at].append(Snapshot(lo, hi, self.slot_elements))
            self.note(self.read, chunk, _Span(lo, hi, at, -1, -1))
            self.slot_elements += hi - lo
        return slots[lo, hi]

    def post_send(
        self,
        step: int,
        peer: int,
        chunk: Chunk,
        lo: int,
        hi: int,
        slot: int | None = None,
        put: bool = False,
        exposed: bool = False,
        buffered: bool = False,
    ) -> None:
        at = max(self.ready(chunk, lo, hi), self.last_send[peer])
        at = self.last_send[peer] = self.after_others(step, peer, at)
        self.last_request[peer] = step, self.requests
        if peer in self.words:
            self.sends[at].append(self.words.pop(peer))
        self.sends[at].append(PostSend(self.requests, peer, lo, hi, slot, put, buffered, step))
        if slot is None and not exposed:
            self.note(self.read, chunk, _Span(lo, hi, at, self.requests, peer))
        self.requests += 1

    def after_others(self, step: int, peer: int, at: int) -> int:
        """The first event from `at` on at which the sends of earlier steps to other peers may be waited for; they are
        waited for there. Where messages take long, those would share the way with a send that is not needed yet, and
        hold up a peer that this rank itself waits for next."""
        if not self.in_parts or self.depth == 1:
            return at
        earlier = [
            (other, request)
            for other, (then, request) in self.last_request.items()
            if other != peer and then < step and request not in self.waited and request < len(self.step_over)
        ]
        at = max([at, *(self.step_over[request] for _, request in earlier)])
        for other, request in earlier:
            self.waited[request] = at
            self.sends[at].append(WaitSent(request, other))
        return at

    def clear_to_send(self, index: int) -> None:
        """Tells those whose turn to send to this rank comes in step `index` that the step has begun here; the first
        sends to others wait for their words. Ranks cannot wait for one another: a word depends on nothing but receives,
        words and sends of earlier steps."""
        lo, now = self.bounds[0][0], self.events
        for peer in self.turning(index, Recv):
            self.sends[now].append(PostSend(self.requests, peer, lo, lo, None, False, False, index))
            self.last_send[peer] = now
            self.requests += 1
        for peer in self.turning(index, Send):
            post = PostReceive(self.requests, peer, lo, lo, False, index)
            posted = self.last_post[peer]
            (self.posts[posted] if posted < now else self.sends[now]).append(post)
            self.words[peer] = Take(self.requests, peer, lo, lo, index)
            self.last_send[peer] = now
            self.requests += 1

    def turning(self, index: int, kind: type[Send] | type[Recv]) -> list[int]:
        """The peers of sends or receives in step `index` that are `turns`, and long."""
        elements: dict[int, int] = defaultdict(int)
        for op in self.steps[index]:
            if isinstance(op, kind):
                elements[op.peer] += sum(self.bounds[u][1] - self.bounds[u][0] for u in op.chunk.units)
        least = TOLD_PART * self.segment
        return [
            peer
            for peer, several in elements.items()
            if several >= least
            and ((index, self.rank, peer) if kind is Send else (index, peer, self.rank)) in self.turns
        ]

    def note(self, table: dict[int, list[_Span]], chunk: Chunk, span: _Span) -> None:
        """Adds `span` to the table entry of every unit that it overlaps, limited to that unit's elements."""
        for u in chunk.units:
            lo, hi = self.bounds[u]
            if lo < span.hi and span.lo < hi:
                table[u].append(span._replace(lo=max(lo, span.lo), hi=min(hi, span.hi)))

    def in_turn(self, step: Step, part: int) -> Iterable[tuple[_Receives, int, int]]:
        """The segments of all receives of a step and part: alternating if no two receives share a peer, else one
        receive after another."""
        all_receives = [
            _Receives(chunk, reduce, peers, self.segments(chunk, part)) for chunk, reduce, peers in fold_groups(step)
        ]
        peers = [peer for receives in all_receives for peer in receives.peers]
        if len(peers) > len(set(peers)):
            return [(receives, lo, hi) for receives in all_receives for lo, hi in receives.segments]
        longest = max((len(receives.segments) for receives in all_receives), default=0)
        return [
            (receives, *receives.segments[at])
            for at in range(longest)
            for receives in all_receives
            if at < len(receives.segments)
        ]

    def receive(self, step: int, receives: _Receives, lo: int, hi: int) -> None:
        event = self.events
        chunk = receives.chunk
        pending = {
            span.request: span.peer
            for span in self.spans(self.read, chunk, lo, hi)
            if span.request >= 0 and span.request not in self.waited
        }
        # Where messages take long, a send is waited for early, so that the receive is posted when its data comes. After
        # its own step and part that cannot deadlock where messages are received in the step in which they are sent:
        # what its receiver waits for has been sent by then, or by a rank that waits for a send of an earlier step.
        over = [self.step_over[request] if request < len(self.step_over) else event + 1 for request in pending]
        early = self.in_parts and self.depth > 1 and not receives.reduce and max(over, default=event + 1) <= event
        wait_at = event + 1
        if early:
            wait_at = max([0, event - REPLACE_AHEAD, *over, *(self.last_post[peer] for peer in receives.peers)])
        self.waited.update(dict.fromkeys(pending, wait_at))
        waits: list[Instruction] = [WaitSent(request, peer) for request, peer in pending.items()]
        arrival: list[Instruction] = [] if early else waits
        held_back = False
        if receives.reduce:
            earliest = max(0, event - max(LEND_AHEAD, self.depth))
        else:
            touched = [span.at for span in self.spans(self.written, chunk, lo, hi)]
            for span in self.spans(self.read, chunk, lo, hi):
                touched.append(self.waited.get(span.request, span.at))
            # A send that this arrival itself waits for is only done after that wait, so the receive is posted then.
            held_back = max(touched, default=0) > event
            earliest = max([0, event - REPLACE_AHEAD, *touched])
        if early:
            self.posts[wait_at] += waits
        first = self.requests
        for peer in receives.peers:
            post = PostReceive(self.requests, peer, lo, hi, receives.reduce, step)
            if held_back:
                arrival.append(post)
                self.last_post[peer] = event + 1
            else:
                posted = self.last_post[peer] = max(earliest, self.last_post[peer])
                self.posts[posted].append(post)
            self.requests += 1
        if receives.reduce:
            own = sum(peer < self.rank for peer in receives.peers)
            final = is_final(chunk, step, self.last_write, self.keep)
            requests = tuple(range(first, self.requests))
            arrival.append(Fold(requests, tuple(receives.peers), own, lo, hi, final, step))
        else:
            arrival.append(Take(first, receives.peers[0], lo, hi, step))
        self.arrivals.append(arrival)
        self.events += 1
        for table in (self.written, self.read):
            for u in chunk.units:
                table[u] = [span for span in table[u] if not (lo <= span.lo and span.hi <= hi)]
        self.note(self.written, chunk, _Span(lo, hi, self.events, first, -1))
