"""Plots of ablations: the reported accuracy of each row at the cost counted for it, and none without a counted cost."""

from dataclasses import replace

import numpy as np
import pytest
from plots_support import assert_clean, texts_of

from results import papers, plots
from results.ablation_plots import ablations, sketches
from results.rebuilt import rebuild
from results.style import slug

HEADER = "paper,table,row,label,model,config,head,setting,dataset,num_classes,input_size,top1,miou,other\n"
ROWS = """\
mine,3,1,Whole,mine_s,,,,ImageNet-1K,1000,224x224,80.0,,ablation=parts left out
mine,3,2,- Gate,mine_s,"{""gate"": false}",,,ImageNet-1K,1000,224x224,79.5,,changes=1
mine,3,3,- Stem,mine_s,"{""stem"": false}",,,ImageNet-1K,1000,224x224,80.0,,changes=2
mine,3,4,- Never,mine_s,"{""never"": false}",,,ImageNet-1K,1000,224x224,70.0,,changes=1
mine,3,5,Whole,mine_s,,upernet,,ADE20K,150,512x512,,44.0,
mine,3,6,- Gate,mine_s,"{""gate"": false}",upernet,,ADE20K,150,512x512,,43.0,changes=5
mine,4,1,No ablation,mine_s,,,,ImageNet-1K,1000,224x224,80.0,,
mine,4,2,- Gate,mine_s,"{""gate"": false}",,,ImageNet-1K,1000,224x224,79.5,,
"""
COSTS = {"gate": (3.5e9, 11e6), "stem": (4e9, 12e6)}


@pytest.fixture
def printed(tmp_path):
    (tmp_path / "mine.csv").write_text(HEADER + ROWS)
    return papers.Papers(rows=papers.read(tmp_path / "mine.csv"))


def counted(record, model, config=None, macs=4e9, params=12e6, row=None, **changes):
    head = row.head if row else None
    job = {"model": model, "num_classes": row.num_classes if row else 1000, "model_config": dict(config or {})}
    job |= {"head_config": dict(row.head_config) if row else {}}
    common = {"input_size": list(row.size_of_cost) if row else [224, 224], "head": head or None, "job": job}
    task = "segmentation" if head else "classification"
    metrics = {"macs": macs, "params": params}
    key = changes.pop("key", slug(f"{model} {config} {head}"))
    return record("cost", task, model, key=key, **common | {"metrics": metrics} | changes)


@pytest.fixture
def records(record):
    changed = [counted(record, "mine_s", {name: False}, *cost) for name, cost in COSTS.items()]
    return [counted(record, "mine_s"), *changed]


def test_points_are_reported_accuracies_at_counted_costs(printed, records):
    (ablation,) = ablations(rebuild(printed, records))
    assert ablation.title == "mine, Table 3: parts left out (none trained here)"
    (panel,) = ablation.panels
    assert [(p.label, p.macs, p.reported) for p in panel.points] == [
        ("Whole", 4.0, 80.0),
        ("- Gate", 3.5, 79.5),
        ("- Stem", 4.0, 80.0),
    ]
    assert "None of these networks was trained here" in ablation.caption
    assert "Parameters: 11.0 to 12.0 million" in ablation.caption
    assert ablation.caption.endswith("the cost was not counted: - Never, Mean IoU on ADE20K.")


def test_the_figure_shows_them_hollow_with_an_arrow_for_each_change(printed, records):
    (sketch,) = sketches(rebuild(printed, records), ["HiViT"])
    assert (sketch.section, sketch.name) == ("papers", "papers_mine_table_3")
    (axes,) = sketch.figure.axes
    drawn = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert drawn == [(4.0, 80.0), (3.5, 79.5), (4.0, 80.0)]
    arrows = [(text.xyann, text.xy) for text in axes.texts if text.arrow_patch is not None and not text.get_text()]
    assert arrows == [((4.0, 80.0), (3.5, 79.5)), ((3.5, 79.5), (4.0, 80.0))]
    assert {name for name, _ in texts_of(axes)} == {"Whole", "- Gate", "- Stem"}
    for words in ("- Gate 79.5 % at 3.5 GMACs", "None of these networks was trained here"):
        assert words in sketch.alt


