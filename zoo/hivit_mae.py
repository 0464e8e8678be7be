"""HiViT as a masked autoencoder: the pre-training of section 3.3 and Appendix A (Zhang et al., ICLR 2023).

Masked patches are left out before anything is computed on them; the decoder sees all three stages of the visible ones.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.attention import Attention
from zoo.backbone import build, check_images, check_size, pretrained_cfg
from zoo.errors import ZooError
from zoo.hivit import PATCH, VARIANTS, Block, HiViT, HiViTConfig, in_reading_order, init_weights, layer_norm


@dataclass(frozen=True)
class HiViTMAEConfig(HiViTConfig):
    """A HiViT encoder and the light decoder that is thrown away after pre-training. Raises ZooError as HiViTConfig."""

    drop_path_rate: float = 0.0  # pre-training drops no paths
    relative_position_bias: bool = False  # the published pre-training has none; fine-tuning adds it
    mask_ratio: float = 0.75  # share of the patches that the encoder does not see
    decoder_dim: int = 512  # channels of the decoder
    decoder_depth: int = 6  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder

    def __post_init__(self):
        if self.low_attention or not self.hierarchical:
            raise ZooError("a masked autoencoder needs hierarchical=True and low_attention=False: it sees all stages")
        super().__post_init__()
        patches = (check_size(self.img_size)[0] // PATCH) * (check_size(self.img_size)[1] // PATCH)
        if any(side % PATCH for side in check_size(self.img_size)):
            raise ZooError(f"img_size={self.img_size} must be a multiple of {PATCH} for a masked autoencoder")
        if self.relative_position_bias:
            raise ZooError("relative_position_bias=True does not fit a masked autoencoder, which drops patches")
        if self.published_taps:
            raise ZooError("published_taps=True does not fit a masked autoencoder, which has no dense maps")
        if not 0 < self.mask_ratio < 1 or not 0 < int(patches * (1 - self.mask_ratio)) < patches:
            raise ZooError(f"mask_ratio={self.mask_ratio} must leave some of {patches} patches, and not all")
        if self.decoder_dim < 4 or self.decoder_dim % 4:
            raise ZooError(f"decoder_dim={self.decoder_dim} must be a positive multiple of 4")
        if self.decoder_depth < 1:
            raise ZooError(f"decoder_depth={self.decoder_depth} must be at least 1")
        if self.decoder_heads < 1 or self.decoder_dim % self.decoder_heads:
            raise ZooError(f"decoder_heads={self.decoder_heads} must divide decoder_dim={self.decoder_dim}")


class HiViTMAE(nn.Module):
    """Masked autoencoder: a HiViT `encoder` on the visible patches, a plain transformer that predicts the pixels.

    Takes images (B, 3, H, W) of exactly ``img_size`` and returns a dict:

    - ``loss``: mean squared error over the masked patches, whose pixels are normalised per patch (He et al., 2022);
    - ``prediction``: (B, patches, 16 * 16 * 3), normalised pixels in the order row, column, channel;
    - ``mask``: (B, patches), 1 where the patch was masked, 0 where the encoder saw it.
    """

    def __init__(self, cfg: HiViTMAEConfig, num_classes: int = 0, in_chans: int = 3):
        super().__init__()
        self.config = cfg
        self.num_classes = 0
        self.img_size = check_size(cfg.img_size)
        self.grid = self.img_size[0] // PATCH, self.img_size[1] // PATCH
        self.patches = self.grid[0] * self.grid[1]
        self.visible = int(self.patches * (1 - cfg.mask_ratio))

        self.encoder = HiViT(cfg, num_classes=0, in_chans=in_chans)
        self.encoder.fc_norm = nn.Identity()
        width = 7 * cfg.embed_dim  # per patch: 16 positions of C/4, 4 of C/2, one of C
        self.norm = layer_norm(width)
        self.decoder_embed = nn.Linear(width, cfg.decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, self.patches, cfg.decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(cfg.decoder_dim, Attention(cfg.decoder_dim, cfg.decoder_heads), cfg.mlp_ratio)
            for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = layer_norm(cfg.decoder_dim)
        self.decoder_pred = nn.Linear(cfg.decoder_dim, PATCH * PATCH * in_chans)
        self.init_weights()

    def init_weights(self) -> None:
        """As the encoder's; position embeddings start as fixed sines and cosines (the encoder's is then trained)."""
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            self.decoder_pos_embed.copy_(sincos_position(self.grid, self.config.decoder_dim))
            if self.encoder.absolute_pos_embed is not None:
                self.encoder.absolute_pos_embed.copy_(
                    sincos_position(self.encoder.position_grid, self.config.embed_dim)
                )

    def forward(self, images: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Mask, encode, decode, compare; see the class for what comes back.

        Args:
            images: (B, 3, H, W) of the configured size.
            noise: (B, patches); the patches with the smallest values are kept. Uniform random when left out.

        Raises:
            ZooError: images or noise of another shape.
        """
        check_images("masked autoencoder", images)
        if tuple(images.shape[-2:]) != self.img_size:
            raise ZooError(
                f"masked autoencoder: images of {tuple(images.shape[-2:])}, built for {self.img_size} pixels"
            )
        if noise is None:
            noise = torch.rand(images.shape[0], self.patches, device=images.device)
        if noise.shape != (images.shape[0], self.patches):
            raise ZooError(f"masked autoencoder: noise {tuple(noise.shape)}, not {(images.shape[0], self.patches)}")
        keep = noise.argsort(1)[:, : self.visible]
        prediction = self.decode(self.encode(images, keep), keep)
        mask = torch.ones_like(prediction[..., 0]).scatter(1, keep, 0.0)
        with torch.no_grad():
            target = normalised_patches(images)
        loss = ((prediction - target) ** 2).mean(-1)
        return {"loss": (loss * mask).sum() / mask.sum(), "prediction": prediction, "mask": mask}

    def encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """Images and indices (B, visible) of the patches to see -> their features (B, visible, 7 C), normalised."""
        encoder = self.encoder
        patches = encoder.patch_embed.cut(images)
        rows = torch.arange(images.shape[0], device=images.device)[:, None]
        patches = patches[rows, keep // self.grid[1], keep % self.grid[1]]  # the only patches that are copied
        position = encoder.position(self.grid)
        if position is not None:
            position = position.expand(images.shape[0], -1, -1)[rows, keep]
        stages = []
        embedded = encoder.patch_embed(patches.reshape(*keep.shape, PATCH, -1))
        for index, x in encoder.run_blocks(embedded, position, None, encoder.stage_ends[-1]):
            if index in encoder.stage_ends:
                inside = in_reading_order(x.flatten(0, 1)[:, None], (1, 1))  # each patch a map of its own
                stages.append(inside.reshape(*keep.shape, -1))
        return self.norm(torch.cat(stages, -1))

    def decode(self, latent: Tensor, keep: Tensor) -> Tensor:
        """Features (B, visible, 7 C) of the patches `keep` -> pixels (B, patches, 16 * 16 * 3) of all patches."""
        x = self.decoder_embed(latent)
        tokens = self.mask_token.to(x.dtype).repeat(x.shape[0], self.patches, 1)
        x = tokens.scatter(1, keep[..., None].expand_as(x), x) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = self.encoder.run_block(block, x)
        return self.decoder_pred(self.decoder_norm(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block of encoder and decoder in the backward pass instead of keeping its activations."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, beside biases and norms, that weight decay should leave alone."""
        encoder = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return encoder | {"mask_token", "decoder_pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's groups by depth; norm and decoder count as the head."""
        return self.encoder.group_matcher(coarse)

    def published_key(self, key: str) -> str:
        """The name that the published implementation, which has no separate encoder, gives to our entry `key`."""
        return key.removeprefix("encoder.")

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under our names."""
        ours = {self.published_key(key): key for key in self.state_dict()}
        return {ours.get(key, key): value for key, value in self.encoder.from_published(state).items()}


def normalised_patches(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> their 16x16 patches (B, patches, 16 * 16 * 3), each with mean 0 and variance 1."""
    b, c, h, w = images.shape
    pixels = images.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1)
    pixels = pixels.reshape(b, (h // PATCH) * (w // PATCH), -1)
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)  # unbiased, as published
    return (pixels - mean) / (variance + 1e-6).sqrt()


def sincos_position(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed embedding (1, h * w, dim): the first half of the channels encodes the column, the second the row."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    halves = [torch.cat([angle.sin(), angle.cos()], 1) for angle in angles]
    return torch.cat(halves, 1)[None].float()


def _mae_config(encoder: HiViTConfig) -> HiViTMAEConfig:
    return HiViTMAEConfig(
        embed_dim=encoder.embed_dim, depths=encoder.depths, num_heads=encoder.num_heads, img_size=encoder.img_size
    )


MAE_VARIANTS = {f"{name}_mae": _mae_config(encoder) for name, encoder in VARIANTS.items()}
MAE_VARIANTS["test_hivit_mae"] = dataclasses.replace(
    MAE_VARIANTS["test_hivit_mae"], decoder_dim=16, decoder_depth=1, decoder_heads=2
)

default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(first_conv="encoder.patch_embed.proj", num_classes=0) for name in MAE_VARIANTS}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if kwargs.pop("features_only", False):
        raise ZooError(
            f"{variant} has no dense maps: build {variant.removesuffix('_mae')} and load its checkpoint there"
        )
    return build(HiViTMAE, variant, MAE_VARIANTS[variant], pretrained, {"num_classes", "in_chans"}, **kwargs)


@register_model
def hivit_tiny_mae(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HiViT-T under a masked autoencoder (a size that the paper does not pre-train)."""
    return _create("hivit_tiny_mae", pretrained, **kwargs)


@register_model
def hivit_small_mae(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HiViT-S under a masked autoencoder (a size that the paper does not pre-train)."""
    return _create("hivit_small_mae", pretrained, **kwargs)


@register_model
def hivit_base_mae(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HiViT-B under the masked autoencoder of section 3.3: decoder 512 wide, 6 blocks."""
    return _create("hivit_base_mae", pretrained, **kwargs)


@register_model
def hivit_large_mae(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HiViT-L under the masked autoencoder of section 3.3."""
    return _create("hivit_large_mae", pretrained, **kwargs)


@register_model
def test_hivit_mae(**kwargs: Any) -> nn.Module:
    """A masked autoencoder for tests: 64 pixels, 16 patches, 4 of them visible."""
    return _create("test_hivit_mae", **kwargs)
