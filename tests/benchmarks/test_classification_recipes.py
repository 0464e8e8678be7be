"""Every classification recipe, composed and resolved, says what its paper says; the sentences stand beside the numbers.

The learning rates come out of mmengine's schedulers, the groups out of timm's optimizers on real (small) models, the
augmentation is the list of timm's transforms. Schedules are walked in 12,000 steps rather than in 500,000.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from mmengine.registry import PARAM_SCHEDULERS
from omegaconf import OmegaConf
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.layers import DropPath
from torchvision import transforms

import zoo
from benchmarks.classification import Classifier, build_model, build_transform
from benchmarks.engine import _optim_wrapper, param_scheduler
from benchmarks.job import TRAININGS, Job, Recipe
from benchmarks.optimizer import build_optimizer
from benchmarks.pretraining import Autoencoder
from runners.config import register
from runners.plan import make_jobs
from runners.run import CONF

# Images of ImageNet-1K over images per step, what is left over being dropped.
STEPS = {batch_size: 1_281_167 // batch_size for batch_size in (1024, 4096, 16384)}
RECIPES = {path.stem for path in (CONF / "recipe").glob("imagenet*.yaml")}


@cache
def jobs() -> dict[str, Job]:
    """The trainings of ImageNet by their labels."""
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", ["suite=imagenet_classification"]))
    return {job.label: job for job in make_jobs(config) if job.stage in TRAININGS}


def small(job: Job) -> Job:
    """The same training of the family's model for tests."""
    names = {"HRViT": "test_hrvit", "HRFormer": "test_hrformer", "HIRI-ViT": "test_hiri_vit", "HiViT": "test_hivit"}
    name = "test_hivit_mae" if job.stage == "pretrain" else names.get(zoo.family(job.model), "test_mit")
    return dataclasses.replace(job, model=name, input_size=(64, 64), model_config={})


def model_of(job: Job) -> torch.nn.Module:
    if job.stage == "pretrain":
        return Autoencoder(zoo.create_model(job.model))
    return Classifier(build_model(job), job.recipe)