def test_no_plot_without_two_counted_rows_of_a_table_that_is_an_ablation(printed, records, record):
    assert ablations(rebuild(printed, [])) == []
    assert ablations(rebuild(printed, records[:1])) == []
    failed = [replace(made, status="failed", reason="no memory", metrics={}) for made in records]
    assert ablations(rebuild(printed, failed)) == []
    partly = [replace(made, metrics={"macs": 4e9}) for made in records]
    assert ablations(rebuild(printed, partly)) == []


def test_a_training_of_our_own_is_told_from_what_is_reported(printed, records, record):
    job = {"model": "mine_s", "num_classes": 1000, "model_config": {}}
    trained = record("evaluate", model="mine_s", data="imagenet1k@1", input_size=[224, 224], job=job)
    tables = rebuild(printed, [*records, replace(trained, metrics={"top1": 78.0})])
    (sketch,) = sketches(tables, ["HiViT"])
    assert sketch.title == "mine, Table 3: parts left out"
    assert "trained here" in [text.get_text() for text in sketch.figure.legends[0].get_texts()]
    assert "None of these" not in sketch.alt
    assert (4.0, 78.0) in [tuple(line.get_xydata()[0]) for line in sketch.figure.axes[0].lines]


def test_rows_that_coincide_are_drawn(printed, records, tmp_path):
    same = [replace(made, metrics={"macs": 4e9, "params": 12e6}) for made in records]
    rows = [replace(row, cells={"top1": "80.0"}) if row.head == "" else row for row in printed.rows]
    drawn = plots.draw(same, tmp_path, rebuild(papers.Papers(rows=rows), same))
    assert "papers_mine_table_3.svg" in [path.name for plot in drawn.plots for path in plot.files]


def test_all_ablations_of_the_papers_are_drawn_and_arrows_join_rows_of_one_accuracy(record):
    printed = papers.load()
    made = []
    for n, row in enumerate(row for row in printed.rows if row.buildable and row.size_of_cost):
        made.append(counted(record, row.model, row.config, (5 + n % 7) * 1e9, 1e7, row, key=str(n)))
    found = {ablation.name: ablation for ablation in ablations(rebuild(printed, made))}
    tables = {"hrvit": "5 6 7 8", "hrformer": "7 8 9 11 12", "hivit": "2 9", "hiri_vit": "7 8 9"}
    assert set(found) == {f"papers_{paper}_table_{n}" for paper in tables for n in tables[paper].split()}
    for ablation in found.values():
        table = [row for row in printed.rows if ablation.name == f"papers_{row.paper}_table_{row.table}"]
        not_built = {(score, row.row) for row in table if not row.buildable for score in row.cells}
        for panel in ablation.panels:
            rows = {None, *(point.row for point in panel.points)}
            changed = {(panel.score, point.changes) for point in panel.points if point.changes not in rows}
            assert changed <= not_built, ablation.name
            names = [point.label for point in panel.points]
            assert len(set(names)) == len(names), ablation.name


def test_labels_are_clean_and_stand_at_their_own_points(record):
    """Two networks each with and without a convolution: the same label twice, and points that nearly coincide."""
    printed = papers.load()
    rows = [row for row in printed.rows if (row.paper, row.table) == ("hrformer", "8")]
    made = [counted(record, row.model, macs=(4.49e9, 4.54e9)[n % 2], row=row) for n, row in enumerate(rows)]
    (sketch,) = sketches(rebuild(replace(printed, rows=rows), made), ["Swin"])
    spots = [((4.49, 4.54)[n % 2], row.number("top1")) for n, row in enumerate(rows)]
    assert_clean(sketch.figure, [spots])
    (axes,) = sketch.figure.axes
    pixels = axes.transData.transform(spots)
    told = dict(texts_of(axes))
    for n, row in enumerate(rows):
        change = row.texts["setting"].partition(",")[0]
        box = told[f"{row.label}\n{change}"].extents
        gaps = [np.linalg.norm(np.clip(pixel, box[:2], box[2:]) - pixel) for pixel in pixels]
        assert gaps[n] == pytest.approx(min(gaps)), row.label
