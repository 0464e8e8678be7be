"""Masked-autoencoder pretraining of HiViT (zoo/hivit_mae.py) in mmengine's Runner; fine-tuning starts from its weights.

`Recipe.augmentation` is as in benchmarks.classification. The labels of the data set are not used.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseModel
from torch.utils.data import Dataset, default_collate

import zoo
from benchmarks import data
from benchmarks.classification import build_dataset
from benchmarks.engine import Context, Outcome, train
from benchmarks.errors import InputError
from benchmarks.job import Job
from zoo.hivit import PATCH
from zoo.hivit_mae import HiViTMAE


class Autoencoder(BaseModel):
    """A masked autoencoder in mmengine's terms: images (B, 3, H, W) and noise (B, patches) in; the loss out."""

    def __init__(self, network: HiViTMAE):
        super().__init__()
        self.network = network
        self._is_init = True  # mmengine would initialise the network anew

    def forward(self, images: torch.Tensor, noise: torch.Tensor, mode: str = "loss") -> Any:
        return {"loss": self.network(images, noise=noise)["loss"]}


class WithNoise(Dataset):
    """The images of `dataset`, each with the noise (patches,) that decides its mask.

    Noise that is drawn with the image depends, like all that is drawn for it, on the seed and the draw's number alone.
    """

    def __init__(self, dataset: Dataset, patches: int):
        self.dataset = dataset
        self.patches = patches

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, _ = self.dataset[index]
        return image, torch.rand(self.patches)


def build_model(job: Job) -> HiViTMAE:
    """The job's autoencoder with fresh weights. Raises InputError for a model that is none."""
    model = zoo.create_model(job.model, img_size=job.input_size, **job.model_config)
    if not isinstance(model, HiViTMAE):
        raise InputError(f"{job.model} is no masked autoencoder; those are {', '.join(zoo.list_models('*_mae'))}")
    return model


def run_train(job: Job, context: Context) -> Outcome:
    """Trains the job's autoencoder from its newest checkpoint, or from fresh weights."""
    root = data.prepare(job.data, context.data_root, job.data_options, context.report)
    patches = (job.input_size[0] // PATCH) * (job.input_size[1] // PATCH)
    dataset = WithNoise(build_dataset(job, root, training=True), patches)
    return train(job, context, lambda: Autoencoder(build_model(job)), dataset, default_collate)