def learning_rates(recipe: Recipe, *epochs: int) -> list[float]:
    """The learning rates at the ends of `epochs`, by mmengine's schedulers on the recipe's optimizer."""
    steps = STEPS[recipe.batch_size]
    assert recipe.iterations % steps == recipe.warmup_iterations % steps == 0
    fine = 12_000 * steps // recipe.iterations  # scheduler steps per epoch
    coarse = {name: getattr(recipe, name) // steps * fine for name in ("iterations", "warmup_iterations")}
    job = dataclasses.replace(jobs()["hivit_tiny"], recipe=dataclasses.replace(recipe, layer_decay=None, **coarse))
    optimizer = build_optimizer(job, torch.nn.Linear(1, 1, bias=False))
    schedulers = [PARAM_SCHEDULERS.build(settings | {"optimizer": optimizer}) for settings in param_scheduler(job)]
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(job.recipe.iterations):
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return [rates[epoch * fine] for epoch in epochs]


def test_every_recipe_for_imagenet_is_checked_here():
    checked = {
        *("imagenet1k", "imagenet_hrvit", "imagenet_hrformer", "imagenet_hivit", "imagenet_hiri_vit"),
        *("imagenet_hiri_vit_768", "imagenet_hivit_mae", "imagenet_hivit_fine_tuning", "imagenet_hivit_probe"),
    }
    assert checked == RECIPES


@pytest.mark.parametrize(
    ("label", "batch_size", "epochs", "rates"),
    [
        # HRViT A.1: "300 epochs using a cosine learning rate decay schedule, 20 epochs of linear warm-up, and an
        # initial learning rate of 1e-3, a mini-batch size of 1,024". The ends, 1e-6 and 1e-5, are DeiT's.
        ("hrvit_b1", 1024, 300, {0: 1e-6, 10: 5.005e-4, 20: 1e-3, 160: 5.05e-4, 300: 1e-5}),
        # HRFormer 4.3: "batch size 1024 for 300 epochs with AdamW optimizer, cosine decay learning rate schedule".
        ("hrformer_small", 1024, 300, {0: 1e-6, 10: 5.005e-4, 20: 1e-3, 160: 5.05e-4, 300: 1e-5}),
        # HiViT, appendix A: "an initial learning rate 0.001, a weight decay 0.05, batch size 1024, a cosine decay
        # learning rate scheduler, and a linearly warm-up for 20 epochs. All the models are trained for 300 epochs".
        ("hivit_tiny", 1024, 300, {0: 1e-6, 10: 5.005e-4, 20: 1e-3, 160: 5.05e-4, 300: 1e-5}),
        # HIRI-ViT 5.1: "300 epochs with cosine decay learning rate scheduler and 5 epochs of linear warm-up [...]. The
        # batch size, initial learning rate and weight decay are set as 1,024, 0.001 and 0.05".
        ("hiri_vit_small", 1024, 300, {0: 1e-6, 5: 1e-3, 300: 1e-5}),
        # HIRI-ViT 5.1: "an initial learning rate of 1.0e-5, [...]. The optimization process includes 30 epochs with
        # cosine decay learning rate scheduler".
        ("hiri_vit_small_768", 1024, 30, {0: 1e-5, 15: 5e-6, 30: 0.0}),
        # HiViT, appendix A: "an initial learning rate of 1.5e-4, [...] the cosine decay learning schedule with a
        # warm-up for 40 epochs. The batch size is set to 4096 [...] pre-trained for 1600 epochs"; "settings follow
        # those of MAE", where the learning rate is for 256 images: 1.5e-4 * 4096 / 256.
        ("hivit_base_mae", 4096, 1600, {0: 2.4e-6, 20: 1.2012e-3, 40: 2.4e-3, 820: 1.2e-3, 1600: 0.0}),
        # "trained for 100 epochs using the AdamW optimizer with a warm-up for 5 epochs, [...] The initial learning rate
        # is set to 5e-4 and batch size is set to 1024"; as in MAE for 256 images: 5e-4 * 1024 / 256.
        ("hivit_base_fine_tuned", 1024, 100, {0: 2e-6, 5: 2e-3, 100: 0.0}),
        # MAE, Table 10: base learning rate 0.1 (for 256 images), batch size 16384, warm-up 10 epochs, 90 epochs.
        ("hivit_base_probed", 16384, 90, {0: 6.4e-3, 10: 6.4, 50: 3.2, 90: 0.0}),
        # The baselines': DeiT, Table 9, and Swin, A2.1.
        ("swin_tiny", 1024, 300, {0: 1e-6, 20: 1e-3, 300: 1e-5}),
    ],
)
def test_learning_rates_are_the_papers_at_every_time(label, batch_size, epochs, rates):
    recipe = jobs()[label].recipe
    assert recipe.batch_size == batch_size
    assert recipe.iterations == epochs * STEPS[batch_size]
    assert learning_rates(recipe, *rates) == pytest.approx(
        list(rates.values()), rel=1e-2, abs=1e-6 * max(rates.values())
    )


@pytest.mark.parametrize(
    ("label", "optimizer", "options", "decay"),
    [
        # HRViT A.1: "train HRViT with AdamW", "a weight decay rate of 0.05".
        ("hrvit_b3", torch.optim.AdamW, {"betas": (0.9, 0.999)}, 0.05),
        # HRFormer 4.3: "AdamW optimizer, [...] weight decay as 0.05".
        ("hrformer_base", torch.optim.AdamW, {"betas": (0.9, 0.999)}, 0.05),
        # HiViT, appendix A: "AdamW optimizer with an initial learning rate 0.001, a weight decay 0.05".
        ("hivit_base", torch.optim.AdamW, {"betas": (0.9, 0.999)}, 0.05),
        # HIRI-ViT 5.1: "optimized via AdamW", "weight decay [...] 0.05".
        ("hiri_vit_large", torch.optim.AdamW, {"betas": (0.9, 0.999)}, 0.05),
        # HIRI-ViT 5.1: "AdamW optimizer [...], with a momentum of 0.9, [...] the weight decay of 1.0e-8".
        ("hiri_vit_base_768", torch.optim.AdamW, {"betas": (0.9, 0.999)}, 1e-8),
        # HiViT, appendix A: "AdamW optimizer [...], a weight decay of 0.05". MAE, Table 8: beta 0.9, 0.95.
        ("hivit_large_mae", torch.optim.AdamW, {"betas": (0.9, 0.95)}, 0.05),
        # HiViT, appendix A: "AdamW optimizer with a warm-up for 5 epochs, a weight decay 0.05".
        ("hivit_large_fine_tuned", torch.optim.AdamW, {"betas": (0.9, 0.999)}, 0.05),
        # MAE, Table 10: LARS, weight decay 0, momentum 0.9.
        ("hivit_base_probed", "Lars", {"momentum": 0.9, "always_adapt": True}, 0.0),
    ],
)
def test_optimizer_and_what_it_decays(label, optimizer, options, decay):
    job = small(jobs()[label])
    model = model_of(job)
    made = build_optimizer(job, model)
    assert type(made).__name__ == optimizer if isinstance(optimizer, str) else type(made) is optimizer
    assert {name: made.defaults[name] for name in options} == options
    found = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained)  # and none of the averaged ones
    assert not any(name.startswith("ema.") for name in trained)
    for name, parameter in trained.items():
        # HRViT A.1: "We set the weight decay rate for BatchNorm layers to 0." Nor positions, which the models name.
        free = parameter.ndim <= 1 or name.endswith(("absolute_pos_embed", "position_bias_table", "mask_token"))
        assert found[id(parameter)] == (0.0 if free else decay), name


