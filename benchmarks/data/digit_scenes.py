"""Digit scenes: real scanned digits, small on a larger textured canvas; two tasks, deterministic, made in seconds.

The digits are scikit-learn's bundled copy of the "Optical Recognition of Handwritten Digits" test set (1,797 scans of
8 x 8 pixels, UCI Machine Learning Repository). They are split into training and validation scans first, so that no scan
is in both. Every image has its own random stream, keyed by seed, split and index.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.errors import InputError, choose

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class _Options:
    """The knobs that both tasks share; pairs are (smallest, largest) of a uniform draw."""

    canvas: int  # side of the square image, pixels
    train: int  # images
    validation: int  # images
    digit_size: tuple[float, float]  # side of a digit's 8 x 8 scan on the canvas, pixels
    contrast: tuple[float, float]  # ink against the canvas's mean brightness, of the full range
    brightness: tuple[float, float] = (0.2, 0.35)  # mean of the canvas; below the contrast, ink is always brighter
    wander: float = 3.0  # largest shift of a digit from its place, in either direction, pixels
    rotation: float = 5.0  # largest turn of a digit either way, degrees
    tint: float = 0.03  # standard deviation of the ink's and the canvas's colour around grey, of the full range
    texture: float = 0.05  # standard deviation of the smooth multi-scale noise, of the full range
    gradient: float = 0.1  # largest brightness step from one edge of the canvas to the other, of the full range
    validation_scans: float = 0.2  # share of the scans that only validation images use
    seed: int = 0


@dataclass(frozen=True)
class ClassificationOptions(_Options):
    """One digit per image; its place is the middle."""

    canvas: int = 48
    train: int = 4000
    validation: int = 500
    digit_size: tuple[float, float] = (22.0, 26.0)
    contrast: tuple[float, float] = (0.45, 0.6)


@dataclass(frozen=True)
class SegmentationOptions(_Options):
    """Several digits per image, later ones over earlier ones; their places are the middles of the quarters."""

    canvas: int = 64
    train: int = 2000
    validation: int = 200
    digit_size: tuple[float, float] = (26.0, 36.0)
    contrast: tuple[float, float] = (0.4, 0.6)
    digits: tuple[int, int] = (3, 4)  # per image
    jpeg_quality: int = 95


OPTIONS = {
    "digit_scenes_classification": ClassificationOptions,
    "digit_scenes_segmentation": SegmentationOptions,
}


def read_options(name: str, given: Mapping[str, Any]) -> ClassificationOptions | SegmentationOptions:
    """The options of digit-scenes dataset `name`, `given` over the defaults; lists count as pairs.

    Raises:
        InputError: an option is unknown, of the wrong type or out of its range.
    """
    defaults = OPTIONS[name]()
    known = dataclasses.asdict(defaults)
    values = {}
    for key, value in given.items():
        choose("option", key, known, name)
        values[key] = _like(known[key], value, f"{name}: option {key}={value!r}")
    options = dataclasses.replace(defaults, **values)
    _check(name, options)
    return options


def _like(default: Any, value: Any, what: str) -> Any:
    """`value` with the type of `default`."""
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise InputError(f"{what} should be a pair (smallest, largest) like {list(default)}")
        return tuple(_like(one, other, what) for one, other in zip(default, value, strict=True))
    accepted = int if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise InputError(f"{what} should be {'an integer' if isinstance(default, int) else 'a number'} like {default}")
    return type(default)(value)


def _check(name: str, options: _Options) -> None:
    for key, value in dataclasses.asdict(options).items():
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 0 <= low <= high:
            raise InputError(f"{name}: option {key}={value} should not be negative, nor its smallest above its largest")
    if options.digit_size[1] > options.canvas:
        raise InputError(f"{name}: digit_size up to {options.digit_size[1]:g} does not fit canvas={options.canvas}")
    # Every class needs an image (and a scan) in both splits, or its accuracy or IoU would be undefined.
    if options.canvas < 8 or options.digit_size[0] < 4 or min(options.train, options.validation) < 10:
        raise InputError(f"{name}: needs canvas >= 8, digit_size >= 4, and train and validation >= 10 images")
    if not 0.01 <= options.validation_scans <= 0.9:
        raise InputError(f"{name}: validation_scans={options.validation_scans} should lie between 0.01 and 0.9")


def files(options: ClassificationOptions | SegmentationOptions) -> Iterator[tuple[str, bytes]]:
    """Every file of the dataset as (path relative to its folder, content); PNG for labels and for classification.

    Segmentation labels are 0 for the background and 1 to 10 for the digits 0 to 9.
    """
    import numpy as np

    scans = _split_scans(options)
    segmentation = isinstance(options, SegmentationOptions)
    for split, count in ((0, options.train), (1, options.validation)):
        for index in range(count):
            rng = np.random.default_rng((options.seed, split, index))
            if segmentation:
                number = rng.integers(options.digits[0], options.digits[1], endpoint=True)
                # The first digit cycles through the classes, so that even a small dataset holds them all.
                digits = [index % 10, *rng.integers(0, 10, size=max(number - 1, 0)).tolist()][:number]
                image, label = _scene(options, rng, [(digit, _draw(scans[split][digit], rng)) for digit in digits])
                folder, stem = ("training", "validation")[split], f"scene_{index:06d}"
                yield f"images/{folder}/{stem}.jpg", _encode(".jpg", image, options.jpeg_quality)
                yield f"annotations/{folder}/{stem}.png", _encode(".png", label)
            else:
                digit = index % 10
                own = scans[split][digit]
                image, _ = _scene(options, rng, [(digit, own[index // 10 % len(own)])])
                yield f"{('train', 'validation')[split]}/{digit}/scene_{index:06d}.png", _encode(".png", image)


def _split_scans(options: _Options) -> "tuple[list[np.ndarray], list[np.ndarray]]":
    """The scans, ink from 0 to 1, as [split][digit] -> (scans, 8, 8)."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    splits = train_test_split(
        indices, test_size=options.validation_scans, stratify=digits.target, random_state=options.seed
    )
    ink = (digits.images / 16).astype(np.float32)
    return tuple([ink[split[digits.target[split] == digit]] for digit in range(10)] for split in splits)


