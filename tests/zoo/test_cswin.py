"""CSWin against the published implementation, its parameters and MACs, and HRViT's Tables 4 and 9."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

import zoo
from benchmarks.cost import count
from zoo.baselines.cswin import CrossAttention

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier_equals_the_published_one(oracle, dtype):
    published = oracle("cswin_t_cls")
    model = published.fill(zoo.create_model("cswin_tiny"), dtype)
    with torch.no_grad():  # the published classifier takes no other size
        published.check(model(published.images(dtype)), published.runs["224x224"]["logits"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_maps_equal_the_published_ones(oracle, dtype):
    published = oracle("cswin_t_seg")
    model = published.fill(zoo.create_model("cswin_tiny", features_only=True), dtype)
    for size in [(224, 224), (256, 320), (200, 264)]:  # the last two have no whole number of stripes
        with torch.no_grad():
            maps = model(published.images(dtype, size))
        assert len(maps) == 4
        for index, output in enumerate(maps):
            published.check(output, published.runs[f"{size[0]}x{size[1]}"][f"out{index}"])


@pytest.mark.parametrize(("options", "name"), [({}, "cswin_t_cls"), ({"features_only": True}, "cswin_t_seg")])
def test_every_published_key_has_its_place(oracle, options, name):
    published = oracle(name)
    with torch.device("meta"):
        model = zoo.create_model("cswin_tiny", **options)
    names, own = zoo.published_keys(model), getattr(model, "model", model).state_dict()
    assert {names[key]: tuple(value.shape) for key, value in own.items()} == published.shapes
    assert sum(p.numel() for p in model.parameters()) == published.params
