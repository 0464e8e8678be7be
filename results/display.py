"""A table as a reader sees it, and as Markdown and LaTeX show it."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDE, LONG = 11, 50  # columns and rows from which on a table is laid out for its size

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "[": "{[}",  # Behind a line break it would begin an optional argument.
    "]": "{]}",
    "±": "$\\pm$",
    "\u00d7": "$\\times$",
    "→": "$\\to$",
    "†": "$\\dagger$",
    "⚗": " (distilled)",
}


@dataclass(frozen=True)
class Display:
    """A table as a reader sees it: text, and which cells are the best of their column."""

    caption: str
    headings: list[str]
    numeric: list[bool]  # by column: whether it holds numbers
    cells: list[list[str]]
    values: list[list[float | None]]  # the number behind a cell, None where there is none
    best: list[list[bool]]
    measured: list[list[bool]]  # False for a cell that shows a status instead of a number
    footnotes: list[str]  # footnote n is referred to as [n]


def plain(
    caption: str, headings: list[str], cells: list[list[str]], values: list[list[float | None]] | None = None
) -> Display:
    """A table of texts; a column with any of `values` holds numbers."""
    numeric = [bool(values) and any(v is not None for v in column) for column in zip(*values or [[]], strict=True)]
    return Display(
        caption=caption,
        headings=headings,
        numeric=numeric or [False] * len(headings),
        cells=cells,
        values=values or [[None] * len(headings) for _ in cells],
        best=[[False] * len(headings) for _ in cells],
        measured=[[True] * len(headings) for _ in cells],
        footnotes=[],
    )


def markdown(table: Display) -> str:
    """A GitHub table with its caption and footnotes; the best value of a column is bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    body = [
        [f"**{_escape_markdown(c)}**" if b else _escape_markdown(c) for c, b in zip(cells, best, strict=True)]
        for cells, best in zip(table.cells, table.best, strict=True)
    ]
    lines = [_escape_markdown(table.caption) + _legend(table), ""]
    lines += [line([_escape_markdown(h) for h in table.headings])]
    lines += [line(["---:" if numeric else "---" for numeric in table.numeric]), *map(line, body)]
    if table.footnotes:
        lines += ["", *(f"- \\[{n}\\] {_escape_markdown(text)}" for n, text in enumerate(table.footnotes, start=1))]
    return "\n".join(lines) + "\n"


def latex(table: Display, label: str) -> str:
    """A float (needs booktabs and rotating) with caption and footnotes; the best of a column is bold.

    It is scaled to the width of the text, or to its height where there are many rows; one with many columns stands
    sideways.
    """
    wide, long = len(table.headings) > WIDE, len(table.cells) > LONG
    environment = "sidewaystable" if wide and not long else "table"
    box = "{!}{0.8\\textheight}" if long and not wide else "{\\linewidth}{!}"
    lines = [
        "% Needs \\usepackage{booktabs} and \\usepackage{rotating}.",
        f"\\begin{{{environment}}}",
        "  \\centering",
        f"  \\caption{{{escape_latex(table.caption)}{_legend(table)}}}",
        f"  \\label{{tab:{label}}}",
        f"  \\resizebox*{box}{{%",
        f"  \\begin{{tabular}}{{{''.join('r' if numeric else 'l' for numeric in table.numeric)}}}",
        "    \\toprule",
        "    " + " & ".join(map(_heading, table.headings, table.numeric)) + " \\\\",
        "    \\midrule",
    ]
    for cells, best in zip(table.cells, table.best, strict=True):
        texts = [escape_latex(cell) for cell in cells]
        texts = [f"\\textbf{{{text}}}" if bold else text for text, bold in zip(texts, best, strict=True)]
        lines.append("    " + " & ".join(texts) + " \\\\")
    lines += ["    \\bottomrule", "  \\end{tabular}}"]
    if table.footnotes:
        notes = " \\\\ ".join(escape_latex(f"[{n}] {text}") for n, text in enumerate(table.footnotes, start=1))
        lines.append(f"  \\par\\smallskip\\raggedright\\footnotesize {notes}")
    return "\n".join([*lines, f"\\end{{{environment}}}"]) + "\n"


def _heading(heading: str, numeric: bool) -> str:
    """A long heading in several lines, so that the numbers below decide how wide a column is."""
    words = textwrap.wrap(heading, 12, break_long_words=False)
    if len(words) < 2:
        return escape_latex(heading)
    lines = " \\\\ ".join(map(escape_latex, words))
    return f"\\shortstack[{'r' if numeric else 'l'}]{{{lines}}}"


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it verbatim."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _legend(table: Display) -> str:
    return ". Bold: the best for its task, data, head, size and classes." if any(map(any, table.best)) else "."


def _escape_markdown(text: str) -> str:
    # An underscore inside a word is text in GitHub's Markdown.
    return re.sub(r"([\\`*\[\]<>|#~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
