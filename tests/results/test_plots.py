"""All plots together: which are made of what records, their files and words, and that nothing else changes."""

import struct
from dataclasses import replace

import matplotlib
import pytest

from results import papers, plots, report, style
from results.ledger import Ledger
from results.rebuilt import rebuild

TWO = [("hivit_tiny", "HiViT", 18.7, 4.6, 61.0, 93.4, 58.1), ("deit", "DeiT", 5.7, 1.3, 22.0, 84.2, 41.3)]
AXES = ("macs", "params", "latency", "memory")


def sized(record, sides=(224, 512, 1024), **changes):
    """Cost records of one model at several sizes."""
    return [
        record("cost", key=f"{side}", input_size=[side, side], metrics={"macs": 90000.0 * side**2}, **changes)
        for side in sides
    ]


def test_files_sizes_and_words(ragged_suite, tmp_path):
    drawn = plots.draw(ragged_suite, tmp_path)
    tasks = ("classification_top1", "segmentation_miou")
    names = [*(f"{task}_vs_{axis}" for task in tasks for axis in AXES), "overview"]
    assert [plot.name for plot in drawn.plots] == names
    assert [plot.section for plot in drawn.plots] == ["classification"] * 4 + ["segmentation"] * 4 + [""]
    files = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == files
    for plot in drawn.plots:
        width, height = struct.unpack(">II", plot.path.read_bytes()[16:24])
        assert width == 1600
        assert 900 < height < 1600
        assert plot.path.with_suffix(".svg").read_text().startswith("<?xml")
    assert "Highest: hiri_vit_s with 59.4 % at 105 ms." in drawn.plots[6].alt
    assert drawn.notes == []


def test_no_records_no_plot(record, tmp_path):
    drawn = plots.draw([], tmp_path)
    assert drawn.plots == []
    assert drawn.notes == ["No plots: there is no record of a model yet."]
    drawn = plots.draw([record("cost", metrics={"macs": 1})], tmp_path)
    assert drawn.plots == []
    missing = "compute or parameters or latency or memory"
    assert drawn.notes == [f"No plot of classification against {missing}: no model has both numbers yet."]
    assert list(tmp_path.iterdir()) == []


def test_costs_alone_are_no_reason_to_miss_accuracies(record, tmp_path):
    drawn = plots.draw(sized(record), tmp_path)
    assert [plot.name for plot in drawn.plots] == ["cost_growth", "cost_growth_exponents"]
    assert drawn.notes == []
    blocked = record("evaluate", status="blocked", reason="no data", input_size=[224, 224])
    (note,) = plots.draw([*sized(record), blocked], tmp_path).notes
    assert note.startswith("No plot of classification against compute")


def test_figures_of_papers_come_with_a_measurement_and_a_row_without_a_size_is_told_once(record, tmp_path):
    printed = papers.load()
    job = {"model": "hiri_vit_base", "num_classes": 1000}
    cost = record("cost", model="b", input_size=[448, 448], metrics={"params": 5.44e7, "macs": 9.6e9}, job=job)
    printed.rows = [replace(r, input_size=None) if (r.table, r.row) == ("2", 47) else r for r in printed.rows]
    drawn = plots.draw([cost], tmp_path, rebuild(printed, [cost]))
    assert [plot.name for plot in drawn.plots] == ["papers_hiri_vit_figure_1", "papers_hiri_vit_figure_6"]
    assert {plot.section for plot in drawn.plots} == {"papers"}
    (note,) = drawn.notes
    assert note.startswith("hiri_vit, Table 2, row 47 (HIRI-ViT-B): no input_size")


def test_one_model_of_an_unknown_family_with_an_odd_name(record, tmp_path):
    common = {"model": "$x_{1$ & <b>", "family": "Nobody's $family"}
    score = record("evaluate", key="score", metrics={"top1": 80.0}, input_size=[224, 224], **common)
    drawn = plots.draw([score, *sized(record, **common)], tmp_path)
    names = [plot.name for plot in drawn.plots]
    assert names == ["classification_top1_vs_macs", "overview", "cost_growth", "cost_growth_exponents"]
    (note,) = drawn.notes
    assert note.startswith("No plot of classification against parameters or latency or memory on digit_scenes")


def test_several_data_sets_get_plots_of_their_own(suite, tmp_path):
    records = suite(TWO[:1], tasks=("classification",))
    others = [replace(r, key=r.key + "x", data="ImageNet-1K@1") for r in records if r.stage == "evaluate"]
    names = [plot.name for plot in plots.draw([*records, *others], tmp_path).plots]
    assert "classification_top1_vs_macs_imagenet_1k_1" in names
    assert "classification_top1_vs_macs_digit_scenes_classification_1" in names


def test_the_same_records_give_the_same_files_and_nothing_global_changes(suite, record, tmp_path):
    before = dict(matplotlib.rcParams)
    records = [r for r in suite(TWO, tasks=("classification",)) if r.stage in ("cost", "evaluate")]
    contents = []
    for name in ("a", "b"):
        drawn = plots.draw([*records, *sized(record, model="another")], tmp_path / name)
        contents.append([path.read_bytes() for plot in drawn.plots for path in plot.files])
    assert len(contents[0]) == 2 * 5
    assert contents[0] == contents[1]
    assert dict(matplotlib.rcParams) == before


def test_a_folder_that_cannot_be_written_is_named(record, tmp_path):
    (tmp_path / "plots").write_text("a file in the way")
    with pytest.raises(OSError, match=r"plots/cost_growth\.png"):
        plots.draw(sized(record), tmp_path / "plots")


def test_families_look_different_and_keep_their_look():
    families = [*style.FAMILIES, *(f"family {i}" for i in range(60))]
    looks = style.looks_of(families)
    assert len(set(looks.values())) == len(families) == len(looks)
    own = {looks[family][0] for family in style.FAMILIES}
    assert not own & {looks[family][0] for family in families[4:]}
    assert style.looks_of(["Swin", "HiViT"])["HiViT"] == looks["HiViT"]
    assert style.looks_of(["Swin"]) == {"Swin": style.looks_of([*families, "A", "Swin"], more=["B"])["Swin"]}


def test_the_report_lists_the_growth_and_shows_its_plots(record, tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    for one in sized(record):
        ledger.put(one)
    built = report.build(tmp_path, title="Growth")
    names = {path.relative_to(tmp_path).as_posix() for path in built.files}
    assert {"tables/growth.csv", "plots/cost_growth.png", "plots/cost_growth_exponents.svg"} <= names
    page = built.report.read_text()
    assert 'href="tables/growth.csv"' in page
    assert "Cost against resolution (classification)" in page


def test_colours_are_dark_enough_for_text_on_white():
    """WCAG 2's contrast for normal text: 4.5 to 1."""
    for colour in style.COLOURS:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 4.5, colour
