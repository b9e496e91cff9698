"""What workers and servers of a parameter server say to each other: `wire` has how it lies in frames."""

from __future__ import annotations

from typing import Any, NamedTuple

from ringred.parameter_server.partition import Piece
from ringred.parameter_server.policies import Gradient

__all__ = [
    "CANCELLED",
    "COORDINATOR",
    "KINDS",
    "OVER",
    "PLAIN",
    "Applied",
    "Apply",
    "Attend",
    "Await",
    "Beat",
    "Bye",
    "Collect",
    "Commit",
    "Committed",
    "Create",
    "Created",
    "Declare",
    "Discard",
    "Done",
    "End",
    "Failed",
    "Held",
    "Hello",
    "Left",
    "Log",
    "Logged",
    "Meet",
    "Met",
    "Part",
    "Placed",
    "Pull",
    "Released",
    "Report",
    "Save",
    "Saved",
    "Scale",
    "Show",
    "State",
    "There",
    "Told",
    "Values",
    "Welcome",
    "Where",
    "Write",
    "Written",
]

COORDINATOR = 0
"""The machine that a message is for: the coordinator, or 1 + the number of a shard."""

# ---------------------------------------------------------------- to a server, and its answers


class Meet(NamedTuple):
    """Worker `worker`, in process `pid` of `place`, in its `life`-th life: a number that is another one each time it is
    started. Its window is there the open file `descriptor`."""

    worker: int
    life: int
    pid: int
    descriptor: int
    place: str


class Met(NamedTuple):
    """The server's process (0: of another place) and window, where in it the shard's head lies, how many shards there
    are, and which server has a copy of all that this one has. -1: no memory is shared, or nobody has a copy. `near` is
    the address of its `NearDoor`, if it has one for this worker."""

    pid: int
    descriptor: int
    head: int
    shards: int
    backup: int
    near: str


class Log(NamedTuple):
    """To the server that has a copy of `machine`: its `number`-th change, in frames (peer, message, the message's own).
    `answered` has for each shard the first of the coordinator's orders that is not answered yet."""

    machine: int
    number: int
    answered: tuple[int, ...]


class Logged(NamedTuple):
    """The copy has made the changes up to the `number`-th."""

    number: int


class End(NamedTuple):
    """To a server: nobody needs it any more."""


# ---------------------------------------------------------------- to the coordinator, and its answers


class Left(NamedTuple):
    """From the coordinator's own server: a life of a worker ended, `how`."""

    worker: int
    life: int
    how: str


class Hello(NamedTuple):
    """Worker `worker` is there, in its `life`-th life, and wants to work."""

    worker: int
    life: int


class Welcome(NamedTuple):
    """All workers are there: JSON with the policy, the number of workers and of shards, and the last of the worker's
    sequence numbers that counted (-1: none)."""

    text: str


class Declare(NamedTuple):
    """JSON: tensors by name, with shape and dtype, and how they are updated."""

    worker: int
    text: str


class Placed(NamedTuple):
    """Where the declared tensors lie. Piece `pieces[i]` has the number `numbers[i]`. `create` if the receiver is to
    give their values to the shards."""

    create: int
    numbers: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Created(NamedTuple):
    """To a coordinator: all shards have the values of the tensors that this worker declared."""

    worker: int


class Commit(NamedTuple):
    """All parts of the worker's `sequence`-th gradient are held; it was computed at parameters of `version`."""

    worker: int
    life: int
    sequence: int
    version: int


class Committed(NamedTuple):
    """The gradient counts, or was dropped because it came too late; a repeated commit changes nothing."""

    sequence: int


class Await(NamedTuple):
    """Asks for the release after the `number`-th again, in case it was lost."""

    worker: int
    life: int
    number: int


class Released(NamedTuple):
    """The worker's `number`-th release: it may take parameters of `version` or newer and start a mini-batch. `how` is
    one of the constants below."""

    version: int
    number: int
    how: int


PLAIN, CANCELLED, OVER = range(3)
"""How a worker is released: because it waits; although it computes, at an older version, what is not wanted any more;
for the last time, to take what the training came to."""


