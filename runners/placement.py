"""Which job starts next, and where: plain data in, plain data out, so that a simulation decides as a run does."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.job import is_gpu_type


@dataclass(frozen=True)
class Node:
    """A machine of a cluster."""

    name: str
    cpus: int
    gpus: int = 0
    gpu_type: str | None = None  # as Ray names it; where it has several names: "A100, A100-40G"


@dataclass(frozen=True)
class Needs:
    """What a job takes, and for how long (an estimate)."""

    cpus: int = 1  # of each process
    gpus: float = 0.0  # of each process: none, a share of a device (below 1), or a device
    processes: int = 1  # one group, that starts together: on one node where one has the GPUs, else on several
    gpu_type: str | None = None
    alone: bool = False  # all CPUs of a node
    first: bool = False  # before all others
    seconds: float = 1.0

    @property
    def device_seconds(self) -> float:
        """GPU seconds where it takes any, else CPU seconds."""
        return self.seconds * self.processes * (self.gpus or self.cpus)


@dataclass(frozen=True)
class Share:
    """What a job gets on one node."""

    node: str
    processes: int
    cpus: float
    gpus: float


Placement = tuple[Share, ...]  # one share on each node; the first process of the group is in the first


@dataclass
class _Room:
    """What is free on a node."""

    node: Node
    cpus: float = 0.0
    devices: list[float] = field(default_factory=list)  # the free share of each GPU

    def __post_init__(self) -> None:
        self.cpus, self.devices = float(self.node.cpus), [1.0] * self.node.gpus

    @property
    def idle(self) -> bool:
        return self.cpus == self.node.cpus

    def processes(self, needs: Needs) -> int:
        """How many processes of the job could start here: on CPUs all of a group or none."""
        if not _right_type(needs, self.node) or self.cpus < self._cpus(needs):
            return 0
        if not needs.gpus:
            return needs.processes
        return min(needs.processes, sum(free >= needs.gpus for free in self.devices))

    def _cpus(self, needs: Needs) -> float:
        """CPUs that the job takes here: a node with fewer does what it can, and no GPU idles for want of CPUs."""
        if needs.alone:
            return self.node.cpus
        if not needs.gpus:
            return min(needs.cpus * needs.processes, self.node.cpus)
        share = self.node.cpus / max(self.node.gpus, 1) * needs.gpus
        return min(needs.cpus, math.floor(share * 1000) / 1000)  # rounded up, the last GPU's share would not be there

    def share(self, needs: Needs, processes: int) -> Share:
        cpus = self._cpus(needs) * (processes if needs.gpus else 1)
        return Share(self.node.name, processes, min(cpus, self.cpus), needs.gpus * processes)

    def take(self, share: Share) -> list[int]:
        """Takes it, and returns the devices: for a share of one the fullest that has room, as Ray does."""
        self.cpus = round(self.cpus - share.cpus, 3)
        each = share.gpus / share.processes
        taken = sorted((i for i, free in enumerate(self.devices) if free >= each), key=lambda i: self.devices[i])
        taken = taken[: share.processes] if each else []
        for index in taken:
            self.devices[index] = round(self.devices[index] - each, 6)
        return taken

    def give(self, share: Share, devices: Iterable[int]) -> None:
        self.cpus = round(self.cpus + share.cpus, 3)
        for index in devices:
            self.devices[index] = round(self.devices[index] + share.gpus / share.processes, 6)


class Schedule:
    """Starts the most urgent job that is ready: one that is marked so, then what begins the longest chain.

    Where the most urgent one finds no room, a node (for a group, as many as it takes) is kept for it until there is, so
    that large groups are not kept waiting by small jobs for ever. A group gets all its places at once or none.
    """

    def __init__(self, needs: Mapping[str, Needs], depends_on: Mapping[str, Sequence[str]], nodes: Iterable[Node]):
        """`needs` and `depends_on` by job, those that others depend on first."""
        self.needs = needs
        self.rooms = {node.name: _Room(node) for node in nodes}
        self.running: dict[str, tuple[Placement, list[list[int]]]] = {}
        self.avoided: dict[str, set[str]] = {}
        chains = _chains(needs, depends_on)
        order = sorted(needs, key=lambda key: (not needs[key].first, -chains[key]))
        self._rank = {key: place for place, key in enumerate(order)}

    def start(self, ready: Iterable[str], closed: Iterable[str] = ()) -> list[tuple[str, Placement]]:
        """The jobs among `ready` that begin now, and where; they hold their places until `end`.

        On the nodes in `closed` none does.
        """
        closed = set(closed)
        started = []
        kept: set[str] = set()
        refused: set[tuple] = set()
        for key in sorted(ready, key=self._rank.__getitem__):
            needs = self.needs[key]
            kind = (needs.cpus, needs.gpus, needs.processes, needs.gpu_type, needs.alone)
            if kind in refused:
                continue
            rooms = [room for name, room in self.rooms.items() if name not in kept and name not in closed]
            placement, avoided = None, self.avoided.get(key)
            if avoided:
                placement = _place(needs, [r for r in rooms if r.node.name not in avoided], self.rooms.values())
            placement = placement or _place(needs, rooms, self.rooms.values())
            if placement is None:
                if not refused:
                    kept = self._keep(needs)
                refused.add(kind)
                continue
            self.running[key] = (placement, [self.rooms[share.node].take(share) for share in placement])
            started.append((key, placement))
        return started

    def end(self, key: str) -> None:
        """The job has ended, however: its places are free."""
        for share, devices in zip(*self.running.pop(key), strict=True):
            if share.node in self.rooms:
                self.rooms[share.node].give(share, devices)

    def avoid(self, key: str, nodes: Iterable[str]) -> None:
        """The job is to start elsewhere, where there is room when it starts."""
        self.avoided.setdefault(key, set()).update(nodes)

    def update(self, nodes: Iterable[Node]) -> set[str]:
        """The cluster has these nodes now; returns the running jobs that were on one that is gone."""
        nodes = {node.name: node for node in nodes}
        self.rooms = {name: self.rooms.get(name) or _Room(node) for name, node in nodes.items()}
        return {key for key, (placed, _) in self.running.items() if any(s.node not in nodes for s in placed)}

    def has(self, nodes: Iterable[str]) -> bool:
        """Whether the cluster has all of these nodes."""
        return set(nodes) <= self.rooms.keys()

    def problem(self, key: str) -> str | None:
        """Why the cluster could never run the job, however empty; None where it can."""
        return problem(self.needs[key], [room.node for room in self.rooms.values()])

    def _keep(self, needs: Needs) -> set[str]:
        """The nodes that will be the first to have room for the job."""
        free = sorted(self.rooms.values(), key=lambda room: (sum(room.devices), room.cpus), reverse=True)
        empty = [_Room(room.node) for room in free]
        placement = _place(needs, empty, empty, first=True)
        return {share.node for share in placement or ()}


def _right_type(needs: Needs, node: Node) -> bool:
    return needs.gpu_type is None or is_gpu_type(needs.gpu_type, node.gpu_type or "")


def problem(needs: Needs, nodes: Sequence[Node]) -> str | None:
    """Why these nodes could never run a job, however empty; None where they can."""
    empty = [_Room(node) for node in nodes]
    if _place(needs, empty, empty) is not None:
        return None
    if not needs.gpus:
        return "needs CPUs, and the cluster has no node with any"
    kind = f" of the type {needs.gpu_type}" if needs.gpu_type else ""
    there = sum(node.gpus for node in nodes if _right_type(needs, node))
    has = f"{there} of that type" if needs.gpu_type and there else f"{sum(node.gpus for node in nodes) or 'none'}"
    types = sorted({node.gpu_type for node in nodes if node.gpu_type})
    others = f" ({', '.join(types)})" if types and not (needs.gpu_type and there) else ""
    several = needs.processes * needs.gpus > 1
    return f"needs {needs.processes if several else 'a'} GPU{'s' * several}{kind}, and the cluster has {has}{others}"


def _place(needs: Needs, rooms: Sequence[_Room], all_rooms: Iterable[_Room], first: bool = False) -> Placement | None:
    """Where in `rooms` the job can start now; `first`: in the first that has room rather than the best."""
    all_rooms = list(all_rooms)
    if needs.alone:
        timers = _for_timings([room.node for room in all_rooms])
        able = [room for room in rooms if room.idle and room.node in timers]
        return (able[0].share(needs, 1),) if able else None
    able = [room for room in rooms if room.processes(needs) == needs.processes]
    if able:
        # GPU jobs close together, so that whole nodes stay free for groups; CPU jobs far apart.
        best = able[0] if first else min(able, key=lambda room: (sum(room.devices), -room.cpus))
        return (best.share(needs, needs.processes),)
    if not needs.gpus or any(_Room(room.node).processes(needs) == needs.processes for room in all_rooms):
        return None  # one node will have room
    left, shares = needs.processes, []
    for room in sorted(rooms, key=lambda room: room.processes(needs), reverse=True):
        if here := min(left, room.processes(needs)):
            shares.append(room.share(needs, here))
            left -= here
    return None if left else tuple(shares)


def _for_timings(nodes: Sequence[Node]) -> list[Node]:
    """Always of the same kind, so that times on CPUs can be compared: the widest without GPUs, if there are such."""
    plain = [node for node in nodes if not node.gpus] or nodes
    widest = max((node.cpus for node in plain), default=0)
    return [node for node in plain if node.cpus == widest]


def _chains(needs: Mapping[str, Needs], depends_on: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Seconds from each job's start to the end of the longest chain of jobs that begins with it."""
    after = dict.fromkeys(needs, 0.0)
    for key in reversed(list(needs)):
        after[key] += needs[key].seconds
        for before in depends_on[key]:
            if before in after:
                after[before] = max(after[before], after[key])
    return after


