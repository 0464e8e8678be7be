"""Published datasets, in miniature: what is there, missing or damaged is said; labels are what was drawn."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import mmseg.datasets
import numpy as np
import pytest
import torch
from miniatures import PUBLISHED, Miniature, expect, make, make_imagenet, write
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import data
from benchmarks.data import __main__ as command
from benchmarks.data.images import open_images
from benchmarks.data.scenes import LoadImage, LoadLabels, open_scenes
from benchmarks.errors import Blocked, Damaged

PACK = {"type": "PackSegInputs"}


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmseg")


@pytest.fixture(params=PUBLISHED)
def miniature(request, tmp_path, monkeypatch) -> Miniature:
    expect(monkeypatch, request.param, training_count=3, validation_count=2)
    return make(request.param, tmp_path)


@pytest.fixture
def ade20k(tmp_path, monkeypatch) -> Miniature:
    expect(monkeypatch, "ade20k", training_count=3, validation_count=2)
    return make("ade20k", tmp_path)


def assert_matches(message: str, line: str) -> None:
    assert re.search(message, line), line


def refusal(name: str, root: Path) -> str:
    """The one line that says why a dataset cannot be used; the same for a job and for the command."""
    with pytest.raises(Blocked) as caught:
        data.prepare(name, root)
    assert "\n" not in str(caught.value)
    assert caught.value.how_to_get == data.describe(name).source
    complete, line = data.check(name, root)
    assert not complete
    assert str(caught.value) == f"{name}: {line}"
    return line


@pytest.mark.parametrize(
    ("name", "classes", "training", "validation"),
    [
        ("imagenet1k", 1000, 1_281_167, 50_000),
        ("ade20k", 150, 20_210, 2_000),
        ("cityscapes", 19, 2_975, 500),
        ("pascal_context_59", 59, 4_998, 5_105),
        ("pascal_context_60", 60, 4_998, 5_105),
        ("coco_stuff10k", 171, 9_000, 1_000),
    ],
)
def test_published_datasets_have_the_papers_numbers(name, classes, training, validation):
    """HRViT, A.2; HRFormer, 4.2 and 4.3; HIRI-ViT, 4.1."""
    described = data.describe(name)
    assert described.num_classes == len(described.classes) == len(set(described.classes)) == classes
    assert (described.training_count, described.validation_count) == (training, validation)


def test_complete_datasets(miniature):
    """All of a miniature is found, from the folder that holds it and from its own."""
    name, top = miniature.name, miniature.folder
    assert data.prepare(name, miniature.root) == data.prepare(name, top) == top
    assert data.check(name, miniature.root) == (True, f"{top}: 3 training and 2 validation images")


def test_label_maps_are_what_was_drawn(miniature):
    """Zero labels, train ids, 59 and 60 and 171 classes: numbers of classes from 0, and 255 where there is none."""
    described = data.describe(miniature.name)
    for split, training in ((described.training, True), (described.validation, False)):
        pipeline = [LoadImage(), LoadLabels(described), PACK]
        scenes = open_scenes(described, miniature.folder, training, pipeline)
        assert type(scenes) is getattr(mmseg.datasets, described.mmseg_class)
        assert tuple(name.strip() for name in scenes.metainfo["classes"]) == described.classes
        assert len(scenes.metainfo["palette"]) == described.num_classes
        assert len(scenes) == len(miniature.drawn[split])
        for index, drawn in enumerate(miniature.drawn[split]):
            sample = scenes[index]
            assert Path(sample["data_samples"].img_path) == miniature.images[split][index]
            assert np.array_equal(sample["data_samples"].gt_sem_seg.data[0].numpy(), drawn)
            image = cv2.imread(str(miniature.images[split][index]))
            assert np.array_equal(sample["inputs"].permute(1, 2, 0).numpy(), image)
            assert set(range(described.num_classes)) <= set(np.unique(drawn).tolist())


def test_class_names_stand_where_the_labels_say():
    """The first and the last class of each dataset, by the papers' datasets' own lists."""
    ends = {name: data.describe(name).classes for name in PUBLISHED}
    assert {name: (classes[0], classes[-1]) for name, classes in ends.items()} == {
        "ade20k": ("wall", "flag"),
        "cityscapes": ("road", "bicycle"),
        "pascal_context_59": ("aeroplane", "wood"),
        "pascal_context_60": ("background", "wood"),
        "coco_stuff10k": ("person", "wood"),
    }


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("rm -r *", "ADEChallengeData2016; .* holds nothing"),
        ("mv ADEChallengeData2016 ADE20K_2021", "holds ADE20K_2021"),
        ("cd A*/images; mv training train", "training; .* holds train, valid"),
        ("rm -r A*/annotations", "annotations does not exist"),
        ("rm A*/*/training/*", r"holds no \.jpg image, expected are 3"),
        ("rm A*/annotations/training/*", r"3 images have no .png .*_00000000, .*1, .*2$"),
        ("rm A*/images/validation/*1.jpg", "1 annotations have no .jpg in .*: ADE_val_00000001"),
        ("rm A*/*/validation/*1.*", "holds 1 images, expected are 2"),
        (": > A*/images/training/ADE_train_00000002.jpg", "1 files in .*training are empty: ADE_train_00000002.jpg"),
    ],
)
def test_what_is_missing_is_named(ade20k, broken, message):
    subprocess.run(["bash", "-c", broken.replace("A*", "ADEChallengeData2016")], cwd=ade20k.root, check=True)
    assert_matches(message, refusal("ade20k", ade20k.root))


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("cityscapes", "rm gtFine/train/*/*TrainIds.png", "3 images have no _gtFine_labelTrainIds.png"),
        ("cityscapes", "rm -r leftImg8bit/val/ulm", "holds no _leftImg8bit.png image, expected are 2"),
        ("pascal_context_59", "rm JPEGImages/2010_000001*", "1 images of the split .*: 2010_000001"),
        ("pascal_context_60", "rm -r ImageSets", r"expected the file .*/train\.txt, which"),
        ("pascal_context_59", "rm SegmentationClassContext/2010_000001*", "1 images have no .png"),
        ("coco_stuff10k", "rm images/test2014/*", "holds no .jpg image, expected are 2"),
    ],
)
def test_what_is_missing_of_other_layouts_is_named(tmp_path, monkeypatch, name, broken, message):
    expect(monkeypatch, name, training_count=3, validation_count=2)
    folder = make(name, tmp_path).folder
    subprocess.run(broken, shell=True, cwd=folder, check=True)
    assert_matches(message, refusal(name, tmp_path))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def overwrite(path: Path) -> None:
    path.write_bytes(b"<html>404 Not Found</html>" * 9)


@pytest.mark.parametrize("damage", [cut, overwrite])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_damaged_files_are_named(miniature, damage, kind):
    """Truncated images, and what is no image at all."""
    split = data.describe(miniature.name).training
    path = getattr(miniature, kind)[split][1]
    damage(path)
    line = refusal(miniature.name, miniature.root)
    assert_matches(r"1 files in \S+ are damaged: \S*" + re.escape(path.name), line)


def test_a_strange_end_is_no_damage(ade20k):
    """Bytes behind the end of a JPEG are common in the published sets."""
    path = ade20k.images["training"][0]
    path.write_bytes(path.read_bytes() + b"\0" * 40)
    assert data.check("ade20k", ade20k.root)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: overwrite(made.images["training"][1]), "cannot read the image .*ADE_train_00000001.jpg: "),
        (lambda made: cut(made.labels["training"][1]), "cannot read the labels .*ADE_train_00000001.png: "),
        (
            lambda made: write(made.labels["training"][1], np.full((84, 63), 200, np.uint8)),
            "the labels .*_00000001.png hold class 199, but the 150 classes are 0 to 149, and 255 for none",
        ),
        (
            lambda made: write(made.labels["training"][1], np.ones((63, 84), np.uint8)),
            r"the labels .*_00000001.png are of size \(63, 84\), but their image of \(84, 63\)",
        ),
        (
            lambda made: write(made.labels["training"][1], np.ones((84, 63, 3), np.uint8)),
            "the labels .*_00000001.png are no map of one byte per pixel",
        ),
    ],
)
def test_damage_found_while_reading_is_one_line(ade20k, change, message):
    change(ade20k)
    described = data.describe("ade20k")
    scenes = open_scenes(described, ade20k.folder, True, [LoadImage(), LoadLabels(described), PACK])
    with pytest.raises(Damaged) as caught:
        list(map(scenes.__getitem__, range(3)))
    assert_matches("^" + message, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tars", [False, True])
def test_imagenet(tmp_path, monkeypatch, tars):
    """Class folders, or the tar files of the classes: the same images under the same labels."""
    names = data.describe("imagenet1k").classes
    expect(monkeypatch, "imagenet1k", training_count=2000, validation_count=1000)
    folder = make_imagenet(tmp_path, names, tars)
    counts = [f"{count}{' (in 1,000 tar files)' if tars else ''}" for count in ("2,000", "1,000")]
    assert data.check("imagenet1k", tmp_path) == (
        True,
        f"{folder}: {counts[0]} training and {counts[1]} validation images",
    )
    described = data.describe("imagenet1k")
    dice = np.random.default_rng(7)
    drawn = [dice.integers(0, 256, (12, 10, 3), dtype=np.uint8) for _ in range(3000)]
    for training, first, number in ((True, 0, 2), (False, 2000, 1)):
        images = open_images(described, folder, training, pil_to_tensor)
        assert images.labels == [label for label in range(1000) for _ in range(number)]
        for index in (0, 1, len(images) - 1):
            pixels, label = images[index]
            assert label == images.labels[index]
            written = cv2.imdecode(cv2.imencode(".jpg", drawn[first + index])[1], cv2.IMREAD_COLOR)
            assert np.abs(pixels.permute(1, 2, 0).numpy()[..., ::-1].astype(int) - written).max() <= 3  # two decoders


@pytest.fixture
def ten_classes(monkeypatch) -> tuple[str, ...]:
    names = data.describe("imagenet1k").classes[:10]
    ten = {"num_classes": 10, "class_names": lambda: names}
    expect(monkeypatch, "imagenet1k", training_count=20, validation_count=10, **ten)
    return names


@pytest.mark.parametrize(
    ("tars", "broken", "message"),
    [
        (False, "rm -r val/n01440764", "val holds images of 9 classes, expected are 10; none of n01440764"),
        (
            False,
            "mv val/n01440764 val/tench; mv val/n01443537 val/goldfish",
            "val holds images of 2 classes that imagenet1k has not: goldfish, tench; .* as n01440764, n01443537, ",
        ),
        (False, "mkdir val/x; mv val/n0*/* val/x", "imagenet1k has not: x; "),
        (False, "rm val/n01440764/*", "1 folders of .*val hold no image: n01440764"),
        (False, "rm train/n01440764/*_1.JPEG", "train holds 19 images, expected are 20"),
        (False, ": > train/n01440764/n01440764_1.JPEG", "1 files in .*train are empty: n01440764/n01440764_1.JPEG"),
        (False, "truncate -s -60 train/n01440764/n01440764_1.JPEG", "are damaged: n01440764/n01440764_1.JPEG"),
        (True, "rm val/n01440764.tar", "val holds images of 9 classes, expected are 10; none of n01440764"),
        (True, "mv val/n01440764.tar val/tench.tar", "val holds images of 1 classes that imagenet1k has not: tench; "),
        (True, "mv val/n01440764.tar shard-0000.tar", "val holds images of 9 classes"),
        (True, "cp train/n01440764.tar val", "val holds 11 images, expected are 10"),
        (True, ": > train/n01440764.tar", "train/n01440764.tar is damaged: empty file"),
        (True, "rm -r train", "expected the folder .*train; .* holds val"),
    ],
)
def test_what_is_wrong_with_imagenet_is_named(tmp_path, ten_classes, tars, broken, message):
    folder = make_imagenet(tmp_path, ten_classes, tars)
    assert data.check("imagenet1k", tmp_path)[0]
    subprocess.run(broken, shell=True, cwd=folder, check=True)
    assert_matches(message, refusal("imagenet1k", tmp_path))


@pytest.mark.parametrize("tars", [False, True])
def test_an_image_that_is_lost_later_is_named(tmp_path, ten_classes, tars):
    """The job is blocked by it, as by a damaged one; no other image takes its place."""
    folder = make_imagenet(tmp_path, ten_classes, tars)
    images = open_images(data.describe("imagenet1k"), folder, True, pil_to_tensor)
    lost = folder / "train" / (f"{ten_classes[3]}.tar" if tars else f"{ten_classes[3]}/{ten_classes[3]}_0.JPEG")
    lost.unlink()
    assert isinstance(images[5][0], torch.Tensor)
    with pytest.raises(Damaged, match=f"^cannot read the image {lost}: No such file or directory$"):
        images[6]


@pytest.mark.parametrize("tars", [False, True])
def test_a_damaged_image_is_named_and_never_replaced(tmp_path, ten_classes, tars):
    folder = make_imagenet(tmp_path, ten_classes, tars)
    if tars:
        path = folder / "train" / f"{ten_classes[3]}.tar"
        content = bytearray(path.read_bytes())
        content[512:612] = bytes(100)  # the first image's beginning, behind the header
        path.write_bytes(content)
    else:
        overwrite(folder / "train" / ten_classes[3] / f"{ten_classes[3]}_0.JPEG")
    images = open_images(data.describe("imagenet1k"), folder, True, pil_to_tensor)
    assert isinstance(images[5][0], torch.Tensor)
    with pytest.raises(Damaged, match=f"^cannot read the image .*{ten_classes[3]}_0.JPEG: cannot identify") as caught:
        images[6]
    if not tars:  # a worker process says the same
        with pytest.raises(Damaged, match="^" + re.escape(str(caught.value)[:60])):
            list(DataLoader(images, batch_size=None, num_workers=1))


def pack(path: Path, names: Sequence[str]) -> None:
    """A tar file of small images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content, second: content[:700], "is damaged: unexpected end of data"),
        (lambda content, second: content[:second], "is cut off or damaged behind its first 1 images"),
        (
            lambda content, second: content[:second] + b"x" * 512 + content[second + 512 :],
            "is cut off or damaged behind its first 1 images",
        ),
    ],
)
def test_a_damaged_tar_file_is_named(tmp_path, ten_classes, damage, message):
    path = make_imagenet(tmp_path, ten_classes, tars=True) / "train" / f"{ten_classes[3]}.tar"
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    path.write_bytes(damage(path.read_bytes(), second))
    assert refusal("imagenet1k", tmp_path) == f"{path} {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place, names: pack(place / f"{names[0]}.tar", [f"{names[0]}_0.JPEG"]), "holds 19 images, expected"),
        (lambda place, names: pack(place / f"{names[0]}.tar", ["notes.txt"]), "9 classes, .*; none of n01440764$"),
        # Shards whose images' classes stand in files beside them, and by chance as many as there are classes.
        (
            lambda place, names: [
                (place / f"{name}.tar").rename(place / f"imagenet-{i:04d}.tar") for i, name in enumerate(names)
            ],
            "10 classes that imagenet1k has not: imagenet-0000, .*; the folders or tar files must be called after its",
        ),
    ],
)
def test_what_a_job_would_read_from_tar_files_is_what_is_checked(tmp_path, ten_classes, change, message):
    """An image or a class that is lost; shards. Whoever opens the images without a check is refused as well."""
    folder = make_imagenet(tmp_path, ten_classes, tars=True)
    change(folder / "train", ten_classes)
    line = refusal("imagenet1k", tmp_path)
    assert_matches(message, line)
    with pytest.raises(Damaged, match=f"^{re.escape(line)}$"):
        open_images(data.describe("imagenet1k"), folder, True, pil_to_tensor)


