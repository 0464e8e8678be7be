"""The tables of all models in zoo/README.md: what each costs, counted here, and what its paper reports.

``python -m benchmarks.model_table`` writes them anew between two markers of that file; with ``--check`` it only says
whether they are current. Either takes about half a minute on one core. Exit status 0: written, or current; 1:
not, with one line that says why.
"""

import argparse
import csv
import inspect
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import timm
from torch import nn

import zoo
from benchmarks.cost import count
from benchmarks.errors import InputError
from benchmarks.trace import on_meta

README = Path(zoo.__file__).with_name("README.md")
ACCURACIES = README.with_name("published_accuracy.csv")
BEGIN, END = "<!-- begin: written by python -m benchmarks.model_table -->", "<!-- end: written -->"
SIZES = (224, 512, 1024)  # pixels: the square images that the dense forms are counted for

# Columns of the counts; the last two are told in the caption where they are one for the family.
PARAMS, DENSE_PARAMS, CHANNELS = "params", "dense params", "channels"
DENSE_MACS = {size: f"dense {size}" for size in SIZES}
MACS, INPUT, STRIDES = "classifier", "at", "strides"

_NOTES = {
    "HRViT": "The published implementation multiplies the padding of the last stripes, which is not computed here: its "
    "count is the same at 224, but ours is 1.7 to 1.9 % lower at 512 and 1.9 to 2.1 % at 1024. The paper's FLOPs leave "
    "out half of the attention products.",
    "HiViT": "The dense forms are made for the size that they are counted for (`img_size`), and their tables of "
    "positions grow with it; the parameters are those at 224. With `published_taps=True` there are four maps, at "
    "strides 4 to 32. A `_mae` has no dense form: it is counted whole, its decoder included, and its encoder sees a "
    "quarter of the patches.",
    "HRNet-ViT": "HRViT's Table 6, whose layout is not published: a reconstruction that keeps HRNetV2's, 3 % off the "
    "printed costs (root mean square; at most 7 %).",
    "Swin": "HRFormer's Table 8, on timm's Swin, of which all else is the same; their dense forms are not counted "
    "here.",
    "HIRI-ViT": "No implementation is published: this is a reconstruction. `_224` has the same weights, with one step "
    "of stride 1 instead of 2: the form that the paper's FLOPs at 224 need.",
}


def row(name: str) -> dict[str, str]:
    """The cells of a model's row by column: parameters in millions, GMACs of one image; empty where it has none."""
    model, pixels = _build(name), timm.get_pretrained_cfg(name).input_size[-1]
    cells = {
        "model": f"`{name}`",
        PARAMS: _millions(model),
        MACS: _gmacs(name, pixels, None),
        INPUT: str(pixels),
        **dict.fromkeys((DENSE_PARAMS, CHANNELS, STRIDES, *DENSE_MACS.values()), ""),
    }
    if isinstance(model, zoo.Backbone):  # an autoencoder has no dense form
        dense = _build(name, SIZES[0])
        # Without a default size nothing in a family depends on it: one dense form serves all sizes.
        made_for = {size: SIZES[0] if model.config.img_size is None else size for size in SIZES}
        cells |= {column: _gmacs(name, size, made_for[size]) for size, column in DENSE_MACS.items()}
        cells[DENSE_PARAMS] = _millions(dense)
        cells[CHANNELS] = _join(dense.feature_info.channels())
        cells[STRIDES] = _join(dense.feature_info.reduction())
    return cells


def accuracies() -> list[dict[str, str]]:
    """The rows of published_accuracy.csv: model, metric, value (percent), dataset, setting, source and note."""
    with ACCURACIES.open(newline="") as file:
        return list(csv.DictReader(file))