@pytest.mark.parametrize(
    ("label", "clipping"),
    [
        # HRViT A.1: "We employ gradient clipping with a maximum magnitude of 1."
        ("hrvit_b2", {"type": "value", "clip_value": 1.0}),
        (
            "hivit_small",
            {"max_norm": 5.0},
        ),  # "We follow Swin", whose code clips so
        ("hrformer_tiny", {"max_norm": 5.0}),
        ("hiri_vit_small", None),
        ("hivit_base_mae", None),
        ("hivit_base_fine_tuned", None),
    ],
)
def test_gradients_are_clipped_as_the_papers_say(label, clipping):
    job = jobs()[label]
    assert _optim_wrapper(job, None)["clip_grad"] == clipping


def test_fine_tuning_slows_every_layer_by_the_papers_factor():
    """HiViT, appendix A: "We use the layer-wise learning rate decay 0.85." """
    job = jobs()["hivit_base_fine_tuned"]
    with torch.device("meta"):
        network = build_model(job)
    groups = build_optimizer(job, network).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name: rates[id(p)] for name, p in network.named_parameters()}
    # 4 + 4 units and 20 blocks, a merge behind each of the first two stages: 30 layers before the classifier.
    expected = {
        "head.weight": 0,
        "blocks.29.attn.qkv.weight": 1,
        "blocks.28.mlp.fc1.bias": 2,
        "blocks.0.mlp.fc2.bias": 30,
    }
    expected |= {"patch_embed.proj.weight": 31, "absolute_pos_embed": 31}
    for name, layers in expected.items():
        assert rates[name] == pytest.approx(2e-3 * 0.85**layers), name


def test_a_probe_trains_the_classifier_alone():
    job = small(jobs()["hivit_base_probed"])
    model = model_of(job)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "network.head.1.weight",
        "network.head.1.bias",
    ]
    model.train()
    assert [name for name, module in model.named_modules() if module.training and name] == [
        *("data_preprocessor", "network.head", "network.head.0", "network.head.1", "criterion")
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(job, model)
    model(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]), mode="loss")["loss"].backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "network.head.1.weight" in changed
    assert all(name.startswith("network.head.") for name in changed)


@pytest.mark.parametrize(
    "label",
    [
        # HRViT A.1: "methods used in DeiT, including RandAugment, Cutmix, Mixup, and random erasing", "label smoothing
        # with a rate of 0.1".
        "hrvit_b1",
        # HRFormer 4.3: "augmentation policies, including rand augmentation, mixup, cutmix, and so on".
        "hrformer_tiny",
        # HiViT, appendix A: "augmentation and regularization strategies (Liu et al., 2021)".
        "hivit_tiny",
        # HIRI-ViT 5.1: "random cropping, random horizontal flipping, Cutmix, Mixup, Random Erasing, RandAugment".
        "hiri_vit_small",
        "hiri_vit_small_768",
        # HiViT, appendix A: "When fine-tuning, we follow the settings from (He et al., 2021)": Table 9.
        "hivit_base_fine_tuned",
        "deit_tiny",
    ],
)
def test_augmentation_is_that_of_deit(label):
    """DeiT, Table 9: RandAugment 9/0.5, Mixup 0.8, CutMix 1.0, erasing 0.25, smoothing 0.1."""
    job = jobs()[label]
    crop, flip, augment, *_, erase = build_transform(job, training=True).transforms
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert (crop.size, tuple(crop.scale)) == (job.input_size, (0.08, 1.0))
    assert isinstance(flip, transforms.RandomHorizontalFlip)
    assert flip.p == 0.5
    assert isinstance(augment, RandAugment)
    assert augment.num_layers == 2
    assert {(op.magnitude, op.magnitude_std) for op in augment.ops} == {(9, 0.5)}
    assert isinstance(erase, RandomErasing)
    assert (erase.probability, erase.rand_color, erase.per_pixel) == (0.25, False, True)
    mixup = model_of(small(job)).data_preprocessor.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (mixup.label_smoothing, mixup.num_classes, mixup.mode) == (0.1, 1000, "batch")