def test_tar_files_may_have_folders_for_the_classes(tmp_path, ten_classes):
    """Any number of them, under any name. What archivers put before and beside the names is no class and no image."""
    for split, count in (("train", 2), ("val", 1)):
        for shard in range(count):
            names = [f"./{name}/{name}_{shard}.JPEG" for name in ten_classes]
            pack(tmp_path / "imagenet" / split / f"{shard}.tar", [*names, "./n01440764/._n01440764_0.JPEG"])
    assert data.check("imagenet1k", tmp_path)[0]
    images = open_images(data.describe("imagenet1k"), tmp_path / "imagenet", True, pil_to_tensor)
    assert images.labels == [label for label in range(10) for _ in range(2)]
    assert images[7][0].shape == (3, 8, 8)
    assert images.reader.filename(7) == f"{tmp_path}/imagenet/train/1.tar: ./{ten_classes[3]}/{ten_classes[3]}_1.JPEG"


def test_tar_files_are_read_in_part_and_nothing_is_written_beside_them(tmp_path, ten_classes):
    """As large as ImageNet's, where timm's reader reads all of them and leaves a pickle in the dataset's folder."""
    folder = make_imagenet(tmp_path, ten_classes, tars=True)
    path = folder / "train" / f"{ten_classes[9]}.tar"
    pack(path, [f"{ten_classes[9]}_0.JPEG"])
    member = tarfile.TarInfo(f"{ten_classes[9]}_1.JPEG")
    member.size = 40 * 1024**3
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    with open(path, "r+b") as file:  # with a hole where the image would be
        file.seek(end)
        file.write(member.tobuf())
        file.truncate(file.tell() + member.size + 1024)
    started = time.monotonic()
    assert len(open_images(data.describe("imagenet1k"), folder, True, pil_to_tensor)) == 20
    assert time.monotonic() - started < 5
    assert sorted(file.name for file in path.parent.iterdir()) == [f"{name}.tar" for name in ten_classes]


