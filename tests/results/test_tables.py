"""Rows and tables: what is joined, what is averaged, and that nothing unmeasured looks measured."""

import csv
import io
from dataclasses import replace

import pytest
from rich.console import Console

from results import display, tables
from results.rows import NOT_RUN, hardware_label, join, join_cost, labels


def by_model(rows):
    return {row.model: row for row in rows}


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def as_text(table, width=100):
    console = Console(width=width, no_color=True, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_stages_are_joined_into_one_row_per_model(suite):
    rows = join(suite(), "classification")
    assert len(rows) == 8
    assert [row.metric.value for row in rows] == sorted((row.metric.value for row in rows), reverse=True)
    row = by_model(rows)["hivit_tiny"]
    assert row.cells["params"].value == 18_700_000
    assert row.cells["latency_ms"].value == 61.0
    assert row.cells["latency_ms"].low < 61.0 < row.cells["latency_ms"].high
    assert row.baseline.value == 10.4
    assert (row.data, row.precision, row.seeds) == ("digit_scenes_classification@1", "float32", (0,))
    assert (row.hardware, row.revision, row.date) == ("AMD EPYC 7763, 2 cores", "e767ae7", "2026-11-20")
    assert row.reasons() == []


def test_seeds_are_averaged(suite):
    cell = by_model(join(suite(seeds=(0, 1, 2)), "classification"))["hivit_tiny"].metric
    assert cell.value == pytest.approx(93.7)
    assert cell.std == pytest.approx(0.3)
    assert cell.count == 3


def test_a_failed_seed_is_a_note_not_a_number(suite, record):
    records = suite(seeds=(0, 1))
    failed = record("evaluate", seed=2, status="failed", reason="loss is not finite")
    row = by_model(join([*records, failed], "classification"))["hivit_tiny"]
    assert row.metric.count == 2
    assert "seed 2 failed: loss is not finite" in row.notes


def test_other_recipes_sizes_heads_and_data_are_other_rows(record):
    base = record("evaluate", metrics={"top1": 90.0})
    longer = replace(base, key="b", job=base.job | {"recipe": {"iterations": 900}}, metrics={"top1": 95.0})
    larger = replace(base, key="c", input_size=[192, 192])
    elsewhere = replace(base, key="d", data="imagenet@1")
    rows = join([base, longer, larger, elsewhere], "classification")
    assert len(rows) == 4
    assert all(row.metric.count == 1 for row in rows)
    assert sum("one of several recipes of this model" in " ".join(row.notes) for row in rows) == 2
    segmentation = [record("cost", "segmentation", head=head, key=str(head)) for head in ("segformer", "upernet", None)]
    assert len(join(segmentation, "segmentation")) == 3


def test_speed_of_two_machines_is_never_averaged(suite, record):
    other = record("speed", key="other", metrics={"latency_ms": 2.0}, provenance={"hardware": "H200"})
    rows = [row for row in join([*suite(), other], "classification") if row.model == "hivit_tiny"]
    assert {(row.hardware, row.cells["latency_ms"].value) for row in rows} == {
        ("AMD EPYC 7763, 2 cores", 61.0),
        ("H200", 2.0),
    }
    assert {row.metric.value for row in rows} == {93.4}


def test_cost_and_speed_belong_to_every_data_set(record):
    records = [
        record("cost", data="a@1", metrics={"params": 5}),
        record("speed", data="a@1", metrics={"latency_ms": 7}),
    ]
    records += [record("evaluate", key=data, data=data, metrics={"top1": 9.0}) for data in ("a@1", "b@1")]
    rows = join(records, "classification")
    assert [(row.data, row.cells["params"].value, row.cells["latency_ms"].value) for row in rows] == [
        *(("a@1", 5, 7), ("b@1", 5, 7))
    ]


def test_a_cpu_measurement_on_a_gpu_machine_is_named_after_the_cpu(record):
    hardware = {"name": "H200", "gpus": ["H200"], "cpu": "EPYC"}
    for device, label in (("cpu", "EPYC"), ("cuda", "H200")):
        made = record("speed", job={"speed": {"device": device}}, provenance={"hardware": hardware})
        assert hardware_label(made) == label


def test_cost_of_other_classes_belongs_to_the_other_data(record):
    wide = record("cost", key="w", job={"num_classes": 150}, metrics={"params": 2})
    narrow = record("cost", key="n", job={"num_classes": 11}, metrics={"params": 1})
    score = record("evaluate", metrics={"top1": 1.0})
    rows = join([wide, narrow, score], "classification")
    assert [(row.cells["params"].value, row.metric.value) for row in rows if row.data] == [(1, 1.0)]


def test_the_latest_of_two_records_of_one_seed_counts(record):
    old = record("evaluate", key="old", metrics={"top1": 1.0}, provenance={"started": "2026-01-01"})
    new = record("evaluate", key="new", metrics={"top1": 2.0}, provenance={"started": "2026-02-01"})
    failed = record("evaluate", key="f", status="failed", reason="x", provenance={"started": "2026-03-01"})
    for records in ([old, new, failed], [failed, new, old]):
        (row,) = join(records, "classification")
        assert (row.metric.value, row.metric.count, row.date) == (2.0, 1, "2026-03-01")


def test_precision_of_speed_may_differ_and_is_said(record):
    records = [record("evaluate", precision="amp", metrics={"top1": 9.0}), record("speed", metrics={"latency_ms": 3})]
    (row,) = join(records, "classification")
    assert row.precision == "amp"
    assert row.notes == ["speed measured in float32"]


def test_a_missing_evaluation_takes_the_reason_of_its_training(record):
    (row,) = join([record("train", status="failed", reason="out of memory")], "classification")
    assert (row.metric.status, row.metric.reason) == ("failed", "training failed: out of memory")
    (row,) = join([record("train")], "classification")
    assert row.metric.status == NOT_RUN


def test_labels_say_what_differs(record):
    sizes = [record("cost", key=str(side), input_size=[side, side]) for side in (64, 96)]
    other = record("cost", model="deit")
    assert sorted(labels(join([*sizes, other], "classification"))) == ["deit", "hivit_tiny 64x64", "hivit_tiny 96x96"]
    assert labels([]) == []
    row = join([other], "classification")[0]
    assert labels([row, row]) == ["deit #1", "deit #2"]


def test_unmeasured_cells_never_look_measured(ragged_suite, tmp_path):
    tables.write(ragged_suite, tmp_path)
    rows = {row["model"]: row for row in read_csv((tmp_path / "segmentation.csv").read_text())}
    for model, stage, status in (
        ("mit_b0", "speed_status", "not run"),
        ("hrvit_b1", "speed_status", "failed"),
        ("swin_tiny_patch4_window7", "status", "blocked"),
    ):
        assert rows[model][stage] == status
        names = ("mIoU", "mAcc", "baseline_mIoU") if stage == "status" else ("latency_ms", "throughput")
        assert [rows[model][name] for name in names] == [""] * len(names)
    assert rows["hrvit_b1"]["reason"] == "speed failed: out of memory: needs 9.1 GB, 8 GB free"
    assert rows["hivit_tiny"]["reason"] == ""
    table = tables.display(tables.rows_of(ragged_suite, "segmentation"), "segmentation")
    index = [cells[0] for cells in table.cells].index("hrvit_b1")
    column = table.headings.index("Latency (ms)")
    note = table.footnotes.index("speed failed: out of memory: needs 9.1 GB, 8 GB free") + 1
    assert table.cells[index][column] == f"failed [{note}]"
    assert not table.measured[index][column]
    text = as_text(tables.closing_table(ragged_suite))
    assert "hrvit_b1 (segmentation): speed failed: out of memory: needs 9.1 GB, 8 GB free" in text
    assert text.count("not run ") >= 2
    assert "nan" not in text + (tmp_path / "segmentation.md").read_text().lower()


def test_a_column_that_no_job_measures_is_left_to_the_csv(record):
    records = [record("cost", metrics={"params": 5, "macs": 7}), record("speed", metrics={"latency_ms": 1.0})]
    headings = tables.display(tables.rows_of(records, "cost"), "cost").headings
    assert "MACs (G)" in headings
    assert "Activations (M)" not in headings
    assert tables.frame(records, "cost")["activations"].isna().all()


def test_columns_of_the_csv_are_stable(suite):
    common = "task model family head data input_height input_width precision hardware "
    cost = "params macs activations latency_ms latency_ms_low latency_ms_high throughput peak_memory_mb "
    ends = "cost_status speed_status status reason notes num_classes"
    expected = {
        "classification": common + "seeds top1 top1_std top5 top5_std baseline_top1 " + cost + ends,
        "segmentation": common
        + "seeds mIoU mIoU_std mAcc mAcc_std baseline_mIoU "
        + cost
        + ends
        + " mIoU_ms mIoU_ms_std",
        "cost": common + cost + "train_step_ms train_step_ms_low train_step_ms_high train_peak_memory_mb "
        "cost_status speed_status reason notes num_classes",
    }
    for kind, columns in expected.items():
        assert list(tables.frame(suite(), kind)) == columns.split()


def test_whole_numbers_stay_whole(ragged_suite, record):
    blocked = record("cost", model="x", status="blocked", reason="no memory")
    text = tables.frame([*ragged_suite, blocked], "cost").to_csv(index=False)
    assert ",18700000,4600000000," in text


def test_best_is_marked_once_per_group(suite):
    records = suite()
    rows = tables.rows_of(records, "classification")
    params = next(column for column in tables.COLUMNS["cost"] if column.name == "params")
    assert {rows[i].model for i in tables.best_rows(params, rows)} == {"mit_b0"}
    assert "**3.70**" in display.markdown(tables.display(rows, "classification"))
    assert tables.best_rows(params, rows[:1]) == set()


def test_names_are_escaped(record):
    made = record("cost", key="k", model=r"a|b_c&d%e#f${g}\h^i~j*k*[l](m)<n>", family="_F_", metrics={"params": 1e6})
    table = tables.display(tables.rows_of([made], "cost"), "cost")
    text = display.markdown(table)
    assert r"a\|b_c&d%e\#f${g}\\h^i\~j\*k\*\[l\](m)\<n\>" in text
    assert r"\_F\_" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    latex = display.latex(table, "cost")
    assert r"a\textbar{}b\_c\&d\%e\#f\$\{g\}\textbackslash{}h\textasciicircum{}i\textasciitilde{}j*k*{[}l{]}" in latex
    assert latex.count("{") == latex.count("}")
    assert "[l](m)<n>" in as_text(tables.cost_table([made]))


@pytest.mark.parametrize("make", [tables.closing_table, tables.cost_table])
def test_terminal_tables_fit_100_columns(make, ragged_suite):
    lines = as_text(make(ragged_suite), width=200).splitlines()
    assert max(len(line.rstrip()) for line in lines if ":" not in line) <= 100
    text = as_text(make(ragged_suite))
    for model in ("hivit_tiny", "swin_tiny_patch4_window7", "hrformer_small"):
        assert model in text
    assert "3.70*" in text


def test_terminal_tables_cope_with_little(record):
    assert "Results" in as_text(tables.closing_table([]))
    assert "Cost" in as_text(tables.cost_table([record("train")]))
    sizes = [record("cost", key=str(side), input_size=[side, side], metrics={"macs": side}) for side in (64, 96)]
    assert "64x64" in as_text(tables.cost_table(sizes))


def test_nothing_is_written_of_nothing(tmp_path):
    assert tables.write([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_rows_of_cost_come_from_cost_and_speed_alone(ragged_suite):
    rows = join_cost(ragged_suite)
    assert len(rows) == 16
    assert {row.data for row in rows} == {None}
    assert rows[0].model == "mit_b0"


def test_a_training_belongs_to_every_way_of_evaluating_it(record):
    """Whole images or sliding windows: two rows of one training, which says nothing of its evaluation itself."""
    base = record("evaluate", "segmentation")
    trained = record("train", "segmentation")
    ways = [
        replace(base, key=mode, job=base.job | {"recipe": base.job["recipe"] | {"evaluation": {"mode": mode}}})
        for mode in ("whole", "slide")
    ]
    assert len(tables.rows_of([trained, ways[0]], "segmentation")) == 1
    assert len(tables.rows_of([trained, *ways], "segmentation")) == 2


def test_columns_without_any_number_are_told_and_not_shown(record, ragged_suite):
    counted = [record("cost", model=name, metrics={"macs": 1e9, "params": 1e6}) for name in ("one", "two")]
    table = tables.display(join_cost(counted), "cost")
    assert table.headings == ["Model", "Family", "Params (M)", "MACs (G)"]
    assert "speed not run" in table.caption
    assert "hardware" not in table.caption  # a count is the same on any machine
    timed = tables.display(join_cost([*counted, record("speed", model="one", metrics={"latency_ms": 9.0})]), "cost")
    assert [cells[-1] for cells in timed.cells] == ["9.00", "not run [1]"]
    assert "hardware AMD EPYC" in timed.caption
    failed = [record("speed", status="failed", reason="out of memory", metrics={})]
    assert "not run" in str(tables.display(join_cost(failed), "cost").cells)


def test_networks_for_other_numbers_of_classes_can_be_told_apart(record):
    records = [
        record("cost", key=f"k{n}", metrics={"macs": n}, job={"model": "m", "num_classes": n}) for n in (19, 150)
    ]
    rows = join_cost(records)
    assert labels(rows) == ["hivit_tiny 19 classes", "hivit_tiny 150 classes"]
    table = tables.display(rows, "cost")
    assert [cells[table.headings.index("Classes")] for cells in table.cells] == ["19", "150"]
    assert not any(map(any, table.best))
    assert tables.frame(records, "cost").num_classes.tolist() == [19, 150]


def test_what_was_never_measured_comes_last_whatever_its_data(record):
    records = [
        record("cost", model="unknown", metrics={"macs": 1}),
        record("evaluate", model="trained", data="zoo@1", metrics={"top1": 50.0}),
    ]
    assert [row.model for row in join(records, "classification")] == ["trained", "unknown"]
