"""Jobs as Ray tasks, on this machine or on a cluster: `runners.placement` decides which starts where, Ray runs it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
from rich.console import Console

from benchmarks.errors import InputError, WorkerLost
from benchmarks.job import Job
from results.record import Record
from runners.config import Cluster
from runners.estimate import needs
from runners.execute import FULL, NOT_SHARED, Workplace, make_record, run_job
from runners.executors import Done, Queue, Tell, Tries, outline, silent, tell_nobody
from runners.placement import Node, Placement, Schedule

SECONDS_FOR_NODES = 60.0  # that jobs wait for a node that was lost, before they are blocked
SECONDS_FOR_HEAD = 40.0  # that a cluster's head may be out of reach; after 60 Ray ends the process, in its own words
SECONDS_FOR_OWN_HEAD = 5.0  # the same on this machine, where nothing but its end puts it out of reach


class NeverBegan(WorkerLost):
    """Ray could not start a task where it was sent: the node was lost meanwhile."""


@dataclass
class _Running:
    job: Job
    nodes: set[str]
    group: Any = None  # Ray's placement group, of a job on several nodes


class Ray:
    """Jobs as Ray tasks, each on the nodes that a `Schedule` chose.

    A job whose worker died (killed, out of memory, its node lost), or that met a full disk, is placed anew as `Tries`
    says, and goes on from its last checkpoint; after a full disk on another node, if one has room. A group that no node
    has the GPUs for gets a placement group of Ray's, which is there as a whole or not at all. Ray's token
    authentication stays on, its dashboard off; nothing is reported home.
    """

    def __init__(
        self,
        workplace: Workplace,
        finished: Mapping[str, Record],
        cluster: Cluster,
        macs: Mapping[str, float],
        slots: int,
    ):
        """`macs` as `estimate.known_macs` has them; `slots`: jobs side by side, on a local cluster its CPUs."""
        self.workplace = workplace
        self.finished = finished
        self.cluster = cluster
        self.macs = macs
        self.slots = slots

    def run(self, jobs: Sequence[Job], done: Done, tell: Tell = tell_nobody) -> None:
        with connected(self.cluster, self.slots):
            import ray

            self._task = ray.remote(run_job)  # once: Ray sends and keeps each of these
            nodes = alive_nodes()
            asked = {job.key: needs(job, self.macs, nodes) for job in jobs}
            schedule = Schedule(asked, {job.key: job.depends_on for job in jobs}, nodes)
            queue, tries = Queue(jobs, self.finished), Tries(self.workplace, tell)
            running: dict[Any, _Running] = {}
            pauses: dict[str, float] = {}  # until when each job that met a full disk waits
            closed: dict[str, float] = {}  # and each node where one did
            looked = waited = time.monotonic()
            while queue.waiting or running:
                for record in queue.hopeless():
                    done(record, [])
                ready = queue.ready()
                pauses, closed = _still(pauses), _still(closed)
                for key, placement in schedule.start((job.key for job in ready if job.key not in pauses), closed):
                    reference, started = self._start(queue.waiting.pop(key), placement)
                    running[reference] = started
                if running:
                    waited = time.monotonic()
                    found, _ = ray.wait(list(running), timeout=1.0)
                    found = found and ray.wait(list(running), num_returns=len(running), timeout=0)[0]
                else:
                    if not ready:
                        break
                    if time.monotonic() - waited > SECONDS_FOR_NODES:
                        for job in ready:
                            reason = f"it {schedule.problem(job.key) or 'found no place'}: nodes were lost"
                            queue.records[job.key] = make_record(queue.waiting.pop(job.key), "blocked", reason)
                            done(queue.records[job.key], [])
                        continue
                    time.sleep(1.0)
                    found = []
                for reference in found:
                    started = running.pop(reference)
                    job = started.job
                    schedule.end(job.key)
                    try:
                        record, messages = self._result(reference, started)
                    except WorkerLost as error:
                        schedule.update(alive_nodes())  # at once: no job is to be sent to a node that is gone
                        began = not isinstance(error, NeverBegan) or schedule.has(started.nodes)
                        record, messages = tries.after_death(job, error) if began else None, []
                        if record is None:
                            queue.waiting[job.key] = job
                            continue
                    except OSError as error:
                        pauses[job.key] = time.monotonic() + tries.after_error(job, error)
                        closed |= dict.fromkeys(started.nodes, pauses[job.key])
                        schedule.avoid(job.key, started.nodes)
                        queue.waiting[job.key] = job
                        continue
                    finally:
                        _free(started)
                    queue.records[job.key] = outline(record)
                    done(record, messages)
                if time.monotonic() - looked > 1.0:
                    looked = time.monotonic()
                    gone = schedule.update(alive_nodes())
                    for started in running.values():
                        if started.job.key in gone:
                            _free(started)  # a group that waits for a node that is gone: its task ends with it

    def _start(self, job: Job, placement: Placement) -> tuple[Any, _Running]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        here, nodes = placement[0], {share.node for share in placement}
        options = {"num_cpus": here.cpus, "num_gpus": here.gpus, "name": job.title, "max_retries": 0}
        if len(placement) == 1:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here.node, soft=False)
            return self._task.options(**options).remote(job, self.workplace), _Running(job, nodes)
        group = ray.util.placement_group(
            [{"CPU": share.cpus, "GPU": share.gpus} for share in placement],
            strategy="PACK",
            bundle_label_selector=[{"ray.io/node-id": share.node} for share in placement],
        )
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        from runners.ray_group import run_job_on_nodes

        task = ray.remote(run_job_on_nodes).options(**options)
        return task.remote(job, self.workplace, placement), _Running(job, nodes, group)

    def _result(self, reference: Any, started: _Running) -> tuple[Record, list[str]]:
        """What a task returned.

        Raises:
            WorkerLost: Ray lost the task.
            OSError: the output folder's disk is full, or this run's only machine cannot use the folder.
            InputError: a machine cannot run jobs; it is named.
        """
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause or error
            known = (*FULL, NOT_SHARED)
            of_all = isinstance(cause, OSError) and (cause.errno in known or self.cluster is Cluster.local)
            if of_all or isinstance(cause, WorkerLost | InputError):
                raise cause from None
            where = " and ".join(sorted(n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] in started.nodes))
            if isinstance(cause, OSError):
                reason = f"{cause.filename or self.workplace.output}: {cause.strerror or cause}"
                advice = "mount the same folder on all machines, and let all write into it"
            else:  # of a function that cannot be imported there Ray sends the traceback as text
                reason = str(cause).strip().splitlines()[-1]
                advice = "install the same packages, and this version of the suite, on all machines"
            raise InputError(f"the machine {where} cannot run {started.job.title}: {reason}; {advice}") from cause
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.TaskPlacementGroupRemoved) as error:
            raise NeverBegan(f"{type(error).__name__}: it found no place") from None
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"{type(error).__name__}: killed, or the machine is out of memory") from None


def _still(pauses: dict[str, float]) -> dict[str, float]:
    """Those that are not over."""
    return {name: until for name, until in pauses.items() if until > time.monotonic()}


def _free(started: _Running) -> None:
    """Gives back what Ray holds for a group; its tasks end."""
    import ray

    if started.group is not None:
        ray.util.remove_placement_group(started.group)
        started.group = None


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to."""
    import ray

    nodes = []
    for node in ray.nodes():
        there = node["Resources"]
        kinds = [name.removeprefix("accelerator_type:") for name in there if name.startswith("accelerator_type:")]
        if node["Alive"] and there.get("CPU"):  # a head that was started with none is to run no jobs
            kind = ", ".join(sorted(kinds)) or None
            nodes.append(Node(node["NodeID"], int(there.get("CPU", 0)), int(there.get("GPU", 0)), kind))
    return nodes


