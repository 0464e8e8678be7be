"""What every dataset is: its classes, its folders, how many files it should hold, and how to get it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.errors import choose


@dataclass(frozen=True)
class Dataset:
    """A dataset as the measurements see it. Folders lie below the one that `prepare` returns.

    Classification data lie in ImageNet's layout (`<split>/<class name>/<image>`), segmentation data in ADE20K's
    (`images/<split>/<name>.jpg` beside `annotations/<split>/<name>.png`, one byte per pixel). `training` and
    `validation` are the names of the splits' folders.
    """

    name: str
    task: str  # "classification" or "segmentation"
    num_classes: int  # background included, where it is a class
    class_names: Callable[[], tuple[str, ...]] = field(repr=False)  # called late: some names live in mmsegmentation
    version: int = 1  # of our generator, or of the published release
    folder: str = ""  # below the data folder, for published data; default: the name
    reduce_zero_label: bool = False  # label 0 means "ignore", classes start at 1 (mmsegmentation's meaning)
    training: str = "training"
    validation: str = "validation"
    training_count: int | None = None  # images expected; None where any number will do
    validation_count: int | None = None
    generated: bool = False  # made here on first use, nothing to download
    source: str = ""  # how to get it

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their labels."""
        return self.class_names()


def _digits() -> tuple[str, ...]:
    return tuple("0123456789")


def _background_and_digits() -> tuple[str, ...]:
    return ("background", *_digits())


def _ade20k_names() -> tuple[str, ...]:
    from mmseg.utils import get_classes  # seconds to import

    return tuple(name.strip() for name in get_classes("ade20k"))


_SCANS = "made on first use from the 1,797 scanned digits that scikit-learn brings; nothing to download"

DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="digit_scenes_classification",
            task="classification",
            num_classes=10,
            class_names=_digits,
            training="train",
            generated=True,
            source=_SCANS,
        ),
        Dataset(
            name="digit_scenes_segmentation",
            task="segmentation",
            num_classes=11,
            class_names=_background_and_digits,
            generated=True,
            source=_SCANS,
        ),
        Dataset(
            name="ade20k",
            task="segmentation",
            version=2016,
            folder="ADEChallengeData2016",
            num_classes=150,
            class_names=_ade20k_names,
            reduce_zero_label=True,
            training_count=20_210,
            validation_count=2_000,
            source="download ADEChallengeData2016.zip (about 1 GB) from "
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and unpack it into the data folder",
        ),
    )
}


def describe(name: str) -> Dataset:
    """The dataset called `name`.

    Raises:
        InputError: there is none of that name; the message lists the nearest ones.
    """
    return DATASETS[choose("dataset", name, DATASETS)]
