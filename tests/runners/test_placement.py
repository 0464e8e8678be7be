"""Which job starts when and where: the schedule that a run and a simulation share."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import defaultdict

import pytest
from tests_support import configuration

from benchmarks.job import Engine, Job, Recipe, SpeedSettings, is_gpu_type
from runners.estimate import GPU_MACS_PER_SECOND, count_macs, known_macs, needs
from runners.placement import Needs, Node, Schedule, Timeline, problem, simulate
from runners.plan import make_jobs
from runners.plan_table import plan_summary, plan_table
from runners.simulate import in_processes, jobs_of, simulate_jobs

EIGHT = [Node(f"node {number}", cpus=64, gpus=8) for number in range(8)]
GPU = Needs(gpus=1.0)


def group(processes: int, seconds: float = 1.0) -> Needs:
    return Needs(gpus=1.0, processes=processes, seconds=seconds)


def placed(asked: dict[str, Needs], nodes: list[Node]) -> Schedule:
    schedule = Schedule(asked, dict.fromkeys(asked, ()), nodes)
    schedule.start(asked)
    return schedule


def assert_nothing_is_taken_twice(found: Timeline, nodes: list[Node]) -> None:
    """At no moment more GPUs or CPUs of a node than it has."""
    for kind in ("gpus", "cpus"):
        changes = defaultdict(list)
        for start, end, placement in found.spans.values():
            for share in placement:
                changes[share.node] += [(end, 0, -getattr(share, kind)), (start, 1, getattr(share, kind))]
        for node in nodes:
            taken = 0.0
            for *_, change in sorted(changes[node.name]):
                taken += change
                assert taken <= getattr(node, kind) + 1e-6


@pytest.fixture(scope="module")
def two_suites() -> tuple[list[Job], dict[str, float]]:
    """Jobs and MACs. The two autoencoders are in no published table: they are counted."""
    jobs = jobs_of(["ade20k_segformer", "imagenet_classification"])
    known = known_macs([])
    assert {job.stage for job in jobs if job.counted_as not in known} == {"pretrain"}
    macs = count_macs(jobs, known)
    assert macs.keys() == known.keys() | {job.counted_as for job in jobs}
    return jobs, macs


@pytest.mark.parametrize("processes", [None, 8, 16])
def test_the_makespan_on_64_gpus_is_close_to_its_lower_bound(two_suites, processes):
    """The two largest suites, as their recipes are (a GPU each), on 8 GPUs each, and on two nodes each."""
    jobs = [in_processes(job, processes) for job in two_suites[0]]
    found = simulate_jobs(jobs, two_suites[1], EIGHT)
    assert found.spans.keys() == {job.key for job in jobs}
    assert found.lower_bound > 24 * 3600
    assert found.makespan <= 1.1 * found.lower_bound
    assert_nothing_is_taken_twice(found, EIGHT)
    for job in jobs:
        assert all(found.spans[key][1] <= found.spans[job.key][0] for key in job.depends_on)
        if job.recipe:
            assert sum(share.gpus for share in found.spans[job.key][2]) == (processes or 1)


def test_jobs_of_all_sizes():
    """Many draws: nothing is forgotten, nothing is taken twice, and no schedule is far from the bound."""
    dice = random.Random(7)
    kinds = [Needs(4, 1.0), Needs(1, 0.25), group(4), group(8), group(12), Needs(2), Needs(alone=True)]
    for _ in range(5):
        asked, after = {}, {}
        for number in range(200):
            asked[str(number)] = dataclasses.replace(dice.choice(kinds), seconds=dice.lognormvariate(0, 1))
            after[str(number)] = tuple(str(dice.randrange(number)) for _ in range(number > 50 and dice.random() < 0.3))
        found = simulate(asked, after, EIGHT)
        assert found.spans.keys() == asked.keys()
        assert_nothing_is_taken_twice(found, EIGHT)
        assert found.lower_bound <= found.makespan < 2 * found.lower_bound


def test_a_plan_of_1000_jobs_takes_less_than_two_seconds():
    config = configuration(
        "suite=ade20k_segformer", "stages=[train,evaluate]", f"seeds=[{','.join(map(str, range(25)))}]"
    )
    started = time.process_time()  # others may use the machine meanwhile
    jobs = make_jobs(config)
    assert len(jobs) == 1000
    shown = jobs, {job.key for job in jobs}, known_macs([]), EIGHT
    table, lines = plan_table(*shown), plan_summary(*shown)
    assert time.process_time() - started < 2
    assert table.row_count == 1000
    assert lines[0].startswith("To do: 1000 of 1000 jobs")


def test_groups_that_do_not_fit_together_come_one_after_the_other():
    """Neither holds a part of what it needs while it waits."""
    nodes = [Node("a", 4, 2), Node("b", 4, 2)]
    asked = {"one": group(3), "two": group(3)}
    schedule = placed(asked, nodes)
    assert list(schedule.running) == ["one"]
    assert schedule.start(["two"]) == []
    schedule.end("one")
    ((key, placement),) = schedule.start(["two"])
    assert key == "two"
    assert sorted(share.processes for share in placement) == [1, 2]


def test_a_group_stays_on_one_node_where_one_is_large_enough():
    nodes = [Node("a", 4, 2), Node("b", 4, 4), Node("c", 4, 2)]
    schedule = placed({"group": group(4)}, nodes)
    assert [share.node for share in schedule.running["group"][0]] == ["b"]
    waiting = placed({"small": Needs(gpus=1.0, seconds=9), "group": group(4)}, nodes[1:2])
    assert list(waiting.running) == ["small"]  # it waits for the one node rather than spread over two
    assert waiting.start(["group"]) == []


def test_a_group_is_not_kept_waiting_by_small_jobs_for_ever():
    nodes = [Node("a", 8, 2)]
    asked = {"long": Needs(gpus=1.0, seconds=5), "group": group(2, 4.0)} | {
        f"small {number}": Needs(gpus=1.0, seconds=1) for number in range(20)
    }
    found = simulate(asked, dict.fromkeys(asked, ()), nodes)
    assert found.spans["group"][0] == 5.0  # as soon as the first has ended


def test_shares_of_a_gpu_fill_one_before_the_next():
    asked = {str(number): Needs(cpus=1, gpus=0.25) for number in range(9)} | {"whole": Needs(gpus=1.0, seconds=9)}
    schedule = placed(asked, [Node("a", 16, 4)])
    assert len(schedule.running) == 10
    assert sorted(schedule.rooms["a"].devices) == [0.0, 0.0, 0.0, 0.75]
    for key in asked:
        schedule.end(key)
    assert schedule.rooms["a"].devices == [1.0] * 4
    assert schedule.rooms["a"].cpus == 16


@pytest.mark.parametrize(("cpus", "gpus"), [(6, 4), (64, 6), (40, 6), (8, 3), (2, 3)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_no_gpu_idles_for_want_of_cpus(cpus, gpus, share):
    jobs = round(gpus / share)
    schedule = placed({str(number): Needs(cpus=32, gpus=share) for number in range(jobs)}, [Node("a", cpus, gpus)])
    assert len(schedule.running) == jobs
    taken = sum(share.cpus for placement, _ in schedule.running.values() for share in placement)
    assert cpus - 0.001 * jobs <= taken <= cpus


def test_timings_have_a_node_or_a_device_to_themselves_and_come_first():
    plain, fast = Node("plain", 8), Node("fast", 8, 2, "H100")
    timed = {
        "cpu": Needs(alone=True, first=True),
        "gpu": Needs(gpus=1.0, gpu_type="H100", first=True),
        "training": Needs(gpus=1.0, seconds=1e6),
        "other": Needs(cpus=1),
    }
    schedule = placed(timed, [fast, plain])
    where = {key: placement[0].node for key, (placement, _) in schedule.running.items()}
    assert where == {"cpu": "plain", "gpu": "fast", "training": "fast", "other": "fast"}
    assert len({tuple(devices[0]) for key, (_, devices) in schedule.running.items() if key in ("gpu", "training")}) == 2
    assert list(placed({"long": Needs(seconds=9), "cpu": timed["cpu"]}, [plain]).running) == ["cpu"]


def test_timings_on_cpus_are_part_of_the_lower_bound():
    asked = {str(number): Needs(alone=True, seconds=3) for number in range(5)}
    found = simulate(asked, dict.fromkeys(asked, ()), [Node("plain", 8), Node("other", 8), Node("small", 4)])
    assert (found.lower_bound, found.makespan) == (7.5, 9)


def test_the_job_that_begins_the_longest_chain_starts_first():
    asked = {
        "long": Needs(gpus=1.0, seconds=5),
        "first": Needs(gpus=1.0, seconds=1),
        "then": Needs(gpus=1.0, seconds=8),
    }
    after = {"long": (), "first": (), "then": ("first",)}
    found = simulate(asked, after, [Node("a", 4, 1)])
    assert sorted(found.spans, key=lambda key: found.spans[key][0]) == ["first", "then", "long"]
    assert found.makespan == found.lower_bound == 14


def test_a_lost_node_is_used_no_more_and_a_new_one_is():
    schedule = placed({"a": GPU, "b": GPU}, [Node("one", 4, 1), Node("two", 4, 1)])
    (gone,) = (key for key, (placement, _) in schedule.running.items() if placement[0].node == "one")
    assert schedule.update([Node("two", 4, 1)]) == {gone}
    schedule.end(gone)
    assert schedule.start([gone]) == []
    schedule.update([Node("two", 4, 1), Node("three", 4, 1)])
    ((_, (share,)),) = schedule.start([gone])
    assert share.node == "three"
    schedule.update([])
    assert schedule.problem(gone) == "needs a GPU, and the cluster has none"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (group(8), None),
        (group(9), "needs 9 GPUs, and the cluster has 8 (A100, H100)"),
        (Needs(gpus=0.5, gpu_type="H100"), None),
        (Needs(gpus=1.0, gpu_type="H200"), "needs a GPU of the type H200, and the cluster has 8 (A100, H100)"),
        (
            dataclasses.replace(group(5), gpu_type="H100"),
            "needs 5 GPUs of the type H100, and the cluster has 4 of that type",
        ),
        (Needs(cpus=1000), None),  # on CPUs a job does with fewer
        (Needs(alone=True), None),
    ],
)
def test_what_a_cluster_could_never_run_is_said_at_once(asked, said):
    assert problem(asked, [Node("a", 8, 4, "A100"), Node("b", 8, 4, "H100")]) == said
    assert problem(Needs(), []) == "needs CPUs, and the cluster has no node with any"


def a_job(stage: str, **changes) -> Job:
    kept = {"task": "segmentation", "label": "test_mit", "model": "test_mit", "head": "segformer", "data": "ade20k"}
    settings = {"input_size": (64, 64), "num_classes": 150, "recipe": Recipe(), "speed": SpeedSettings()}
    return Job(stage=stage, **kept, **settings | changes)


def test_what_jobs_need():
    with_gpus, without = [Node("a", 8, 2)], [Node("a", 8)]
    train = a_job("train", recipe=Recipe(iterations=1000, batch_size=10, threads=3))
    macs = {train.counted_as: 1e9}
    assert needs(train, macs, without) == Needs(3, 0.0, seconds=1 + 3 * 1e13 / (3 * 20e9))
    assert needs(train, macs, with_gpus) == Needs(3, 1.0, seconds=1 + 3e13 / GPU_MACS_PER_SECOND)
    assert train.counted_as == a_job("evaluate").counted_as == a_job("cost").key
    several = a_job("evaluate", recipe=Recipe(engine=Engine(processes=2, gpu_type="H100")))
    assert needs(several, macs, without).gpu_type == "H100"  # which is then missed, rather than done without
    assert needs(several, macs, with_gpus).processes == 2
    small = a_job("train", recipe=Recipe(engine=Engine(gpu_fraction=0.25)))
    assert needs(small, macs, with_gpus).gpus == 0.25
    assert needs(small, macs, without).gpus == 0
    on_cpu, on_gpu = (a_job("speed", speed=SpeedSettings(device=device)) for device in ("cpu", "cuda"))
    assert needs(on_cpu, macs, with_gpus).alone
    assert needs(on_gpu, macs, without).gpus == 1
    assert not needs(a_job("cost"), macs, with_gpus).gpus


def test_teachers_probes_and_several_scales_count():
    def seconds(stage: str, **recipe) -> float:
        job = a_job(stage, recipe=Recipe(**recipe))
        return needs(job, {job.counted_as: 1e9}, []).seconds - 1

    plain = seconds("train")
    assert seconds("train", distillation_alpha=0.5) == pytest.approx(4 / 3 * plain)
    assert seconds("train", linear_probe=True) == pytest.approx(1 / 3 * plain)
    assert seconds("train", iterations=1000, warmup_iterations=0, validate_every=100) == pytest.approx(
        seconds("train", iterations=1000, warmup_iterations=0) + 10 * seconds("evaluate")
    )
    several = seconds("evaluate", evaluation={"scales": [0.5, 1.5], "flip": True})
    assert several == pytest.approx(seconds("evaluate") * (1 + 2 * (0.25 + 2.25)))


@pytest.mark.parametrize(
    ("asked", "name", "is_it"),
    [
        ("H100", "NVIDIA H100 80GB HBM3", True),
        ("a100", "NVIDIA A100-SXM4-80GB", True),
        ("A100 SXM4", "NVIDIA A100-SXM4-80GB", True),
        ("RTX-PRO-6000", "NVIDIA RTX PRO 6000 Blackwell", True),
        ("V100", "V100", True),
        ("A100-80G", "NVIDIA A100-SXM4-80GB", True),
        ("A100-80G", "NVIDIA A100-PCIE-40GB", False),
        ("A100-40G", "A100, A100-40G", True),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("L4", "NVIDIA L40S", False),
        ("H100", "", False),
    ],
)
def test_one_name_of_a_gpu_type_everywhere(asked, name, is_it):
    node = Node("a", 8, 1, name or None)
    assert is_gpu_type(asked, name) == is_it
    assert (problem(Needs(gpus=1.0, gpu_type=asked), [node]) is None) == is_it


def test_a_named_gpu_type_is_part_of_a_timings_key_and_of_no_others():
    plain = a_job("speed", speed=SpeedSettings(device="cuda"))
    assert "gpu_type" not in plain.content()["speed"]
    assert a_job("speed", speed=SpeedSettings(device="cuda", gpu_type="H100")).key != plain.key
