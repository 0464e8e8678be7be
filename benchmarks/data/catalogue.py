"""What every dataset is: its classes, its folders, how many files it should hold, and how to get it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.errors import choose


@dataclass(frozen=True)
class Dataset:
    """A dataset as the measurements see it. Folders lie below the one that `prepare` returns.

    Classification data lie in ImageNet's layout (`<split>/<class name>/<image>`, or tar files in `<split>/`: one for
    each class, called after it, or any number with folders for the classes inside), segmentation data in ADE20K's
    (`images/<split>/<name>.jpg` beside `annotations/<split>/<name>.png`, one byte per pixel) unless `images`,
    `annotations`, their suffixes and `split_list` say otherwise. `training` and `validation` are the names of the
    splits.
    """

    name: str
    task: str  # "classification" or "segmentation"
    num_classes: int  # background included, where it is a class
    class_names: Callable[[], tuple[str, ...]] = field(default=tuple, repr=False)  # called late: names take seconds
    mmseg_class: str = ""  # mmsegmentation's class of the dataset, which has the names and colours of its classes
    version: int = 1  # of our generator, or of the published release
    folder: str = ""  # below the data folder, for published data; default: the name
    reduce_zero_label: bool = False  # label 0 means "ignore", classes start at 1 (mmsegmentation's meaning)
    training: str = "training"
    validation: str = "validation"
    training_count: int | None = None  # images expected; None where any number will do
    validation_count: int | None = None
    images: str = "images/{split}"  # of a segmentation: the folder of a split's images, with any folders below it
    annotations: str = "annotations/{split}"  # the same folders and names there
    image_suffix: str = ".jpg"
    annotation_suffix: str = ".png"
    split_list: str = ""  # a file with the names of the split's images, without suffix; empty: all in the folder
    generated: bool = False  # made here on first use, nothing to download
    source: str = ""  # how to get it

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their labels."""
        if not self.mmseg_class:
            return self.class_names()
        import mmseg.datasets  # seconds

        return tuple(name.strip() for name in getattr(mmseg.datasets, self.mmseg_class).METAINFO["classes"])


def _digits() -> tuple[str, ...]:
    return tuple("0123456789")


def _background_and_digits() -> tuple[str, ...]:
    return ("background", *_digits())


def _imagenet_names() -> tuple[str, ...]:
    from timm.data import ImageNetInfo  # seconds

    return tuple(ImageNetInfo("imagenet-1k").label_names())  # WordNet's, as the folders are called


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
            mmseg_class="ADE20KDataset",
            reduce_zero_label=True,
            training_count=20_210,
            validation_count=2_000,
            source="download ADEChallengeData2016.zip (about 1 GB) from "
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and unpack it into the data folder",
        ),
        Dataset(
            name="imagenet1k",
            task="classification",
            version=2012,
            folder="imagenet",
            num_classes=1000,
            class_names=_imagenet_names,
            training="train",
            validation="val",
            training_count=1_281_167,
            validation_count=50_000,
            source="register at https://www.image-net.org, download the training and validation images of ILSVRC2012 "
            "(about 145 GB), and sort them into imagenet/train and imagenet/val with a folder for each class (n014...) "
            "or leave the training images in the 1,000 tar files of ILSVRC2012_img_train.tar",
        ),
        Dataset(
            name="cityscapes",
            task="segmentation",
            num_classes=19,
            mmseg_class="CityscapesDataset",
            training="train",
            validation="val",
            training_count=2_975,
            validation_count=500,
            images="leftImg8bit/{split}",
            annotations="gtFine/{split}",
            image_suffix="_leftImg8bit.png",
            annotation_suffix="_gtFine_labelTrainIds.png",
            source="register at https://www.cityscapes-dataset.com, unpack leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip (about 12 GB) into cityscapes/, and make the 19-class labels with "
            "csCreateTrainIdLabelImgs of the package cityscapesscripts",
        ),
        *(
            Dataset(
                name=f"pascal_context_{num_classes}",
                task="segmentation",
                version=2010,
                folder="VOC2010",
                num_classes=num_classes,
                mmseg_class=mmseg_class,
                reduce_zero_label=num_classes == 59,  # the background, which is no class there
                training="train",
                validation="val",
                training_count=4_998,
                validation_count=5_105,
                images="JPEGImages",
                annotations="SegmentationClassContext",
                split_list="ImageSets/SegmentationContext/{split}.txt",
                source="unpack VOCtrainval_03-May-2010.tar of PASCAL VOC 2010, take its VOCdevkit/VOC2010, and add "
                "the labels and lists of PASCAL-Context (trainval_merged.json) with mmsegmentation's "
                "tools/dataset_converters/pascal_context.py",
            )
            for num_classes, mmseg_class in ((59, "PascalContextDataset59"), (60, "PascalContextDataset"))
        ),
        Dataset(
            name="coco_stuff10k",
            task="segmentation",
            num_classes=171,
            mmseg_class="COCOStuffDataset",
            reduce_zero_label=True,
            training="train2014",
            validation="test2014",
            training_count=9_000,
            validation_count=1_000,
            annotation_suffix="_labelTrainIds.png",
            source="download cocostuff-10k-v1.1.zip (2 GB) from https://github.com/nightrome/cocostuff10k and convert "
            "it to coco_stuff10k/ with mmsegmentation's tools/dataset_converters/coco_stuff10k.py",
        ),
    )
}


def describe(name: str) -> Dataset:
    """The dataset called `name`.

    Raises:
        InputError: there is none of that name; the message lists the nearest ones.
    """
    return DATASETS[choose("dataset", name, DATASETS)]
