"""What the page takes apart: cells into numbers, intervals and notes; plots into sections."""

from types import SimpleNamespace

import pytest

from results import page
from results.page import Cell

SVG = '<svg viewBox="0 0 576 374.4"><path id="a&amp;b" style="fill: #fff"/></svg>'


@pytest.mark.parametrize(
    ("text", "settings", "cell"),
    [
        ("61.0 [58.6, 65.3]", {"value": 61.0}, Cell("61.0", "number", 61.0, "58.6 to 65.3")),
        (
            "1,300 [1,200, 1,400]",
            {"value": 1300.0, "best": True},
            Cell("1,300", "number best", 1300.0, "1,200 to 1,400"),
        ),
        ("not run [2]", {"measured": False}, Cell("not run", "number unmeasured", marks=[2])),
        ("5.412 [1] [3]", {"value": 5.412}, Cell("5.412", "number", 5.412, marks=[1, 3])),
        ("hivit_tiny [3]", {"numeric": False}, Cell("hivit_tiny", marks=[3])),
        ("hivit_tiny [4]", {"numeric": False}, Cell("hivit_tiny [4]")),  # There are only three notes.
        ("a [b, c]", {"numeric": False}, Cell("a [b, c]")),
    ],
)
def test_a_cell_is_taken_apart(text, settings, cell):
    settings = {"value": None, "measured": True, "best": False, "numeric": True} | settings
    found = page._cell(text, **settings, notes=3)
    assert (found.text, found.kind, found.value, found.interval, [*found.marks]) == (
        *(cell.text, cell.kind, cell.value, cell.interval),
        [*cell.marks],
    )


def test_plots_go_to_their_section_with_their_size_and_files(tmp_path):
    (tmp_path / "plots").mkdir()

    def plot(name, **more):
        (tmp_path / "plots" / f"{name}.svg").write_text(SVG)
        return SimpleNamespace(name=name, title=name, alt="in words", path=tmp_path / "plots" / f"{name}.png", **more)

    drawn = SimpleNamespace(plots=[plot("classification_a"), plot("overview"), plot("b", section="papers")])
    sections = page._plots(drawn, tmp_path)
    assert {name: [figure["title"] for figure in figures] for name, figures in sections.items() if figures} == {
        "classification": ["classification_a"],
        "papers": ["b"],
    }
    (figure,) = sections["papers"]
    assert (figure["svg"], figure["png"]) == ("plots/b.svg", "plots/b.png")
    assert (figure["width"], figure["height"]) == ("576", "374")
    assert figure["source"].startswith("data:image/svg+xml,%3Csvg")
    assert not set(figure["source"]) & set("<>\"'#&")
