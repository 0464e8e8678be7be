"""The papers' rows: equal to what the texts print, consistent with their sentences, and strict about bad files."""

import csv
import json
from fractions import Fraction
from pathlib import Path

import pytest

from results import papers
from results.papers import COLUMNS, FOLDER, PaperError

FIXTURES = Path(__file__).parent / "papers"
PAPERS = ("hrvit", "hrformer", "hivit", "hiri_vit")
HEADER = "paper,table,row,label,model,dataset,input_size,params_m,gflops,top1\n"
LINE = "mine,1,1,Mine-S,hivit_tiny,ImageNet-1K,224x224,19.2,4.6,82.1\n"


@pytest.fixture(scope="module")
def rows():
    return {(row.paper, row.table, row.row): row for row in papers.load().rows}


def quotes(kind):
    return [
        (paper, item) for paper in PAPERS for item in json.loads((FIXTURES / f"{paper}.json").read_text()).get(kind, [])
    ]


def test_all_files_are_sound_and_have_all_columns():
    loaded = papers.load()
    assert loaded.problems == []
    assert {path.stem for path in papers.files()} == set(PAPERS)
    for path in papers.files():
        with path.open(newline="") as file:
            assert next(csv.reader(file)) == list(COLUMNS)
    numbers = [(row, name, row.number(name)) for row in loaded.rows for name in row.cells if name != "memory"]
    assert all(value > 0 for _, _, value in numbers)
    assert [row for row, name, value in numbers if name.startswith(("top", "miou", "ap")) and value >= 100] == []
    assert all(row.texts["dataset"] and ";" not in row.texts["dataset"] for row in loaded.rows)


def test_what_ties_a_row_to_a_record(rows):
    assert rows["hrvit", "4", 11].config == {"window_size": [1, 2, 9, 9]}
    assert rows["hrvit", "4", 11].head_config == {"channels": 768}
    assert (rows["hrvit", "4", 4].input_size, rows["hrvit", "4", 4].size_of_cost) == ((1024, 1024), (512, 512))
    assert rows["hrvit", "4", 1].num_classes == 150  # the printed count of a baseline is that for ADE20K
    assert rows["hrformer", "5", 19].config == {"window_size": 15}
    assert rows["hrformer", "3", 8].input_size == (256, 192)
    assert rows["hivit", "9", 1].config == {"depths": [0, 0, 24]}
    assert [rows["hivit", "1", n].texts["dataset"] for n in (7, 8, 9)] == ["ImageNet-1K", "COCO", "ADE20K"]
    assert {rows["hivit", "1", n].printed for n in (7, 8, 9)} == {"3"}
    assert rows["hrvit", "5", 3].config == {"key_value_sharing": False}
    default, unknown, pose = rows["hrvit", "5", 1], rows["hrformer", "6", 16], rows["hrformer", "3", 8]
    assert (default.buildable, unknown.buildable, pose.buildable) == (True, False, False)
    assert rows["hivit", "3", 22].trainable
    assert not rows["hivit", "4", 8].trainable  # pre-trained without labels


@pytest.mark.parametrize("paper", PAPERS)
def test_cells_are_those_of_the_text(paper, rows):
    for _, quote in (entry for entry in quotes("quotes") if entry[0] == paper):
        row = rows[paper, quote["table"], quote["row"]]
        own = row.cells | {"label": row.label, "other": None}
        for column, value in quote["cells"].items():
            if column != "other":
                assert own[column] == value, (quote["table"], quote["row"], column)
            if column in row.cells:
                repaired = row.texts["note"]  # a cell that the text has in pieces says so
                assert value in quote["text"] or repaired, (quote["table"], quote["row"], column)


def exact(rows, paper, cell):
    return Fraction(rows[paper, cell["table"], cell["row"]].cells[cell["column"]])


def test_sentences_agree_with_the_tables_or_are_known_not_to(rows):
    checked = 0
    for paper, sentence in quotes("sentences"):
        left = exact(rows, paper, sentence["left"])
        right = exact(rows, paper, sentence["right"]) if "right" in sentence else None
        value = {
            "equals": lambda left, right: left,
            "minus": lambda left, right: left - right,
            "ratio": lambda left, right: left / right,
            "percent_less": lambda left, right: (1 - left / right) * 100,
            "percent_more": lambda left, right: (left / right - 1) * 100,
        }[sentence["relation"]](left, right)
        distance = abs(value - Fraction(str(sentence["value"])))
        holds = distance <= Fraction(str(sentence["tolerance"]))
        assert holds == sentence["holds"], (paper, sentence["text"], float(value))
        assert holds or sentence["why"]
        checked += 1
    assert checked > 150


def test_averages_come_out_of_the_rows_or_are_known_not_to(rows):
    """HRViT's 'Avg improv.' rows, and the average of its abstract."""
    for paper, average in quotes("averages"):
        own, others = (
            [exact(rows, paper, average | {"row": number}) for number in average[name]] for name in ("own", "others")
        )
        own, others = sum(own) / len(own), sum(others) / len(others)
        value = (own / others - 1) * 100 if average["how"] == "means_percent" else own - others
        distance = abs(value - Fraction(str(average["value"])))
        assert (distance <= Fraction(str(average["tolerance"]))) == average["holds"], (average, float(value))
        if average["key"]:
            row = rows[paper, average["table"], average["row"]]
            assert (list(row.own), list(row.others)) == (average["own"], average["others"])
            assert float(row.deltas[average["column"]].strip("%")) == average["value"]