@pytest.mark.parametrize(("label", "scale"), [("hivit_base_mae", (0.2, 1.0)), ("hivit_base_probed", (0.08, 1.0))])
def test_pretraining_and_probing_crop_and_flip_only(label, scale):
    """HiViT, appendix A: "Random cropping and random horizontal flip are used for data augmentation." MAE, Table 10."""
    job = jobs()[label]
    steps = build_transform(job, training=True).transforms
    assert [type(step).__name__ for step in steps] == [
        *("RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize")
    ]
    assert tuple(steps[0].scale) == scale
    assert job.recipe.mixup == {}
    assert job.recipe.label_smoothing == 0.0


def rates_of(model: torch.nn.Module) -> list[float]:
    return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]


@pytest.mark.parametrize(
    ("label", "highest"),
    [
        # HRViT A.1: "a stochastic drop path rate of 0.1 for all backbones".
        *(("hrvit_b1", 0.1), ("hrvit_b2", 0.1), ("hrvit_b3", 0.1)),
        # HiViT, appendix A: "The drop path rates 0.05, 0.3, and 0.5 are respectively used for HiViT-T/S/B."
        *(("hivit_tiny", 0.05), ("hivit_small", 0.3), ("hivit_base", 0.5)),
        # MAE, Table 9: drop path 0.1 (B/L); 0.2 for the larger model, as its code does.
        *(("hivit_base_fine_tuned", 0.1), ("hivit_large_fine_tuned", 0.2)),
        ("hrformer_base", 0.2),
        # HIRI-ViT prints none: assumed, as the recipe says.
        *(("hiri_vit_small", 0.15), ("hiri_vit_base_768", 0.15), ("hiri_vit_large", 0.3)),
        # Each one by the table of its own paper, which the suite names.
        *(("deit_tiny", 0.1), ("efficientnet_b3", 0.2), ("coatnet_0", 0.2), ("maxvit_tiny", 0.2), ("swin_tiny", 0.2)),
        *(("convnext_tiny", 0.1), ("cait_s24", 0.1), ("twins_svt_base", 0.3), ("cswin_tiny", 0.2)),
    ],
)
def test_drop_path_rates(label, highest):
    with torch.device("meta"):
        assert max(rates_of(build_model(jobs()[label]))) == pytest.approx(highest, rel=0.05 if "net" in label else 1e-6)


def test_drop_path_rates_of_all_baselines():
    """As the suite has them; where none is known, the model's own, which timm leaves at none."""
    rates = {
        **{f"deit_{size}": 0.1 for size in ("tiny", "small", "base")},  # DeiT, Table 9
        **{"swin_tiny": 0.2, "swin_small": 0.3, "swin_base": 0.5, "swin_base_384": 0.5},  # Swin, A2.1
        **{f"efficientnet_b{size}": 0.2 for size in range(3, 8)},  # EfficientNet, 5.2: survival 0.8
        **{"coatnet_0": 0.2, "coatnet_1": 0.3, "coatnet_2": 0.5, "coatnet_3": 0.7},
        **{"maxvit_tiny": 0.2, "maxvit_small": 0.3, "maxvit_base": 0.4, "maxvit_large": 0.6},
        **{"convnext_tiny": 0.1, "convnext_small": 0.4, "convnext_large": 0.5},  # ConvNeXt, Table 5
        **{"cait_s24": 0.1, "cait_s36": 0.2},  # CaiT, Table 3
        **{"twins_svt_base": 0.3, "twins_svt_large": 0.5},  # Twins, 4.1
        **{"cswin_tiny": 0.2, "cswin_small": 0.4, "cswin_base": 0.5},
        "vit_base": 0.1,  # He et al. (2022), Table 11
    }
    own = ("hrvit", "hrformer", "hivit", "hiri_vit")
    found = {label: job.recipe.drop_path_rate for label, job in jobs().items() if not label.startswith(own)}
    assert {label: rate for label, rate in found.items() if rate is not None} == rates


