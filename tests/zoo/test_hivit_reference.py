"""HiViT against the published models written out once more: float64, plain operations, no layout tricks."""

import pytest
import torch
import torch.nn.functional as F

import zoo

SIZES = [(224, 224), (512, 512), (96, 160)]
HEADS = 2


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def residual_mlp(w, name, x):
    return x + linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))))


def attention(w, name, x, grid):
    q, k, v = linear(w, f"{name}.qkv", x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    row, column = row.flatten(), column.flatten()
    rows, columns = row[:, None] - row + grid[0] - 1, column[:, None] - column + grid[1] - 1  # query - key, from 0
    bias = w[f"{name}.relative_position_bias_table"][rows * (2 * grid[1] - 1) + columns].permute(2, 0, 1)
    attended = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    return linear(w, f"{name}.proj", attended.transpose(1, 2).flatten(2))


def positions(w, grid, stored):
    position = w["absolute_pos_embed"]
    if grid == stored:
        return position
    position = position.reshape(1, *stored, -1).permute(0, 3, 1, 2)
    scale = (grid[0] + 0.1) / stored[0], (grid[1] + 0.1) / stored[1]
    return F.interpolate(position, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)


def outputs(w, images, depths, stored):
    """What the embedding and each entry of the flat list of blocks give, as maps (B, C, H, W)."""
    grid = images.shape[2] // 16, images.shape[3] // 16
    x = images.reshape(-1, 3, grid[0], 4, 4, grid[1], 4, 4)  # rows: patch, cell, pixel; columns: the same
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(images), grid[0] * grid[1], 4, 4, 3 * 4 * 4)
    x = norm(w, "patch_embed.norm", x @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"])
    maps, merges, main = [], (2 * depths[0], 2 * depths[0] + 1 + 2 * depths[1]), 2 * depths[0] + 2 * depths[1] + 2
    for index in range(main + depths[2]):
        name = f"blocks.{index}"
        if index in merges:
            parts = [x[:, :, row::2, column::2] for row, column in [(0, 0), (1, 0), (0, 1), (1, 1)]]
            x = linear(w, f"{name}.reduction", norm(w, f"{name}.norm", torch.cat(parts, -1)))
        elif index < main:
            x = residual_mlp(w, name, x)
        else:
            tokens = x[:, :, 0, 0]
            if index == main:
                tokens = tokens + positions(w, grid, stored)
            tokens = tokens + attention(w, f"{name}.attn", norm(w, f"{name}.norm1", tokens), grid)
            x = residual_mlp(w, name, tokens)[:, :, None, None]
        side = x.shape[2]
        by_patch = x.reshape(len(images), *grid, side, side, -1).permute(0, 5, 1, 3, 2, 4)
        maps.append(by_patch.reshape(len(images), -1, grid[0] * side, grid[1] * side))
    return maps


def random_model(size, depths, **options):
    model = zoo.create_model(
        "test_hivit", img_size=size, depths=depths, embed_dim=16, num_heads=HEADS, num_classes=5, **options
    )
    model = model.double().eval()
    for p in model.parameters():  # unit gain, and positions that matter
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 and p.shape[0] > 1 else 0.5)
    return model, torch.randn(1, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_dense_backbone(blocks, size):
    depths = blocks, blocks, 3
    model, images = random_model(size, depths, features_only=True, published_taps=True)
    with torch.no_grad():
        maps = outputs(model.model.state_dict(), images, depths, (14, 14))
        # One block taken for one unit: see HiViT's taps.
        expected = [maps[blocks - 1], maps[2 * blocks], maps[-1], F.max_pool2d(maps[-1], 2)]
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_classifier(blocks, size):
    depths = blocks, blocks, 3
    model, images = random_model(size, depths)
    w, grid = model.state_dict(), (size[0] // 16, size[1] // 16)
    with torch.no_grad():
        pooled = outputs(w, images, depths, grid)[-1].mean((2, 3))
        expected = linear(w, "head", norm(w, "fc_norm", pooled))
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
