"""Our dense backbones against the published implementations: time and bytes that autograd saves.

    python -m benchmarks.against_published --threads 2 --models hrvit_b1 hrformer_tiny --sizes 224 512

The published implementations were timed on 2 CPU cores (torch 2.15, float32, evaluation mode), interleaved with timm's
`convnext_tiny` features at the same size and batch: median of 5 pairs. Ours is timed in the same way, so that the
quotient of the two ratios is a speed-up that hardly depends on the machine. Times want an idle machine; the saved bytes
are exact on any.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import zoo
from benchmarks import speed


@dataclass(frozen=True)
class Published:
    """What a published implementation took: ratios to the yardstick, and saved MB (1e6 bytes) at batch 1."""

    batch_size: int
    forward: dict[int, float]  # by image side
    train_step: dict[int, float]
    saved_mb: dict[int, float]


PUBLISHED = {
    "hrvit_b1": Published(2, {224: 0.86, 512: 0.94}, {224: 0.89, 512: 0.93}, {224: 183.6, 512: 1078.5}),
    "hrvit_b2": Published(1, {224: 2.04, 512: 1.78}, {224: 1.55, 512: 2.03}, {224: 281.2, 512: 1698.8}),
    "hrvit_b3": Published(2, {224: 1.81, 512: 1.50}, {224: 1.62, 512: 1.87}, {224: 313.5, 512: 1847.3}),
    "hrformer_tiny": Published(2, {224: 0.80, 512: 0.83}, {224: 0.68, 512: 0.77}, {224: 205.3, 512: 1094.9}),
    "hrformer_small": Published(2, {224: 1.16, 512: 1.20}, {224: 1.10, 512: 1.19}, {224: 381.0, 512: 2030.7}),
    "hrformer_base": Published(1, {224: 5.02, 512: 4.45}, {224: 3.26, 512: 4.17}, {224: 877.4, 512: 4681.9}),
    "hivit_tiny": Published(1, {224: 1.01, 512: 2.32}, {224: 0.83, 512: 1.83}, {224: 93.4, 512: 676.9}),
    "hivit_small": Published(1, {}, {}, {224: 181.6}),
    "hivit_base": Published(1, {224: 3.32, 512: 7.82}, {224: 2.99, 512: 6.83}, {224: 239.9, 512: 1751.1}),
    "hivit_large": Published(1, {}, {}, {224: 655.9}),
}


def backbone(name: str, size: int) -> nn.Module:
    """The model as it was measured: the dense backbone; of HiViT at 224 pixels the classifier."""
    if name.startswith("hivit"):
        dense = {"features_only": True, "published_taps": True} if size != 224 else {}
        return zoo.create_model(name, img_size=size, **dense)
    return zoo.create_model(name, features_only=True)


def saved_mb(name: str, size: int) -> float:
    """MB (1e6 bytes) that autograd keeps of one forward of one image in evaluation mode, parameters left out."""
    return speed.count_saved_bytes(backbone(name, size).eval(), torch.randn(1, 3, size, size)) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per model and size, then the geometric mean of the speed-ups."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--sizes", nargs="+", type=int, choices=(224, 512), default=[224, 512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only-saved", action="store_true", help="leave the times out")
    options = parser.parse_args(arguments)
    print("| backbone (batch) | size | forward: published / ours / gain | forward+backward | saved MB |")
    print("|---|---|---|---|---|", flush=True)
    gains = []
    for size in options.sizes:
        for name in options.models:
            published = PUBLISHED[name]
            cells = [f"{name} ({published.batch_size})", str(size)]
            timed = not options.only_saved and size in published.forward
            if timed:
                measured = speed.measure(
                    backbone(name, size),
                    (3, size, size),
                    batch_size=published.batch_size,
                    repeats=options.repeats,
                    max_seconds=300,
                    yardstick=speed.default_yardstick(),
                    threads=options.threads,
                )
                pairs = [
                    (published.forward[size], measured.ratio),
                    (published.train_step[size], measured.train_step_ratio),
                ]
                gains += [theirs / ours for theirs, ours in pairs]
                cells += [f"{theirs:.2f} / {ours:.2f} / {theirs / ours:.2f}" for theirs, ours in pairs]
            else:
                cells += ["", ""]
            if size in published.saved_mb:
                ours = saved_mb(name, size)
                theirs = published.saved_mb[size]
                cells.append(f"{theirs:.1f} / {ours:.1f} / {ours / theirs:.2f}")
            else:
                cells.append("")
            notes = "; ".join(measured.notes) if timed else ""
            print(f"| {' | '.join(cells)} |{'  ' + notes if notes else ''}", flush=True)
    if gains:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        print(f"\nSpeed-up over {len(gains)} cells: geometric mean {mean:.2f}, lowest {min(gains):.2f}.")


if __name__ == "__main__":
    main()