def test_both_splits_have_the_same_classes(tmp_path, monkeypatch):
    """Of a dataset of one's own that names none: else label 0 would be another class in training than in validation."""
    own = data.Dataset("scans", "classification", num_classes=2)
    monkeypatch.setitem(data.DATASETS, "scans", own)
    for split, names in (("training", ("cat", "dog")), ("validation", ("cat", "hound"))):
        for name in names:
            write(tmp_path / "scans" / split / name / "1.png", np.zeros((8, 8, 3), np.uint8))
    assert_matches("have not the same classes: only one of them has dog, hound$", refusal("scans", tmp_path))


def test_labels_are_the_places_of_the_named_classes(tmp_path, monkeypatch):
    names = ("dog", "cat")
    own = data.Dataset("scans", "classification", num_classes=2, class_names=lambda: names)
    for name in names:
        write(tmp_path / "training" / name / "1.png", np.zeros((8, 8, 3), np.uint8))
        (tmp_path / "training" / name / "._1.png").write_bytes(b"what some systems leave")
    images = open_images(own, tmp_path, True, pil_to_tensor)
    assert [(Path(images.reader.filename(i)).parent.name, images.labels[i]) for i in range(len(images))] == [
        ("cat", 1),
        ("dog", 0),
    ]
    assert [label for _, label in images] == [1, 0]


def test_check_command_is_quick_and_its_status_tells(ade20k, capsys):
    assert command.main(["check", "ade20k", f"root={ade20k.root}"]) == 0
    assert "ade20k: complete" in capsys.readouterr().out
    started = time.monotonic()
    program = [sys.executable, "-m", "benchmarks.data", "check", "cityscapes", f"root={ade20k.root}"]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "expected the folder" in run.stdout
    assert "how to get it: register at" in run.stdout
    assert time.monotonic() - started < 10
