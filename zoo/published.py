"""Load the checkpoints that the papers' authors publish, and say exactly which keys did not match.

A file is only ever read as plain tensors (``torch.load(weights_only=True)`` or safetensors): nothing in it is executed.
Each family's own mapping stands in its file, in `published_key` and `from_published`.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.errors import ZooError

# Where training programs put the weights inside a checkpoint; averaged weights first, as timm does.
CONTAINERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
# Where the files of finished trainings here have the network; averaged weights first, and an autoencoder's encoder.
FINISHED = ("ema.module.", "network.encoder.", "network.")
_PREFIX = re.compile(r"^(?:(?:module|_orig_mod|backbone|timm_model|model|encoder)\.)+")


@dataclass(frozen=True)
class LoadReport:
    """What `load_published` did. Names of the model for `loaded` and `missing`, of the source for the others."""

    loaded: tuple[str, ...]  # entries of the model that were filled
    missing: tuple[str, ...]  # entries of the model that the source does not have: they keep their values
    unexpected: tuple[str, ...]  # entries of the source that the model has no place for (a head, a decoder)
    mismatched: tuple[str, ...] = ()  # entries of both whose shapes differ and cannot be fitted, with both shapes
    resized: tuple[str, ...] = ()  # position tables that were interpolated to the model's size
    zeroed: tuple[str, ...] = ()  # entries of the model that start from zero, as published, where the source has none
    derived: tuple[str, ...] = ()  # index buffers of the source that follow from the size and are not needed
    source: str = field(default="state dict", kw_only=True)  # the path and container that were read

    @property
    def complete(self) -> bool:
        """Whether every entry of the model was filled and every entry of the source was used."""
        return not (self.missing or self.unexpected or self.mismatched or self.zeroed)

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.loaded)} entries loaded"]
        for name in ("resized", "zeroed", "missing", "unexpected", "mismatched"):
            if keys := getattr(self, name):
                parts.append(f"{len(keys)} {name} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})")
        return "; ".join(parts)


def load_published(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Fill `model` in place from a checkpoint with the published implementation's keys (or with ours).

    Args:
        model: a zoo model: classifier, ``features_only`` model, masked autoencoder, or one of them wrapped (by
            mmsegmentation's `TIMMBackbone`, `DistributedDataParallel`, `torch.compile`). Other models match by name.
        source: a file (``.safetensors``, or one that `torch.save` wrote with tensors only), or a state dict. The usual
            containers (``model``, ``state_dict``, ``state_dict_ema``) and prefixes (``module.``, ``backbone.``) go, and
            those of the weights that a training of this suite keeps.

    Returns:
        LoadReport: what was loaded, what is missing, what had no place.

    Raises:
        ZooError: the file is missing, damaged or holds more than tensors, or nothing in it fits the model.
    """
    model = _unwrap(model)
    if isinstance(source, str | Path):
        name, content = str(source), _read(Path(source))
    else:
        name, content = "state dict", source
    state, container = _state_dict(content, name)
    name = f"{name} [{container}]" if container else name
    original = {_PREFIX.sub("", key): key for key in state}
    stripped = {_PREFIX.sub("", key): value for key, value in state.items()}

    fitted = model.from_published(stripped) if hasattr(model, "from_published") else stripped
    to_source = _source_names(model, original)
    own = model.state_dict()
    # A model that is not the zoo's may have one of the prefixes in its own names, or timm's joined ones (`stages_0`).
    own_names = {_PREFIX.sub("", key).replace(".", "_"): key for key in own}
    fitted = {key if key in own else own_names.get(key.replace(".", "_"), key): value for key, value in fitted.items()}
    loaded = {key: value for key, value in fitted.items() if key in own and value.shape == own[key].shape}
    if not loaded:
        raise ZooError(f"{name}: none of its {len(state)} entries fits {type(model).__name__}; is it another model's?")
    model.load_state_dict(loaded, strict=False)
    mismatched = {key for key in fitted if key in own and key not in loaded}
    zeroed = tuple(key for key in loaded if to_source(key) not in state)
    return LoadReport(
        loaded=tuple(key for key in loaded if key not in zeroed),
        # Counters of a batch norm's updates, which old files lack and nothing reads: no part of the weights.
        missing=tuple(key for key in own if key not in fitted and not key.endswith("num_batches_tracked")),
        unexpected=tuple(to_source(key) for key in fitted if key not in own),
        mismatched=tuple(
            f"{to_source(key)}: {tuple(fitted[key].shape)} in the source, {tuple(own[key].shape)} in the model"
            for key in fitted
            if key in mismatched
        ),
        resized=tuple(
            to_source(key)
            for key in loaded
            if (old := state.get(to_source(key))) is not None
            and old.shape != own[key].shape
            and not _is_joined(model, key)
        ),
        zeroed=zeroed,
        derived=tuple(key for key in state if key.endswith("relative_position_index") and key not in fitted),
        source=name,
    )


def published_keys(model: nn.Module) -> dict[str, str]:
    """Our state_dict name -> the published implementation's, for every entry of `model` (unwrapped)."""
    model = _unwrap(model)
    return {key: _published_key(model, key) for key in model.state_dict()}


def _published_key(model: nn.Module, key: str) -> str:
    return model.published_key(key) if hasattr(model, "published_key") else key


def _is_joined(model: nn.Module, key: str) -> bool:
    return hasattr(model, "published_parts") and len(model.published_parts(key)) > 1


def _source_names(model: nn.Module, original: dict[str, str]):
    joined = {key.replace(".", "_"): name for key, name in original.items()}

    def name(key: str) -> str:
        return original.get(_published_key(model, key)) or joined.get(_PREFIX.sub("", key).replace(".", "_"), key)

    return name


def _unwrap(model: nn.Module) -> nn.Module:
    while not hasattr(model, "from_published"):
        inner = next(
            (getattr(model, n) for n in ("module", "_orig_mod", "timm_model", "model") if hasattr(model, n)), None
        )
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _read(path: Path):
    if not path.is_file():
        raise ZooError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Published training programs keep their command line beside the weights; a namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # the file names a class or function to import
            raise ZooError(
                f"{path}: holds more than tensors and would need unpickling, which can run code; "
                "save its state dict alone (torch.save or safetensors) where you trust it"
            ) from None
        raise ZooError(f"{path}: damaged, or not a checkpoint of plain tensors") from None
    except Exception as error:  # each reader has its own errors for a damaged file
        raise ZooError(f"{path}: damaged, or not a checkpoint ({type(error).__name__})") from None


def _state_dict(content, name: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint, and the container that they were found in."""
    path = []
    while isinstance(content, Mapping):
        container = next((c for c in CONTAINERS if isinstance(content.get(c), Mapping)), None)
        if container is None:
            break
        content, _ = content[container], path.append(container)
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ZooError(f"{name}: holds no state dict (a mapping of names to tensors)")
    if all(key.startswith(("ema.", "network.")) for key in tensors):
        prefix = next(prefix for prefix in FINISHED if any(key.startswith(prefix) for key in tensors))
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        path.append(prefix.rstrip("."))
    return tensors, ".".join(path)