@contextmanager
def connected(cluster: Cluster, cpus: int) -> Iterator[None]:
    """A connection to the running cluster, or to one of this run's own with so many CPUs.

    Raises:
        InputError: there is none, or it cannot start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cluster is Cluster.local:
        # On Linux Ray listens on all interfaces, and on the loopback alone where it makes no clusters. This asks for
        # that.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray
    from ray._private import ray_constants
    from ray._private import worker as ray_worker
    from ray.exceptions import AuthenticationError

    if cluster is Cluster.local:  # where Ray was imported before, it did not see that
        ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", False)

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if cluster is Cluster.auto:
            with silent():  # each second of twenty it would say that it is refused
                ray.init(address="auto", **quiet)
        else:
            # "local" is a cluster of this run's own: without it Ray would join whatever runs on this machine.
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=100 * 2**20,  # records are small; the default is a third of the memory
                **quiet,
            )
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        address = os.environ.get("RAY_ADDRESS")  # where it is set, Ray does not look for a token of itself
        where = f"at RAY_ADDRESS={address}" if address else "on this machine"
        if isinstance(error, AuthenticationError) or AuthenticationError.__name__ in str(error.__cause__):
            raise InputError(
                f"cluster=auto: the Ray cluster {where} wants its token, and this run has not that one; where the "
                "cluster was started, 'ray get-auth-token --generate' made it: copy ~/.ray/auth_token from there, and "
                "set RAY_AUTH_MODE=token"
            ) from error
        if cluster is Cluster.auto and isinstance(error, ConnectionError):
            raise InputError(
                f"cluster=auto: no Ray cluster runs {where}; start one with 'ray get-auth-token --generate', once, and "
                "'RAY_AUTH_MODE=token ray start --head', or use cluster=local"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"Ray cannot start on this machine: {reason}; executor=inline does without") from error
    ended = threading.Event()
    watched = ray.get_runtime_context().gcs_address, cluster, ended
    threading.Thread(target=_watch_head, args=watched, daemon=True).start()
    printed = ray_worker.print_to_stdstream
    ray_worker.print_to_stdstream = lambda *_, **__: None  # pages on each lost worker; `Tries` says it in a line
    try:
        yield
    finally:
        ended.set()
        ray.shutdown()
        ray_worker.print_to_stdstream = printed


def _watch_head(address: str, cluster: Cluster, ended: threading.Event) -> None:
    """Ends this process with one line once the head is gone: no call to Ray would come back before Ray does so."""
    own = cluster is Cluster.local
    seconds = SECONDS_FOR_OWN_HEAD if own else SECONDS_FOR_HEAD
    host, _, port = address.rpartition(":")
    answered = time.monotonic()
    while not ended.wait(1.0):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            answered = time.monotonic()
        except OSError:
            if time.monotonic() - answered > seconds:
                break
    if not ended.is_set():
        Console().show_cursor()  # the live view hides it
        whose, where = ("this run's own Ray", "") if own else ("the Ray cluster", " on a cluster that runs")
        print(
            f"\nerror: the head of {whose} ({address}) has been out of reach for {seconds:.0f} s; "
            f"finished jobs are kept, and the same command continues{where}",
            file=sys.stderr,
            flush=True,
        )
        if own:  # what it started there would look for the head for minutes
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        os._exit(1)