def render() -> str:
    """The Markdown between the markers: for every family of the registry its counts and its published accuracies."""
    families: dict[str, list[str]] = {}
    for name in zoo.list_models():
        families.setdefault(zoo.family(name), []).append(name)
    parts = []
    for family, names in families.items():
        rows = sorted((row(name) for name in names), key=lambda cells: (not cells[CHANNELS], float(cells[PARAMS])))
        names = [cells["model"].strip("`") for cells in rows]
        parts += [f"### {family}", " ".join([_paper(names[0]), *_caption(rows)]), _counts(rows)]
        parts += [_NOTES[family]] if family in _NOTES else []
        published = [entry for entry in accuracies() if entry["model"] in names]
        if published:
            parts += ["As published, in percent:", _published(names, published)]
        if notes := [f"- `{entry['model']}`: {entry['note']}" for entry in published if entry["note"]]:
            parts.append("\n".join(notes))
    return "\n\n".join(parts)


def replaced(text: str, tables: str) -> str:
    """`text` with `tables` between its markers.

    Raises:
        InputError: a marker is missing, there twice, or after the other.
    """
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        raise InputError(f"zoo/README.md: the tables need one line '{BEGIN}' and, after it, one line '{END}'")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{tables}\n\n{text[text.index(END) :]}"


def main(arguments: list[str]) -> int:
    """Writes the tables, or checks them; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_table", description="The tables of zoo/README.md."
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if they are not current")
    check = parser.parse_args(arguments).check
    try:
        text = README.read_text()
        replaced(text, "")  # a missing marker is told before anything is counted
        current = replaced(text, render())
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if check and current != text:
        print("zoo/README.md is not current: run python -m benchmarks.model_table", file=sys.stderr)
        return 1
    if not check:
        README.write_text(current)
    return 0


@lru_cache(maxsize=2)  # the whole model and its dense form for the smallest size are needed twice
def _build(name: str, dense_size: int | None = None) -> nn.Module:
    """A model on meta tensors: as it is by default, or its dense form for images of `dense_size` pixels."""
    with on_meta():
        return zoo.create_model(name, features_only=dense_size is not None, img_size=dense_size)


def _gmacs(name: str, size: int, dense_size: int | None) -> str:
    return _number(count(_build(name, dense_size), (3, size, size)).macs / 1e9)


def _millions(model: nn.Module) -> str:
    return _number(sum(p.numel() for p in model.parameters()) / 1e6)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _join(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _paper(name: str) -> str:
    """The title and the link of a model's paper, which stand on top of its file."""
    module = inspect.getmodule(timm.models.model_entrypoint(name))
    title, link = module.__doc__.partition("\n")[0].rstrip("."), re.search(r"https?://\S+", module.__doc__)
    return f"[{title}]({link[0]})." if link else f"{title}."


def _one(rows: list[dict[str, str]], column: str) -> str:
    """The value of a column that is one for all rows that have it, or an empty string."""
    values = {cells[column] for cells in rows} - {""}
    return values.pop() if len(values) == 1 else ""


def _caption(rows: list[dict[str, str]]) -> list[str]:
    told = {"Maps at strides {}.": _one(rows, STRIDES), "Classifiers at {} pixels.": _one(rows, INPUT)}
    return [sentence.format(value) for sentence, value in told.items() if value]


def _counts(rows: list[dict[str, str]]) -> str:
    columns = ["model", PARAMS, DENSE_PARAMS, *DENSE_MACS.values(), MACS, INPUT, CHANNELS, STRIDES]
    columns = [c for c in columns if c not in (INPUT, STRIDES) or not _one(rows, c)]
    alignment = ["---" if c in ("model", CHANNELS, STRIDES) else "--:" for c in columns]
    return _table(columns, alignment, [[cells[c] for c in columns] for cells in rows])


def _published(names: list[str], published: list[dict[str, str]]) -> str:
    """One row per dataset, setting and source, one column per model that has any accuracy."""
    names = [name for name in names if any(entry["model"] == name for entry in published)]
    rows: dict[str, dict[str, str]] = {}
    for entry in published:
        label = f"{entry['dataset']} {entry['metric']}, {entry['setting']} ({entry['source']})"
        rows.setdefault(label, {})[entry["model"]] = entry["value"]
    cells = [[label, *(values.get(name, "") for name in names)] for label, values in rows.items()]
    return _table(["", *(f"`{name}`" for name in names)], ["---", *("--:" for _ in names)], cells)


def _table(header: list[str], alignment: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, alignment, *rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