class Beat(NamedTuple):
    """The worker lives, and asks whether the server does."""

    worker: int
    life: int


class Bye(NamedTuple):
    """The worker leaves, `because` of an exception unless that is empty. If `last`, it wants no answer before all
    workers have left."""

    worker: int
    life: int
    last: int
    because: str


class Attend(NamedTuple):
    """Another process pushes and pulls as that worker; `life` is its own. It is answered once all have left."""

    worker: int
    life: int


class Scale(NamedTuple):
    """From the next update on, the rates are those of the rule times `rate`."""

    rate: float


class Save(NamedTuple):
    """Asks for a snapshot in a folder that all servers see."""

    folder: str


class Saved(NamedTuple):
    """There is a snapshot of `version`; -1: a server died meanwhile, and it has to be asked for again."""

    version: int


class Collect(NamedTuple):
    """Asks all shards for their states at one version, as the answers to these requests of theirs; the answer is the
    coordinator's own."""

    requests: tuple[int, ...]


class Report(NamedTuple):
    """Asks for the figures so far, which come as JSON in `Told`."""


class Told(NamedTuple):
    """JSON."""

    text: str


# ---------------------------------------------------------------- to a shard, and its answers


class Create(NamedTuple):
    """JSON: pieces by number, with elements and dtype, and the rule that updates them; a frame of values for each."""

    text: str


class Part(NamedTuple):
    """Pieces of the worker's `sequence`-th gradient, encoded in the way `encoding`: a frame for each, or at `offsets`
    of the worker's window."""

    worker: int
    life: int
    sequence: int
    encoding: int
    pieces: tuple[int, ...]
    offsets: tuple[int, ...]


class Held(NamedTuple):
    """The shard has the part."""

    sequence: int


class Pull(NamedTuple):
    """Asks for pieces of `version` or newer; none: only to be told when that version is there."""

    version: int
    pieces: tuple[int, ...]


class Where(NamedTuple):
    """Asks where in the server's window pieces lie."""

    pieces: tuple[int, ...]


class There(NamedTuple):
    """At these places; -1: not in memory that is shared."""

    offsets: tuple[int, ...]


class Values(NamedTuple):
    """Pieces of `version`, a frame for each."""

    version: int


class Apply(NamedTuple):
    """Make these gradients, each times its weight, one update that leads to `version`, with the rate times `rate`."""

    version: int
    rate: float
    gradients: tuple[Gradient, ...]
    weights: tuple[float, ...]
    dropped: tuple[Gradient, ...]


class Applied(NamedTuple):
    """The shard is at `version`."""

    version: int


class Discard(NamedTuple):
    """These gradients are not used."""

    dropped: tuple[Gradient, ...]


class State(NamedTuple):
    """All of a shard, or of the coordinator: JSON, and a frame for each tensor. To one of them: it takes this state."""

    text: str


class Show(NamedTuple):
    """Give worker `peer` the state at `version`, as the answer to its request."""

    version: int
    peer: str
    request: int


class Write(NamedTuple):
    """Write the state at `version` to the snapshot of that name in `folder`."""

    version: int
    folder: str
    snapshot: str


class Written(NamedTuple):
    """The state of a shard is on disk; or why it is not."""

    shard: int
    failure: str


class Done(NamedTuple):
    """What was asked has been done."""


class Failed(NamedTuple):
    """What was asked cannot be done: the name of an exception of `ringred.errors`, and its text."""

    error: str
    text: str


# ---------------------------------------------------------------- all of them

KINDS: tuple[type[Any], ...] = (
    *(Meet, Met, Log, Logged, Left, Hello, Welcome, Declare, Placed, Created, Commit, Committed),
    *(Await, Released, Beat, Bye, Attend, Scale, Save, Saved, Collect, Report, Told),
    *(Create, Part, Held, Pull, Where, There, Values, Apply, Applied, Discard),
    *(State, Show, Write, Written, End, Done, Failed),
)
"""In the order of their numbers on the wire."""