def test_every_table_with_flops_has_a_convention_and_verdicts_name_cells():
    loaded = papers.load()
    missing = {
        (r.paper, r.table) for r in loaded.rows if "gflops" in r.cells and not loaded.convention(r.paper, r.table)
    }
    assert missing == set()
    assert loaded.convention("hrformer", "3") == "hrformer_pose"
    assert loaded.verdicts["hrformer", "3", 9, "gflops"].verdict == "misprint"
    assert all(verdict.evidence for verdict in loaded.verdicts.values())
    assert {verdict.verdict for verdict in loaded.verdicts.values()} == set(papers.WORDS)
    assert [loaded.title(paper) for paper in (*PAPERS, "mine")] == ["HRViT", "HRFormer", "HiViT", "HIRI-ViT", "mine"]


def test_a_paper_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + LINE + "mine,1,2,Mine-B,,ImageNet-1K,,,,84.0\n")
    first, second = papers.read(path)
    assert (first.task, first.input_size, first.number("gflops"), first.config) == (
        "classification",
        (224, 224),
        4.6,
        {},
    )
    assert (first.buildable, second.buildable, second.number("params_m")) == (True, False, None)
    loaded = papers.load([path])
    assert loaded.problems == []
    assert [row.label for row in loaded.tables()["mine", "1"]] == ["Mine-S", "Mine-B"]
    assert loaded.convention("mine", "1") == ""


BAD = {
    "no size": (HEADER + LINE.replace("224x224", ""), "line 2: gflops is 4.6, but there is no input_size"),
    "unknown column": (HEADER.replace("top1", "top_1") + LINE, "unknown column 'top_1'; the columns are paper, table"),
    "column twice": (HEADER.replace("top1", "gflops") + LINE, "the column gflops comes twice"),
    "missing column": (HEADER.replace(",row", "") + LINE, "the column row is missing"),
    "damaged number": (
        HEADER + LINE.replace("82.1", "82,1").replace("82,1", '"82,1"'),
        "top1 is '82,1', which is no number",
    ),
    "nothing printed as 0": (HEADER + LINE.replace("4.6", "0"), "line 2: gflops is '0'; it must be above 0, or empty"),
    "damaged size": (HEADER + LINE.replace("224x224", "224"), "input_size is '224', which is no size such as"),
    "damaged row": (HEADER + LINE.replace("1,1,", "1,one,"), "row is 'one', which is no positive whole number"),
    "repeated row": (HEADER + LINE + LINE, "line 3: row 1 of Table 1 comes twice"),
    "empty label": (HEADER + LINE.replace("Mine-S", ""), "line 2: label is empty"),
    "too few cells": (HEADER + "mine,1,1\n", "line 2: 3 cells under 10 columns"),
    "config": (HEADER.replace("dataset", "config") + LINE, "config is 'ImageNet-1K', which is no JSON object"),
    "derived": (
        HEADER.replace("dataset", "derived") + LINE.replace("ImageNet-1K", '"{""own"": [1], ""others"": [7]}"'),
        "row 1 of Table 1 is derived from row 7: no such row",
    ),
    "changes": (
        HEADER.replace("dataset", "other") + LINE.replace("ImageNet-1K", "changes=7"),
        "row 1 of Table 1 changes row 7: no such other row",
    ),
    "pairs of nothing": (
        HEADER.replace("dataset", "other") + LINE.replace("ImageNet-1K", "pairs=params_m"),
        "pairs is 'params_m'; it names columns of params_m, gflops, top1, miou in a derived row",
    ),
    "changes itself": (
        HEADER.replace("dataset", "other") + LINE.replace("ImageNet-1K", "changes=1"),
        "changes row 1: no such other row",
    ),
    "changes no number": (
        HEADER.replace("dataset", "other") + LINE.replace("ImageNet-1K", "changes=first"),
        "line 2: changes is 'first', which is no number of a row",
    ),
    "empty": ("", "the column paper is missing"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_clear_line_and_the_rest_is_there(case, tmp_path):
    content, message = BAD[case]
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PaperError) as caught:
        papers.read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    loaded = papers.load([path, tmp_path / "absent.csv"])
    assert [problem.partition(str(tmp_path))[0] for problem in loaded.problems] == ["Paper left out: "] * 2
    assert len(loaded.rows) == len(papers.load().rows)
    assert loaded.verdicts


def test_two_files_of_one_paper_and_verdicts_on_nothing_are_told(tmp_path):
    (tmp_path / "a.csv").write_text(HEADER + LINE)
    (tmp_path / papers.CONVENTIONS).write_text("paper,tables,convention,text\nmine,1 2,hivit,as HiViT\n")
    (tmp_path / papers.VERDICTS).write_text("paper,table,row,column,verdict,evidence\nmine,1,1,miou,misprint,none\n")
    other = tmp_path / "other" / "b.csv"
    other.parent.mkdir()
    other.write_text(HEADER + LINE)
    loaded = papers.load([other], folder=tmp_path)
    assert len(loaded.rows) == 1
    assert loaded.convention("mine", "2") == "hivit"
    repeated, verdict = loaded.problems
    assert "the paper mine has a file already" in repeated
    assert "no such cell: mine, Table 1, row 1, miou" in verdict
    assert FOLDER.is_dir()


def test_the_example_of_the_readme_is_sound(tmp_path):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (tmp_path / "mine.csv").write_text(
        "paper,table,row,label" + text.split("```\npaper,table,row,label")[1].split("```")[0]
    )
    first, second = papers.read(tmp_path / "mine.csv")
    assert first.config == {"depths": [1, 1, 12]}
    assert (second.task, second.num_classes) == ("segmentation", 150)
