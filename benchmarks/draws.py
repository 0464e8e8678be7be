"""Which images a training sees, and every random number of it: all of them depend on the seed and a number alone.

Draw n of a training is the same image, augmented in the same way, whatever process loads it and whenever: with any
number of loading or training processes, and after any interruption.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from torch.utils.data import DataLoader, Dataset

from benchmarks.job import Job


class NumberedSampler(InfiniteSampler):
    """mmengine's InfiniteSampler that yields `(number, index)`: the draw's number in the stream and what was drawn."""

    def _infinite_indices(self) -> Iterator[tuple[int, int]]:
        return enumerate(super()._infinite_indices())


class SeededDataset(Dataset):
    """Augments draw `(number, index)` of `dataset` with random generators that depend on `seed` and `number` alone.

    The generators of Python, NumPy and PyTorch are put back afterwards, so that data and model do not disturb each
    other: the model's drop path is the same whatever the augmentation draws.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.metainfo = getattr(dataset, "metainfo", {})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> list[Any]:
        """What PyTorch's loaders ask for: a batch at once, since putting generators back takes longer than seeding."""
        samples = []
        with _put_back():
            for number, index in draws:
                _seed_cpu((self.seed, number))
                samples.append(self.dataset[index])
        return samples


def training_loader(job: Job, dataset: Dataset, collate: Callable) -> DataLoader:
    """Batches without end, in an order that depends on the seed alone; of the recipe's size over all processes.

    Where the recipe accumulates gradients, a batch is a list of so many parts.
    """
    seeded_dataset = SeededDataset(dataset, job.seed)
    parts = job.recipe.engine.accumulate

    def collate_parts(samples: Sequence[Any]) -> list[Any]:
        return [collate(samples[part::parts]) for part in range(parts)]

    return loader(
        job,
        seeded_dataset,
        job.recipe.batch_size // get_world_size(),
        collate if parts == 1 else collate_parts,
        sampler=NumberedSampler(seeded_dataset, seed=job.seed),
        drop_last=True,
    )


def loader(job: Job, dataset: Dataset, batch_size: int, collate: Callable, **settings: Any) -> DataLoader:
    """A DataLoader with the recipe's number of loading processes."""
    workers = job.recipe.workers
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        **settings,
    )


def seed_generators(*entropy: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators, those of all GPUs included, from `entropy`."""
    torch.cuda.manual_seed_all(_seed_cpu(entropy))


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and PyTorch's (CPU) generators from `entropy` within the block only."""
    with _put_back():
        _seed_cpu(entropy)
        yield


@contextmanager
def _put_back() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _seed_cpu(entropy: Sequence[int]) -> int:
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - mmsegmentation's transforms draw from this generator
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed asks every kind of device, for each image
    return int(words[2])