@dataclass(frozen=True)
class Timeline:
    """What a simulation found. Times are in seconds from the start."""

    spans: dict[str, tuple[float, float, Placement]]  # job -> start, end, places
    lower_bound: float  # no schedule is shorter: all the work on all devices, or the longest chain

    @property
    def makespan(self) -> float:
        return max((end for _, end, _ in self.spans.values()), default=0.0)


def simulate(needs: Mapping[str, Needs], depends_on: Mapping[str, Sequence[str]], nodes: Sequence[Node]) -> Timeline:
    """Runs the jobs on paper, each for its estimated seconds. What `nodes` could never run is left out."""
    schedule = Schedule(needs, depends_on, nodes)
    waits = {key: {before for before in depends_on[key] if before in needs} for key in needs}
    following: dict[str, list[str]] = {key: [] for key in needs}
    for key, before in waits.items():
        for each in before:
            following[each].append(key)
    ready = {key for key, before in waits.items() if not before}
    spans: dict[str, tuple[float, float, Placement]] = {}
    ends: list[tuple[float, str]] = []
    now = 0.0
    while True:
        for key, placement in schedule.start(ready):
            ready.discard(key)
            spans[key] = (now, now + needs[key].seconds, placement)
            heapq.heappush(ends, (spans[key][1], key))
        if not ends:
            break
        now = ends[0][0]
        while ends and ends[0][0] <= now:
            _, key = heapq.heappop(ends)
            schedule.end(key)
            for each in following[key]:
                waits[each].discard(key)
                if not waits[each]:
                    ready.add(each)
    done = {key: each for key, each in needs.items() if key in spans}
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    timers = _for_timings(nodes)
    bounds = [
        sum(each.device_seconds for each in done.values() if each.gpus) / max(gpus, 1),
        sum(each.device_seconds for each in done.values() if not each.gpus and not each.alone) / max(cpus, 1),
        sum(each.seconds for each in done.values() if each.alone) / max(len(timers), 1),
        *_chains(done, depends_on).values(),
    ]
    return Timeline(spans, max(bounds))