def _draw(scans: "np.ndarray", rng: "np.random.Generator") -> "np.ndarray":
    return scans[rng.integers(len(scans))]


def _scene(
    options: _Options, rng: "np.random.Generator", digits: "list[tuple[int, np.ndarray]]"
) -> "tuple[np.ndarray, np.ndarray]":
    """Image (canvas, canvas, 3) and label (canvas, canvas), both uint8; later digits lie over earlier ones."""
    import numpy as np

    brightness = rng.uniform(*options.brightness)
    image = _texture(options, rng) + brightness + _tint(options, rng)
    label = np.zeros((options.canvas, options.canvas), dtype=np.uint8)
    for (digit, scan), place in zip(digits, _places(options, rng, len(digits)), strict=True):
        box, cover = _draw_at(options, rng, scan, place)
        contrast = rng.uniform(*options.contrast)
        # Both signs where both fit into the range, else the one that fits.
        signs = [sign for sign in (-1, 1) if 0 <= brightness + sign * contrast <= 1] or [1 if brightness < 0.5 else -1]
        ink = brightness + signs[rng.integers(len(signs))] * contrast + _tint(options, rng)
        image[box] += cover[..., None] * (ink - image[box])
        label[box][cover > 0.5] = digit + 1  # the upper digit wins where it hides more than half
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8), label


def _places(options: _Options, rng: "np.random.Generator", number: int) -> "np.ndarray":
    """Where `number` digits lie, before they wander: (number, 2) as x, y."""
    import numpy as np

    if isinstance(options, ClassificationOptions):
        return np.full((number, 2), options.canvas / 2)
    quarters = np.array([(1, 1), (3, 1), (1, 3), (3, 3)]) * options.canvas / 4
    return np.resize(rng.permutation(quarters), (number, 2))


def _draw_at(
    options: _Options, rng: "np.random.Generator", scan: "np.ndarray", place: "np.ndarray"
) -> "tuple[tuple[slice, slice], np.ndarray]":
    """Enlarges (bicubic), turns and moves the scan: a box of the canvas, and how far ink covers its pixels, 0 to 1."""
    import cv2
    import numpy as np

    size = rng.uniform(*options.digit_size)
    angle = np.deg2rad(rng.uniform(-options.rotation, options.rotation))
    centre = place + rng.uniform(-options.wander, options.wander, size=2)  # x, y
    cos, sin = np.cos(angle), np.sin(angle)
    reach = size / 2 * (abs(cos) + abs(sin)) + size / 8  # of the turned square, and of the bicubic kernel
    left, top = np.floor(centre - reach).astype(int).clip(0, options.canvas)
    right, bottom = np.ceil(centre + reach).astype(int).clip(0, options.canvas)
    turn = size / 8 * np.array([[cos, -sin], [sin, cos]])
    # Pixel centres lie at whole numbers: the scan's centre (3.5, 3.5) goes to the place half a pixel before `centre`.
    shift = centre - 0.5 - (left, top) - turn @ (3.5, 3.5)
    ink = cv2.warpAffine(scan, np.column_stack([turn, shift]), (right - left, bottom - top), flags=cv2.INTER_CUBIC)
    # Enlarging blurs the strokes: steepen their edges.
    return (slice(top, bottom), slice(left, right)), ((ink - 0.25) / 0.3).clip(0, 1)


def _texture(options: _Options, rng: "np.random.Generator") -> "np.ndarray":
    """Smooth noise of several scales and a slope, around 0: (canvas, canvas, 3)."""
    import cv2
    import numpy as np

    noise = np.zeros((1, 1, 3), dtype=np.float32)
    for cell in (32, 16, 8, 4):  # pixels between two independent values, coarse to fine
        points = max(options.canvas // cell, 1)
        grey = rng.standard_normal((points, points, 1), dtype=np.float32)
        colour = rng.standard_normal((points, points, 3), dtype=np.float32)
        noise = cv2.resize(noise, (points, points), interpolation=cv2.INTER_CUBIC) + 0.9 * grey + 0.4 * colour
    noise = cv2.resize(noise, (options.canvas, options.canvas), interpolation=cv2.INTER_CUBIC)
    noise *= options.texture / 2  # four scales of unit variance each
    steps = np.linspace(-0.5, 0.5, options.canvas, dtype=np.float32)
    down, right = rng.uniform(-options.gradient, options.gradient, size=2).astype(np.float32)
    return noise + (down * steps[:, None] + right * steps)[..., None]


def _tint(options: _Options, rng: "np.random.Generator") -> "np.ndarray":
    """A colour offset that leaves the brightness alone: (3,)."""
    import numpy as np

    colour = rng.normal(0, options.tint, size=3).astype(np.float32)
    return colour - colour.mean()


def _encode(suffix: str, image: "np.ndarray", quality: int = 95) -> bytes:
    import cv2

    settings = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    return cv2.imencode(suffix, image, settings)[1].tobytes()
