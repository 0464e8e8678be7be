"""Datasets: what is generated, that it survives interruption and damage, and how a missing one is reported."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import data
from benchmarks.data import __main__ as command
from benchmarks.data import digit_scenes
from benchmarks.errors import Blocked, InputError

CLASSIFICATION, SEGMENTATION = "digit_scenes_classification", "digit_scenes_segmentation"
SMALL = {"train": 40, "validation": 20}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_report(line: str) -> None:
    raise AssertionError(f"reported: {line}")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    return {name: data.prepare(name, root, SMALL, report=lambda line: None) for name in (CLASSIFICATION, SEGMENTATION)}


def test_importing_is_light():
    heavy = "import sys, benchmarks.data; print(*{'torch', 'mmseg', 'numpy', 'sklearn', 'cv2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "\n"


def test_describe():
    assert data.describe(SEGMENTATION).classes == ("background", *"0123456789")
    ade20k = data.describe("ade20k")
    assert len(set(ade20k.classes)) == ade20k.num_classes == 150
    assert ade20k.reduce_zero_label
    assert "bed" in ade20k.classes
    for dataset in data.DATASETS.values():
        assert dataset.num_classes == len(dataset.classes)
    with pytest.raises(InputError, match="did you mean ade20k"):
        data.describe("ade2k")


def test_classification_layout(small):
    folder = small[CLASSIFICATION]
    for split, count in (("train", 40), ("validation", 20)):
        images = sorted((folder / split).glob("*/*.png"))
        assert len(images) == count
        assert {path.parent.name for path in images} == set(data.describe(CLASSIFICATION).classes)
        assert {cv2.imread(path).shape for path in images} == {(48, 48, 3)}


def test_segmentation_layout(small):
    folder = small[SEGMENTATION]
    for split, count in (("training", 40), ("validation", 20)):
        images = sorted((folder / "images" / split).glob("*.jpg"))
        labels = sorted((folder / "annotations" / split).glob("*.png"))
        assert [path.stem for path in images] == [path.stem for path in labels]
        assert len(images) == count
        assert {cv2.imread(path).shape for path in images} == {(64, 64, 3)}
        values = [cv2.imread(path, cv2.IMREAD_UNCHANGED) for path in labels]
        assert {(value.shape, value.dtype.name) for value in values} == {((64, 64), "uint8")}
        assert set(np.unique(values)) == set(range(11))
        assert 0.5 < np.mean(np.equal(values, 0)) < 0.95  # background, mostly


def test_same_options_give_the_same_bytes(small):
    for name in (CLASSIFICATION, SEGMENTATION):
        options = digit_scenes.read_options(name, SMALL)
        again = dict(digit_scenes.files(options))
        stored = {path: content for path, content in contents(small[name]).items() if path != "dataset.json"}
        assert again == stored
        other = dict(digit_scenes.files(dataclasses.replace(options, seed=1)))
        assert all(other[path] != content for path, content in again.items())
        more = dict(digit_scenes.files(dataclasses.replace(options, train=60)))
        assert again.items() <= more.items()  # more images leave the others as they are


def test_no_scan_is_in_training_and_validation():
    train, validation = digit_scenes._split_scans(digit_scenes.ClassificationOptions())
    sizes = [sum(map(len, split)) for split in (train, validation)]
    assert sizes == [1437, 360]
    scans = [{scan.tobytes() for digit in split for scan in digit} for split in (train, validation)]
    assert not scans[0] & scans[1]
    assert min(map(len, validation)) >= 34  # stratified


def test_labels_are_exact_at_edges():
    options = digit_scenes.SegmentationOptions(texture=0.0, gradient=0.0, tint=0.0, contrast=(0.4, 0.4))
    scan = digit_scenes._split_scans(options)[0][8][0]
    for seed in range(5):
        image, label = digit_scenes._scene(options, np.random.default_rng(seed), [(8, scan)])
        grey = image[..., 0].astype(float)
        canvas, ink = np.median(grey[label == 0]), np.median(grey[label == 9])
        assert abs(ink - canvas) == pytest.approx(0.4 * 255, abs=1)
        closer_to_ink = abs(grey - ink) < abs(grey - canvas)
        unclear = abs(abs(grey - ink) - abs(grey - canvas)) <= 2  # rounding to 8 bits
        assert np.array_equal((label == 9)[~unclear], closer_to_ink[~unclear])


def test_upper_digit_wins():
    options = digit_scenes.ClassificationOptions(canvas=96, digit_size=(96.0, 96.0), rotation=0.0, wander=0.0)
    full = np.ones((8, 8), dtype=np.float32)
    half = full * (np.arange(8) < 4).astype(np.float32)
    _, label = digit_scenes._scene(options, np.random.default_rng(0), [(1, full), (2, half)])
    assert set(label[:, 8:40].flat) == {3}
    assert set(label[8:-8, 60:88].flat) == {2}


def test_options_have_folders_of_their_own(small):
    root = small[SEGMENTATION].parent
    assert data.prepare(SEGMENTATION, root, dict(reversed(SMALL.items())), report=refuse_report) == small[SEGMENTATION]
    as_list = data.prepare(SEGMENTATION, root, {**SMALL, "digit_size": [26, 36]}, report=refuse_report)
    assert as_list == small[SEGMENTATION]
    other = data.prepare(SEGMENTATION, root, {**SMALL, "canvas": 96}, report=lambda line: None)
    assert other != small[SEGMENTATION]
    assert "96px" in other.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvass": 64}, "did you mean canvas"),
        ({"canvas": "big"}, "should be an integer"),
        ({"canvas": True}, "should be an integer"),
        ({"texture": "much"}, "should be a number"),
        ({"digit_size": 20}, "should be a pair"),
        ({"digit_size": [40, 20]}, "smallest above its largest"),
        ({"digit_size": [20, 200]}, "does not fit"),
        ({"train": -1}, "should not be negative"),
        ({"train": 5}, "needs canvas >= 8"),
        ({"validation_scans": 0.99}, "should lie between"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        data.prepare(SEGMENTATION, tmp_path, options)
    assert not any(tmp_path.iterdir())


def garble_manifest(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"files": {')


def outdate(folder: Path) -> None:
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**manifest, "version": 0}))


def flip_a_byte(folder: Path) -> None:
    path = next(folder.glob("images/training/*.jpg"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    next(folder.glob("annotations/validation/*.png")).write_bytes(b"")


def remove_one(folder: Path) -> None:
    next(folder.glob("images/training/*.jpg")).unlink()


@pytest.mark.parametrize("damage", [garble_manifest, outdate, flip_a_byte, truncate, remove_one])
def test_damage_is_reported_and_repaired(tmp_path, small, damage):
    folder = data.prepare(SEGMENTATION, tmp_path, SMALL, report=lambda line: None)
    damage(folder)
    assert not data.check(SEGMENTATION, tmp_path, SMALL)[0]
    lines: list[str] = []
    assert data.prepare(SEGMENTATION, tmp_path, SMALL, report=lines.append) == folder
    assert folder.name in lines[0]
    assert "making it again" in lines[0]
    assert contents(folder) == contents(small[SEGMENTATION])
    assert data.check(SEGMENTATION, tmp_path, SMALL)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{folder.name}.lock", folder.name]


def test_complete_data_are_used_as_they_are(small):
    before = {path: path.stat().st_mtime_ns for path in small[SEGMENTATION].rglob("*")}
    data.prepare(SEGMENTATION, small[SEGMENTATION].parent, SMALL, report=refuse_report)
    assert {path: path.stat().st_mtime_ns for path in small[SEGMENTATION].rglob("*")} == before


def test_files_of_the_user_are_never_touched(tmp_path, small):
    taken = tmp_path / small[SEGMENTATION].name
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not made by us"):
        data.prepare(SEGMENTATION, tmp_path, SMALL)
    (taken / "thesis.txt").rename(tmp_path / "thesis.txt")  # empty now: may be used
    data.prepare(SEGMENTATION, tmp_path, SMALL, report=lambda line: None)
    remove_one(taken)
    (tmp_path / "thesis.txt").rename(taken / "thesis.txt")  # damaged and to be remade, but not all of it is ours
    with pytest.raises(InputError, match=r"not part of it, such as thesis\.txt"):
        data.prepare(SEGMENTATION, tmp_path, SMALL)
    assert (taken / "thesis.txt").read_text() == "years of work"


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot read or write the data") as caught:
        data.prepare(SEGMENTATION, tmp_path / "file" / "data", SMALL)
    assert "\n" not in str(caught.value)


def test_full_disk(tmp_path, monkeypatch):
    written = []

    def write_bytes(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 10:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(InputError, match="No space left on device"):
        data.prepare(SEGMENTATION, tmp_path, SMALL, report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


PROGRAM = """
import sys
from pathlib import Path
from benchmarks.data import prepare
options = {"train": 400, "validation": 20}
prepare("digit_scenes_segmentation", Path(sys.argv[1]), options, report=lambda line: print(line, flush=True))
"""


def start(root: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(root)], stdout=subprocess.PIPE, text=True)


def test_killed_while_generating(tmp_path):
    options = {"train": 400, "validation": 20}
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(3):
        process = start(tmp_path)
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob(".*.partial")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    lines: list[str] = []
    folder = data.prepare(SEGMENTATION, tmp_path, options, report=lines.append)
    expected = dict(digit_scenes.files(digit_scenes.read_options(SEGMENTATION, options)))
    found = contents(folder)
    assert json.loads(found.pop("dataset.json"))["files"].keys() == expected.keys()
    assert found == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{folder.name}.lock", folder.name]


def test_an_interrupted_run_is_reported(tmp_path, small):
    partial = tmp_path / f".{small[SEGMENTATION].name}.partial"
    (partial / "images").mkdir(parents=True)
    lines: list[str] = []
    data.prepare(SEGMENTATION, tmp_path, SMALL, report=lines.append)
    assert "interrupted" in lines[0]
    assert small[SEGMENTATION].name in lines[0]
    assert not partial.exists()


def test_two_at_once(tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(output.count("made digit_scenes_segmentation") for output in outputs) == 1
    assert data.check(SEGMENTATION, tmp_path, {"train": 400, "validation": 20})[0]


def test_blocked_survives_pickling():
    import pickle

    blocked = pickle.loads(pickle.dumps(Blocked("no data", looked_in="here", how_to_get="there")))
    assert (str(blocked), blocked.looked_in, blocked.how_to_get) == ("no data", "here", "there")


def test_check_command(small, capsys):
    root = f"root={small[SEGMENTATION].parent}"
    assert command.main(["check", SEGMENTATION, root, "train=40", "validation=20"]) == 0
    assert "complete" in capsys.readouterr().out
    assert command.main(["check", SEGMENTATION, root, "digit_size=[20,30]"]) == 2
    assert "made on first use" in capsys.readouterr().out
    for wrong in ([], ["check", "ade20k"], ["check", "ade", root], ["check", SEGMENTATION, root, "canvas=big"]):
        assert command.main(wrong) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_own_datasets_are_one_entry(tmp_path, monkeypatch):
    """ImageNet's and ADE20K's layouts under names of one's own, of any size."""
    scans = data.Dataset("scans", "classification", num_classes=2, class_names=lambda: ("cat", "dog"))
    tiles = data.Dataset("tiles", "segmentation", num_classes=2, class_names=lambda: ("field", "road"))
    monkeypatch.setattr(data.catalogue, "DATASETS", {"scans": scans, "tiles": tiles})
    with pytest.raises(Blocked, match="expected the folder"):
        data.prepare("scans", tmp_path)
    for split in ("training", "validation"):
        for folder in (
            f"scans/{split}/cat",
            f"scans/{split}/dog",
            f"tiles/images/{split}",
            f"tiles/annotations/{split}",
        ):
            (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(Blocked, match="hold no image: cat, dog"):
        data.prepare("scans", tmp_path)
    with pytest.raises(Blocked, match=r"holds no \.jpg image$"):
        data.prepare("tiles", tmp_path)
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    for split in ("training", "validation"):
        for name in ("cat", "dog"):
            cv2.imwrite(tmp_path / "scans" / split / name / "1.png", pixels)
        cv2.imwrite(tmp_path / "tiles" / "images" / split / "1.jpg", pixels)
        cv2.imwrite(tmp_path / "tiles" / "annotations" / split / "1.png", pixels[..., 0])
    assert data.prepare("scans", tmp_path) == tmp_path / "scans"
    assert data.prepare("tiles", tmp_path) == tmp_path / "tiles"
