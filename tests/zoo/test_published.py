"""Loading published checkpoints: what fits is taken, what does not is named, nothing is executed."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

import zoo


@pytest.fixture
def source():
    """A published classifier of the test size (the published supervised code stores an index in every block)."""
    model = zoo.create_model("test_hivit", num_classes=10)
    state = {zoo.published_keys(model)[key]: torch.randn_like(value) for key, value in model.state_dict().items()}
    for block in (6, 7):
        state[f"blocks.{block}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    return state


def same(model, state, resized=()):
    own = model.state_dict()
    return all(torch.equal(own[key], state[key]) for key in own if key not in resized)


def test_classifier_takes_everything(source):
    model = zoo.create_model("test_hivit", num_classes=10)
    report = zoo.load_published(model, source)
    assert report.complete
    assert set(report.loaded) == set(model.state_dict())
    assert report.derived == ("blocks.6.attn.relative_position_index", "blocks.7.attn.relative_position_index")
    assert same(model, source)


def test_dense_backbone_names_the_head_that_it_leaves(source):
    model = zoo.create_model("test_hivit", features_only=True)
    report = zoo.load_published(model, source)
    assert set(report.unexpected) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert not report.missing
    assert report.resized == ("absolute_pos_embed",)  # a dense backbone stores those of 224 pixels
    assert same(model.model, source, report.resized)
    assert "head.weight" in str(report)


@pytest.mark.parametrize("container", [None, "model", "state_dict", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_containers_and_prefixes_come_off(source, container, prefix):
    content = {f"{prefix}{key}": value for key, value in source.items()}
    if prefix == "backbone.":
        content["decode_head.conv_seg.weight"] = torch.zeros(2, 2, 1, 1)
    if container:
        content = {container: content, "epoch": 3}
    model = zoo.create_model("test_hivit", num_classes=10)
    report = zoo.load_published(model, content)
    assert set(report.unexpected) == ({"decode_head.conv_seg.weight"} if prefix == "backbone." else set())
    assert same(model, source)


def test_averaged_weights_win_as_in_timm(source):
    plain = {key: torch.zeros_like(value) for key, value in source.items()}
    model = zoo.create_model("test_hivit", num_classes=10)
    report = zoo.load_published(model, {"state_dict": plain, "state_dict_ema": source})
    assert same(model, source)
    assert "state_dict_ema" in report.source


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files(source, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    save_file(source, path) if suffix == "safetensors" else torch.save({"model": source, "epoch": 1}, path)
    model = zoo.create_model("test_hivit", num_classes=10, checkpoint=path)
    assert same(model, source)
    assert same(zoo.create_model("test_hivit", num_classes=10, checkpoint=str(path)), source)


def test_our_own_state_dicts_load_everywhere(source):
    source["absolute_pos_embed"] = torch.randn(1, 196, 32)
    dense = zoo.create_model("test_hivit", features_only=True, checkpoint=source)
    for state in (dense.state_dict(), {f"backbone.timm_model.{k}": v for k, v in dense.state_dict().items()}):
        again = zoo.create_model("test_hivit", features_only=True)
        assert zoo.load_published(again, state).complete
        assert same(again.model, source)
    mae = zoo.create_model("test_hivit_mae")
    other = zoo.create_model("test_hivit_mae")
    assert zoo.load_published(other, mae.state_dict()).complete
    assert same(other, mae.state_dict())


def test_wrapped_models(source):
    from mmseg.models.backbones import TIMMBackbone

    source["absolute_pos_embed"] = torch.randn(1, 196, 32)
    backbone = TIMMBackbone("test_hivit", features_only=True, pretrained=False)
    assert len(zoo.load_published(backbone, source).loaded) == len(backbone.state_dict())
    assert same(backbone.timm_model.model, source)
    compiled = torch.compile(zoo.create_model("test_hivit", num_classes=10, img_size=224))
    assert zoo.load_published(compiled, source).complete


def test_positions_of_another_size_are_fitted(source):
    model = zoo.create_model("test_hivit", num_classes=10, img_size=96)
    source["absolute_pos_embed"] = torch.ones(1, 24 * 24, 32)
    report = zoo.load_published(model, source)
    assert set(report.resized) == {
        "absolute_pos_embed",
        "blocks.6.attn.relative_position_bias_table",
        "blocks.7.attn.relative_position_bias_table",
    }
    assert report.complete
    torch.testing.assert_close(model.absolute_pos_embed, torch.ones(1, 36, 32))
    expected = zoo.relative_position.resize_table(source["blocks.6.attn.relative_position_bias_table"], (4, 4), (6, 6))
    assert torch.equal(model.blocks[6].attn.relative_position_bias_table, expected)


@pytest.mark.parametrize("img_size", [(32, 224), (224, 32), 96, 384])
@pytest.mark.parametrize("features_only", [False, True])
def test_own_state_round_trips(img_size, features_only):
    """3 x 27 offsets are 9^2 rows: a number that looks like another, square grid must change nothing."""
    options = {"img_size": img_size, "features_only": features_only, "depths": (1, 1, 1)}
    model, other = zoo.create_model("test_hivit", **options), zoo.create_model("test_hivit", **options)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    report = zoo.load_published(other, model.state_dict())
    assert report.complete
    assert not report.resized
    assert same(other, model.state_dict())


def test_own_classifier_state_fits_a_dense_backbone():
    classifier = zoo.create_model("test_hivit", img_size=96)
    dense = zoo.create_model("test_hivit", features_only=True, img_size=64)
    report = zoo.load_published(dense, classifier.state_dict())
    assert not report.missing
    assert len(report.resized) == 3
    expected = zoo.hivit.resize_position(classifier.absolute_pos_embed, (6, 6), (14, 14))
    assert torch.equal(dense.model.absolute_pos_embed, expected)


def test_positions_of_an_unknown_grid_are_told_not_guessed():
    """28 tokens can be 2 x 14 or 14 x 2: their 81 offsets are no 9 x 9."""
    source = zoo.create_model("test_hivit", img_size=(32, 224)).state_dict()
    report = zoo.load_published(zoo.create_model("test_hivit", img_size=224), source)
    assert len(report.mismatched) == 3
    assert not report.resized


def test_positions_of_the_wrong_kind_are_told(source):
    source["absolute_pos_embed"] = torch.zeros(196)
    source["blocks.6.attn.relative_position_bias_table"] = torch.tensor(0.0)
    report = zoo.load_published(zoo.create_model("test_hivit", num_classes=10), source)
    assert len(report.mismatched) == 2


def test_other_classes_and_missing_entries_are_told(source):
    del source["blocks.0.mlp.fc1.weight"]
    report = zoo.load_published(zoo.create_model("test_hivit", num_classes=4), source)
    assert report.missing == ("blocks.0.mlp.fc1.weight",)
    assert [line.split(":")[0] for line in report.mismatched] == ["head.weight", "head.bias"]
    assert not report.complete


def test_mit_uses_mmsegmentation_s_names(source):
    from mmseg.models.backbones import MixVisionTransformer

    published = MixVisionTransformer(embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 5, 8])
    model = zoo.create_model("test_mit", features_only=True).eval()
    assert zoo.load_published(model, published.state_dict()).complete
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), published.eval()(x))
    classifier = zoo.create_model("test_mit")
    assert zoo.load_published(classifier, {f"backbone.{k}": v for k, v in published.state_dict().items()}).missing == (
        "head.weight",
        "head.bias",
    )


class Trap:
    """Would create a file if it were ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_the_command_line_beside_the_weights_is_read_over(source, tmp_path):
    args = argparse.Namespace(lr=1e-3, betas=(0.9, 0.95), data_path="imagenet", nested=argparse.Namespace(seed=0))
    torch.save({"model": source, "args": args}, tmp_path / "weights.pth")
    assert same(zoo.create_model("test_hivit", num_classes=10, checkpoint=tmp_path / "weights.pth"), source)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "no such"),
        ("folder", "no such"),
        ("trap", "unpickling"),
        ("trap in arguments", "unpickling"),
        ("truncated", "damaged"),
        ("text", "damaged"),
        ("empty", "damaged"),
        ("safetensors", "damaged"),
        ("list", "no state dict"),
        ("numbers", "no state dict"),
        ("stranger", "none of its"),
    ],
)
def test_unusable_files_are_refused_in_one_line(source, tmp_path, case, message):
    path = tmp_path / ("weights.safetensors" if case == "safetensors" else "weights.pth")
    victim = tmp_path / "victim"
    if case == "folder":
        path = tmp_path
    elif case == "trap":
        torch.save({"model": source, "args": Trap(victim)}, path)
    elif case == "trap in arguments":
        torch.save({"model": source, "args": argparse.Namespace(output=Trap(victim))}, path)
    elif case == "truncated":
        torch.save(source, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif case in ("text", "safetensors"):
        path.write_text("<html>not found</html>")
    elif case == "empty":
        path.touch()
    elif case != "missing":
        content = {"list": [1, 2], "numbers": {"epoch": 3}, "stranger": {"conv1.weight": torch.zeros(1)}}
        torch.save(content[case], path)
    with pytest.raises(zoo.ZooError, match=message) as error:
        zoo.create_model("test_hivit", checkpoint=path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert not victim.exists()
