"""Leaderboards: the written schema, what stands in the columns, and their order."""

import csv
import io
import json
from datetime import date

import pytest

from results import leaderboard, papers, tables


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def checked(text):
    """The rows of a leaderboard as numbers and text, each cell held against `leaderboard_schema.json`."""
    schema = json.loads(leaderboard.SCHEMA_FILE.read_text())
    fields = {field["name"]: field for field in schema["fields"]}
    rows = read_csv(text)
    assert list(rows[0]) == list(fields)
    read = {"integer": int, "number": float, "string": str, "date": date.fromisoformat}
    for row in rows:
        for name, cell in row.items():
            limits = fields[name].get("constraints", {})
            assert cell not in schema["missingValues"] or not limits.get("required"), f"{name} is empty"
            if cell not in schema["missingValues"]:
                value = row[name] = read[fields[name]["type"]](cell)
                assert value in limits.get("enum", [value])
                assert limits.get("minimum", value) <= value <= limits.get("maximum", value), name
    return rows


def test_the_schema_is_complete():
    fields = json.loads(leaderboard.SCHEMA_FILE.read_text())["fields"]
    assert len({field["name"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in ("integer", "number", "string", "date")
        assert field["description"]
        assert not field["description"].endswith(".")


def test_leaderboard_schema_and_order(ragged_suite, tmp_path):
    written = leaderboard.write(ragged_suite, tmp_path)
    assert [path.name for path in written] == [
        "leaderboard_classification.csv",
        "leaderboard_segmentation.csv",
        "leaderboard_cost.csv",
    ]
    # Users' scripts read these: a column may be added at the end, none may go or move.
    columns = (
        "rank task model family head data input_height input_width precision seeds params macs activations "
        "latency_ms latency_ms_low latency_ms_high throughput peak_memory_mb metric value value_std baseline "
        "direction hardware revision date status cost_status speed_status reason"
    )
    assert " ".join(leaderboard.columns()).startswith(columns)
    for path in written:
        checked(path.read_text())
        rows = read_csv(path.read_text())
        ranks = [row["rank"] for row in rows]
        assert ranks == sorted(ranks, key=lambda rank: rank == "")
    rows = read_csv((tmp_path / "leaderboard_segmentation.csv").read_text())
    assert [rows[0][name] for name in ("rank", "model", "metric", "value", "baseline", "direction", "status")] == [
        *("1", "hiri_vit_s", "mIoU", "59.4", "8.2", "higher", "done")
    ]
    assert rows[-1]["model"] == "swin_tiny_patch4_window7"
    assert (rows[-1]["value"], rows[-1]["status"]) == ("", "blocked")
    assert rows[-1]["reason"] == "evaluation blocked: ADE20K was not found in data/ade20k"
    cost = read_csv((tmp_path / "leaderboard_cost.csv").read_text())
    assert (cost[0]["model"], cost[0]["direction"], cost[0]["value"]) == ("mit_b0", "lower", "")


def test_leaderboards_rank_each_data_set_alone(record):
    records = [
        record("evaluate", key=f"{data}{score}", model=f"m{score}", data=data, metrics={"top1": score})
        for data in ("a@1", "b@1")
        for score in (50, 60)
    ]
    records.append(record("evaluate", key="x", data="a@1", status="blocked", reason="missing"))
    lines = leaderboard.leaderboard(records, "classification")
    assert [(line["data"], line["value"], line["rank"]) for line in lines] == [
        *(("a@1", 60, 1), ("a@1", 50, 2), ("b@1", 60, 1), ("b@1", 50, 2), ("a@1", None, None))
    ]


def test_both_conventions_the_variant_and_the_origin_are_columns(record, tmp_path):
    job = {"model": "hivit_base", "num_classes": 1000, "model_config": {"depths": [1, 1, 12]}}
    cost = {"params": 22_700_000, "params_auxiliary": 0, "macs": 5_400_000_000, "activations": 9}
    cost["macs_paper"] = 5_500_000_000
    details = {"paper_convention": {"name": "hivit", "text": "more"}}
    speed = {"latency_ms": 9.5, "throughput": 400, "peak_memory_mb": 300, "train_step_ms": 30}
    records = [
        record("cost", model="slim", metrics=cost, details=details, job=job),
        record("speed", model="slim", metrics=speed, job=job | {"speed": {"batch_size": 4}}),
    ]
    leaderboard.write(records, tmp_path)
    (row,) = checked((tmp_path / "leaderboard_cost.csv").read_text())
    assert (row["macs"], row["macs_paper"], row["paper_convention"]) == (5_400_000_000, 5_500_000_000, "hivit")
    assert row["variant"] == 'hivit_base {"depths": [1, 1, 12]}'
    assert (row["num_classes"], row["batch_size"], row["train_step_ms"]) == (1000, 4, 30.0)
    assert (row["software"], row["records"]) == ("torch 2.15.0, timm 1.0.31", " ".join(r.key for r in records))


def test_variants_under_one_label_stay_apart(record):
    """Suites that are collected into one ledger may give one label to different networks."""
    jobs = {256: {"model": "m"}, 768: {"model": "m", "head_config": {"channels": 768}}}
    records = [record("cost", key=f"k{n}", model="m", metrics={"macs": n}, job=job) for n, job in jobs.items()]
    lines = leaderboard.leaderboard(records, "cost")
    assert [(line["macs"], line["variant"]) for line in lines] == [(256, "m"), (768, 'm {"channels": 768}')]


MINE = """paper,table,row,label,model,config,head,dataset,num_classes,input_size,top1,miou,reported_by
a,1,1,Quoted,mine_s,,,ImageNet-1K,1000,224x224,79.9,,other
a,2,1,Mine at 384,mine_s,,,ImageNet-1K,1000,384x384,83.1,,own
a,1,2,Quoted,theirs,,,ImageNet-1K,1000,224x224,70.1,,other
b,7,3,Quoted,theirs,,,ImageNet-1K,1000,224x224,70.4,,other
b,7,1,Mine-S,mine_s,,,ImageNet-1K,1000,224x224,80.1,,own
b,7,2,Mine-S wide,mine_s,"{""width"": 3}",,ImageNet-1K,1000,224x224,81.5,,own
b,8,1,Mine-S,mine_s,,segformer,ADE20K,150,512x512,,44.4,own
"""
IMAGENET, ADE20K = {"model": "mine_s", "num_classes": 1000}, {"model": "mine_s", "num_classes": 150}


@pytest.mark.parametrize(
    ("task", "changes", "value", "source"),
    [
        # Its own number goes before one that is quoted.
        ("classification", {"job": IMAGENET}, 80.1, "b, Table 7: Mine-S, ImageNet-1K"),
        ("classification", {"job": IMAGENET, "input_size": [384, 384]}, 83.1, "a, Table 2: Mine at 384, ImageNet-1K"),
        (
            "classification",
            {"job": IMAGENET | {"model_config": {"width": 3}}},
            81.5,
            "b, Table 7: Mine-S wide, ImageNet-1K",
        ),
        ("classification", {"job": IMAGENET | {"num_classes": 10}}, None, ""),
        (
            "classification",
            {"job": IMAGENET | {"model": "theirs"}},
            None,
            "quoted as 70.1 in a, Table 1: Quoted, ImageNet-1K; 70.4 in b, Table 7: Quoted, ImageNet-1K",
        ),
        ("classification", {"job": {"model": "mine_s"}}, None, ""),
        ("classification", {"job": IMAGENET, "input_size": [96, 96]}, None, ""),
        ("segmentation", {"job": ADE20K, "input_size": [512, 512]}, 44.4, "b, Table 8: Mine-S, ADE20K"),
        ("segmentation", {"job": ADE20K, "input_size": [512, 512], "head": "upernet"}, None, ""),
    ],
)
def test_reported_accuracies(record, tmp_path, task, changes, value, source):
    (tmp_path / "mine.csv").write_text(MINE)
    counted = record("cost", task, "mine", **{"input_size": [224, 224], "metrics": {"macs": 5}} | changes)
    (line,) = leaderboard.leaderboard([counted], task, papers.load(folder=tmp_path))
    assert (line["reported_value"], line["reported_in"]) == (value, source)
    assert (line["value"], line["status"]) == (None, "not run")  # what is reported is never what was measured


def test_a_trained_row_is_compared_on_its_own_data(record, tmp_path):
    (tmp_path / "mine.csv").write_text(MINE)
    for data, value in (("imagenet1k@1", 80.1), ("tiny@1", None)):
        trained = record(
            "evaluate", model="mine", data=data, input_size=[224, 224], job=IMAGENET, metrics={"top1": 9.0}
        )
        (line,) = leaderboard.leaderboard([trained], "classification", papers.load(folder=tmp_path))
        assert (line["value"], line["reported_value"]) == (9.0, value)


def test_backbones_without_a_head_are_in_the_cost_leaderboard_alone(record):
    records = [record("cost", "segmentation", head="bare", metrics={"macs": 5})]
    assert leaderboard.leaderboard(records, "segmentation") == []
    assert [line["head"] for line in leaderboard.leaderboard(records, "cost")] == ["bare"]


def test_no_leaderboard_of_nothing(tmp_path):
    assert leaderboard.write([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_costs_are_ranked_among_their_like(record):
    """The cheapest of all is the smallest size without a head: no rank that says anything."""
    records = [
        record(
            "cost",
            "segmentation",
            key=f"{name}{size}{head}",
            model=name,
            head=head,
            input_size=[size, size],
            job={"model": name},
            metrics={"macs": macs * size},
        )
        for name, macs in (("light", 1), ("heavy", 2))
        for size in (224, 512)
        for head in ("bare", "segformer")
    ]
    ranks = {(r["model"], r["input_height"], r["head"]): r["rank"] for r in leaderboard.leaderboard(records, "cost")}
    assert ranks == {key: 1 if key[0] == "light" else 2 for key in ranks}
    assert len(ranks) == 8


def test_a_record_from_before_a_number_was_counted_leaves_its_cell_empty(record):
    (line,) = leaderboard.leaderboard([record("cost", metrics={"params": 7, "macs": 5})], "cost")
    assert (line["macs"], line["cost_status"]) == (5, "done")
    assert (line["macs_paper"], line["activations"], line["params_auxiliary"]) == (None, None, None)


def test_scores_over_several_scales_stand_beside_those_over_one(record, tmp_path):
    scores = {"mIoU": 40.0, "mAcc": 50.0, "aAcc": 60.0, "baseline_mIoU": 5.0}
    records = [
        record("evaluate", "segmentation", key="one", model="one", metrics=scores | {"mIoU": 41.0}),
        *(
            record(
                "evaluate", "segmentation", key=f"{n}", model="several", seed=n, metrics=scores | {"mIoU_ms": 42 + n}
            )
            for n in (0, 1)
        ),
    ]
    leaderboard.write(records, tmp_path)
    rows = checked((tmp_path / "leaderboard_segmentation.csv").read_text())
    assert [(row["model"], row["rank"], row["value"], row["mIoU_ms"]) for row in rows] == [
        ("one", 1, 41.0, ""),  # ranked by one scale, which all have
        ("several", 2, 40.0, 42.5),
    ]
    (table,) = [path for path in tables.write(records, tmp_path / "tables") if path.name == "segmentation.md"]
    heading, _, first, second = (line.split(" | ") for line in table.read_text().splitlines()[2:6])
    place = heading.index("mIoU, several scales (%)")
    assert first[place].startswith("not run")
    assert second[place].startswith("42.5 ± 0.7")
    tables.write(records[:1], tmp_path / "alone")
    assert "several" not in (tmp_path / "alone" / "segmentation.md").read_text()
