"""The tables of zoo/README.md are current, whole and have their sources."""

import csv
import re
from itertools import zip_longest

import pytest
import timm

import zoo
from benchmarks import model_table
from benchmarks.errors import InputError

UNCOUNTED = " - "
CHEAPEST = {"cswin_nano", "hiri_vit_small", "hivit_tiny", "hivit_tiny_mae", "hrformer_tiny", "hrvit_b1", "mit_b0"}


def written() -> str:
    text = model_table.README.read_text()
    return text[text.index(model_table.BEGIN) : text.index(model_table.END)]


def test_the_tables_are_current(monkeypatch):
    """All of the text; of the MACs one for each family, since counting all takes more than a minute."""
    gmacs = model_table._gmacs

    def some(name, size, *args):
        counted = name in CHEAPEST and (size == 512 or name.endswith("_mae"))
        return gmacs(name, size, *args) if counted else UNCOUNTED.strip()

    monkeypatch.setattr(model_table, "_gmacs", some)
    text = model_table.README.read_text()
    current = model_table.replaced(text, model_table.render())
    for old, new in zip_longest(text.split("|"), current.split("|")):
        assert old == new or (new == UNCOUNTED and re.fullmatch(r" [\d.]+ ", old)), (
            "run python -m benchmarks.model_table"
        )


def test_every_model_has_one_row():
    rows = re.findall(r"^\| `(\w+)` \|", written(), re.MULTILINE)
    assert sorted(rows) == zoo.list_models()
    assert all(rows.index(name) < rows.index(f"{name}_mae") for name in zoo.list_models("hivit_*") if "mae" not in name)


def test_every_accuracy_has_a_model_and_a_source():
    entries = model_table.accuracies()
    for entry in entries:
        assert list(entry) == ["model", "metric", "value", "dataset", "setting", "source", "note"]
        assert entry["model"] in zoo.list_models()
        assert entry["metric"] in ("top-1", "mIoU")
        assert 0 < float(entry["value"]) < 100
        assert entry["dataset"]
        assert entry["setting"]
        assert re.fullmatch(r"(HRViT|HRFormer|HiViT|HIRI-ViT) Table \d+(, row \(.+\))?", entry["source"])
    keys = [(e["model"], e["metric"], e["dataset"], e["setting"], e["source"]) for e in entries]
    assert len(set(keys)) == len(keys)


def test_a_paper_stands_on_top_of_every_family():
    for name in zoo.list_models():
        if not name.endswith("_mae"):
            assert re.fullmatch(r"\[.+ \(.+ \d{4}\).*\]\(https://arxiv.org/abs/[\d.]+\)\.", model_table._paper(name))
        assert timm.get_pretrained_cfg(name).input_size[1] == timm.get_pretrained_cfg(name).input_size[2]


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        f"{model_table.BEGIN}\n",
        f"{model_table.END}\n{model_table.BEGIN}\n",
        f"{model_table.BEGIN}\n{model_table.BEGIN}\n{model_table.END}\n",
    ],
)
def test_wrong_markers_are_told_in_one_line(text, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"zoo/README\.md: the tables need one line"):
        model_table.replaced(text, "")
    readme = tmp_path / "README.md"
    readme.write_text(text)
    monkeypatch.setattr(model_table, "README", readme)
    monkeypatch.setattr(model_table, "render", lambda: pytest.fail("counted before the markers were found"))
    for arguments in ([], ["--check"]):
        assert model_table.main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        assert model_table.END in printed.err
    assert readme.read_text() == text


def test_check_writes_nothing_and_the_command_writes(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{model_table.BEGIN}\nold\n{model_table.END}\nafter\n")
    monkeypatch.setattr(model_table, "README", readme)
    monkeypatch.setattr(model_table, "render", lambda: "new")
    assert model_table.main(["--check"]) == 1
    assert capsys.readouterr().err == "zoo/README.md is not current: run python -m benchmarks.model_table\n"
    assert "old" in readme.read_text()
    assert model_table.main([]) == 0
    assert readme.read_text() == f"before\n\n{model_table.BEGIN}\n\nnew\n\n{model_table.END}\nafter\n"
    assert model_table.main(["--check"]) == 0
    assert not capsys.readouterr().err
    readme.unlink()
    assert model_table.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_every_accuracy_is_one_that_the_rows_of_the_papers_have():
    """Two files tell what is published, for two kinds of readers: they must tell the same."""
    printed: dict[tuple[str, str, str], set[float]] = {}
    for path in (model_table.README.parent.parent / "results" / "papers").glob("h*.csv"):
        for row in csv.DictReader(path.open()):
            values = {float(row[column]) for column in ("top1", "miou", "miou_ms") if row[column]}
            printed.setdefault((row["paper"], row["table"].lstrip("S"), row["model"]), set()).update(values)
    for entry in model_table.accuracies():
        paper, table = re.match(r"(\S+) Table (\w+)", entry["source"]).groups()
        assert float(entry["value"]) in printed[paper.lower().replace("-", "_"), table, entry["model"]], entry
