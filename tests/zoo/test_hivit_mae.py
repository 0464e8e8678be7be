"""The masked autoencoder against the published one (section 3.3)."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.hivit_mae import sincos_position


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_published_one(oracle, dtype):
    published = oracle("hivit_t_mae")
    model = published.fill(zoo.create_model("hivit_tiny_mae"), dtype)
    noise = torch.from_numpy(np.random.Generator(np.random.PCG64(1)).random((2, 196)))
    images, run = published.images(dtype), published.runs["224x224"]
    with torch.no_grad():
        output = model(images, noise=noise)
        published.check(model.encode(images, noise.argsort(1)[:, :49]), run["latent"])
    published.check(output["prediction"], run["pred"])
    published.check(output["mask"], run["mask"]) if dtype == torch.float64 else None
    tolerance = 1e-9 if dtype == torch.float64 else 2e-6
    assert output["loss"].item() == pytest.approx(run["loss"]["value"], rel=tolerance)


def encoder_macs(mask_ratio: float) -> int:
    with torch.device("meta"):
        model = zoo.create_model("hivit_tiny_mae", mask_ratio=mask_ratio)
        images, keep = torch.empty(1, 3, 224, 224), torch.empty(1, model.visible, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.encode(images, keep)
    return counter.get_total_flops() // 2


def test_encoder_works_on_the_visible_patches_only():
    full, quarter = encoder_macs(0.005), encoder_macs(0.75)  # 195 and 49 of 196 patches
    assert quarter < full * 49 / 195  # attention falls with the square


def test_masked_pixels_are_never_read():
    model = zoo.create_model("test_hivit_mae").eval()
    images, noise = torch.rand(1, 3, 64, 64), torch.rand(1, 16)
    output = model(images, noise=noise)
    changed = images.clone()
    hidden = output["mask"][0].view(4, 4).bool()
    changed.view(3, 4, 16, 4, 16).permute(1, 3, 0, 2, 4)[hidden] = float("nan")
    assert torch.equal(model(changed, noise=noise)["prediction"], output["prediction"])


def test_mask_keeps_the_smallest_noise_and_loss_trains_what_it_should():
    model = zoo.create_model("test_hivit_mae")
    noise = torch.rand(2, 16)
    output = model(torch.rand(2, 3, 64, 64), noise=noise)
    assert output["prediction"].shape == (2, 16, 768)
    assert (output["mask"].sum(1) == 12).all()
    kept, masked = noise[output["mask"] == 0].view(2, 4), noise[output["mask"] == 1].view(2, 12)
    assert (kept.amax(1) < masked.amin(1)).all()
    output["loss"].backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"decoder_pos_embed"}
    assert not model.decoder_pos_embed.requires_grad


def test_gradient_checkpointing_changes_nothing():
    model, images, noise = zoo.create_model("test_hivit_mae"), torch.rand(2, 3, 64, 64), torch.rand(2, 16)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, noise=noise)["loss"].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_positions_start_as_sines_and_cosines():
    model = zoo.create_model("test_hivit_mae")
    assert torch.equal(model.decoder_pos_embed, sincos_position((4, 4), 16))
    assert torch.equal(model.encoder.absolute_pos_embed, sincos_position((4, 4), 32))
    position = sincos_position((3, 5), 8)[0].view(3, 5, 8)
    assert torch.equal(position[0, :, :4], position[2, :, :4])  # the column in the first half
    assert torch.equal(position[:, 0, 4:], position[:, 4, 4:])  # the row in the second
    torch.testing.assert_close(
        position[0, 1, :4],
        torch.tensor([1.0, 0.01, 1.0, 0.01])
        .cos()
        .where(torch.tensor([False, False, True, True]), torch.tensor([1.0, 0.01, 1.0, 0.01]).sin()),
    )


def test_encoder_moves_to_the_classifier_and_the_dense_backbone():
    mae = zoo.create_model("test_hivit_mae")
    published = {zoo.published_keys(mae)[key]: value for key, value in mae.state_dict().items()}
    for options in ({}, {"features_only": True}):
        model = zoo.create_model("test_hivit", **options)
        inner = getattr(model, "model", model)
        for state in (published, mae.state_dict()):
            for block in inner.blocks[-2:]:
                torch.nn.init.ones_(block.attn.relative_position_bias_table)
            report = zoo.load_published(model, state)
            assert len(report.loaded) == len(mae.encoder.state_dict())
            assert all(key.startswith(("decoder_", "norm.", "mask_token")) for key in report.unexpected)
            assert all("norm" in key or "head" in key for key in report.missing)
            # The published fine-tuning starts its relative tables from zero.
            assert [key.removeprefix("model.") for key in report.zeroed] == [
                f"blocks.{index}.attn.relative_position_bias_table" for index in (6, 7)
            ]
            assert not any(block.attn.relative_position_bias_table.any() for block in inner.blocks[-2:])
            assert "2 zeroed" in str(report)
            assert not report.complete
            assert len(report.resized) == bool(options)  # the dense backbone stores 14 x 14 positions


def test_positions_of_another_size_are_fitted():
    mae = zoo.create_model("test_hivit_mae", img_size=(96, 64))
    state = zoo.create_model("test_hivit_mae").state_dict()
    report = zoo.load_published(mae, state)
    assert report.resized == ("encoder.absolute_pos_embed",)
    assert [line.split(":")[0] for line in report.mismatched] == ["decoder_pos_embed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features_only": True}, "no dense maps"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"relative_position_bias": True}, "relative_position_bias"),
        ({"decoder_heads": 3}, "decoder_heads"),
        ({"img_size": 72}, "multiple of 16"),
    ],
)
def test_errors_name_the_option(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        zoo.create_model("test_hivit_mae", **options)


def test_no_weight_decay_names_what_there_is():
    with_position = zoo.create_model("test_hivit_mae").no_weight_decay()
    assert with_position == {"encoder.absolute_pos_embed", "mask_token", "decoder_pos_embed"}
    without = zoo.create_model("test_hivit_mae", absolute_position=False).no_weight_decay()
    assert without == {"mask_token", "decoder_pos_embed"}


def test_wrong_shapes_are_told():
    model = zoo.create_model("test_hivit_mae")
    with pytest.raises(zoo.ZooError, match=r"\(batch, channels, height, width\)"):
        model(torch.rand(3, 64, 64))
    with pytest.raises(zoo.ZooError, match="built for"):
        model(torch.rand(1, 3, 32, 64))
    with pytest.raises(zoo.ZooError, match="noise"):
        model(torch.rand(1, 3, 64, 64), noise=torch.rand(1, 196))
