"""Which images a training sees, and every random number of it: all of them depend on the seed and a number alone.

Draw n of a training is the same image, augmented in the same way, whatever process loads it and whenever: with any
number of loading or training processes, and after any interruption.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from torch.utils.data import DataLoader, Dataset

from benchmarks.job import Job


class StepSampler(InfiniteSampler):
    """mmengine's InfiniteSampler that yields `(number, index)`: the draw's number in the stream and what was drawn.

    Each step's draws are dealt out to its forwards, `accumulate` of each process, one forward's after the other's.
    Image i of a batch and image i from its end, which Mixup mixes with each other, stay together and in this order:
    a step mixes the same pairs in however many forwards it is done.
    """

    def __init__(self, dataset: Dataset, seed: int, batch_size: int, accumulate: int):
        super().__init__(dataset, seed=seed)
        self.batch_size = batch_size  # of a step, over all processes
        self.accumulate = accumulate

    def _indices_of_rank(self) -> Iterator[tuple[int, int]]:
        draws = enumerate(self._infinite_indices())
        own = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        while True:
            step = list(islice(draws, self.batch_size))
            for forward in own:
                yield from self._part(step, forward)

    def _part(self, step: Sequence[tuple[int, int]], forward: int) -> list[tuple[int, int]]:
        forwards, size = self.world_size * self.accumulate, len(step)
        if size // forwards % 2:  # there are no pairs to keep
            return list(step[forward::forwards])
        return [draw for i, draw in enumerate(step) if min(i, size - 1 - i) % forwards == forward]


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
    """Batches without end, in an order that depends on the seed alone; each is what one forward takes."""
    dataset, parts = SeededDataset(dataset, job.seed), job.recipe.engine.accumulate
    sampler = StepSampler(dataset, job.seed, job.recipe.batch_size, parts)
    images = job.recipe.batch_size // (get_world_size() * parts)
    return loader(job, dataset, images, collate, sampler=sampler, drop_last=True)


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