def test_nothing_is_dropped_where_no_paper_says_so():
    with torch.device("meta"):
        assert rates_of(build_model(jobs()["hrformer_small"])) == []
        assert rates_of(build_model(jobs()["hivit_base_probed"])) == []
        assert rates_of(zoo.create_model(jobs()["hivit_base_mae"].model)) == []


def test_drop_path_of_hrvit_rises_along_the_third_branch():
    """HRViT 3.1: "The drop rate is gradually increased on the deepest 3rd branch, and other shallow branches follow the
    rate of the 3rd branch within the same module." A.1: "For the classification head [...] a dropout rate of 0.1".
    """
    with torch.device("meta"):
        network = build_model(jobs()["hrvit_b1"])
    assert network.head_drop.p == 0.1
    modules: dict[str, dict[str, list[float]]] = {}
    for name, module in network.named_modules():
        if name.endswith(".drop_path"):
            before, branch = name.split(".branches.")
            rates = modules.setdefault(before, {}).setdefault(branch.split(".")[0], [])
            rates.append(getattr(module, "drop_prob", 0.0))
    third = [rate for branches in modules.values() if "2" in branches for rate in branches["2"]]
    assert third == sorted(third)
    assert len(third) == 6 + 6 + 6 + 2  # Table 8: 6-6-6-2
    assert third[-1] == pytest.approx(0.1)
    for branches in modules.values():
        deepest = max(branches.values(), key=len)
        for rates in branches.values():
            assert rates == deepest[: len(rates)]


@pytest.mark.parametrize(
    ("label", "decays"),
    [
        ("hrvit_b1", None),  # A.1: "Note that model EMA and repeated augmentation are not employed here."
        ("hrformer_base", None),
        ("hivit_base", {1: 0.0, 100: 0.9999, 300_000: 0.9999}),  # "and exponential moving average (EMA)"
        # HIRI-ViT 4.5; the rise to the last decay is ours: (1 + t) / (10 + t), t = 0 at the second step.
        ("hiri_vit_small", {1: 0.0, 2: 1 / 10, 100: 99 / 108, 300_000: 0.9999}),
        ("hivit_base_fine_tuned", None),
    ],
)
def test_weights_are_averaged_where_the_paper_says_so(label, decays):
    ema = model_of(small(jobs()[label])).ema
    assert (None if ema is None else {step: ema.get_decay(step) for step in decays}) == (
        None if decays is None else pytest.approx(decays)
    )


def test_distillation_is_hiri_vits_alone():
    """HIRI-ViT 4.5; alpha is not printed."""
    alphas = {label: job.recipe.distillation_alpha for label, job in jobs().items()}
    assert {label for label, alpha in alphas.items() if alpha is not None} == {
        label for label in alphas if label.startswith("hiri_vit")
    }
    assert alphas["hiri_vit_small"] == 0.5


def test_pretraining_masks_and_decodes_as_the_paper_says():
    """HiViT, appendix A: "the mask ratio is set to 75% in default. The normalized target trick is also adopted"; "the
    decoder is designed to have 6 transformer layers"."""
    job = jobs()["hivit_base_mae"]
    assert job.input_size == (224, 224)
    with torch.device("meta"):
        network = zoo.create_model(job.model, img_size=job.input_size)
    assert (network.patches, network.visible) == (196, 49)
    assert len(network.decoder_blocks) == 6


def test_what_starts_from_what():
    starts = {label: job.starts_from["label"] for label, job in jobs().items() if job.starts_from}
    assert starts == {
        "hivit_base_fine_tuned": "hivit_base_mae",
        "hivit_base_probed": "hivit_base_mae",
        "hivit_large_fine_tuned": "hivit_large_mae",
        **{f"hiri_vit_{size}_768": f"hiri_vit_{size}" for size in ("small", "base", "large")},
    }
    keys = {job.key: label for label, job in jobs().items()}
    for label, source in starts.items():
        assert [keys[key] for key in jobs()[label].depends_on] == [source]
    assert {label for label, job in jobs().items() if job.stage == "pretrain"} == {"hivit_base_mae", "hivit_large_mae"}
    assert jobs()["hiri_vit_small"].input_size == (448, 448)  # "fine-tuned" from the training at 448
