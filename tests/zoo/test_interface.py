"""What every model of the zoo must do, asked of the small test variant of each family.

A new family adds its ``test_*`` variant to the registry and is tested here without another line.
"""

import copy
import math

import onnxruntime
import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from benchmarks.speed import count_saved_bytes

NAMES = [name for name in zoo.list_models("test_*") if not name.endswith("_mae")]
SIZES = [(32, 32), (33, 47), (200, 264), (256, 320), (64, 64)]


def images(size=(64, 64), batch=1):
    return torch.rand(batch, 3, *size)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_there_are_test_variants_and_they_are_hidden():
    assert len(NAMES) >= 2
    assert not [name for name in zoo.list_models() if name.startswith("test")]


@pytest.mark.parametrize("size", SIZES)
def test_any_size(name, size):
    model = zoo.create_model(name, features_only=True).eval()
    maps = model(images(size))
    strides = model.feature_info.reduction()
    assert [tuple(m.shape) for m in maps] == [
        (1, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        for channels, stride in zip(model.feature_info.channels(), strides, strict=True)
    ]
    assert strides == sorted(strides)
    assert zoo.create_model(name, num_classes=7)(images(size, 2)).shape == (2, 7)


def test_features_only_takes_out_indices(name):
    torch.manual_seed(1)
    full = zoo.create_model(name, features_only=True).eval()
    torch.manual_seed(1)
    some = timm.create_model(name, features_only=True, out_indices=(0, -1)).eval()
    x = images()
    everything, taken = full(x), some(x)
    assert len(taken) == 2
    torch.testing.assert_close(taken, [everything[0], everything[-1]])
    first = zoo.create_model(name, features_only=True, out_indices=(0,))
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in full.parameters())
    first(x)[0].mean().backward()
    assert all(p.grad is not None for p in first.parameters())  # nothing unused is left


def test_forward_intermediates(name):
    model, x = zoo.create_model(name).eval(), images()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert len(maps) == len(model.feature_info)
    for options in ({"stop_early": True}, {}):
        (first,) = model.forward_intermediates(x, indices=[0], intermediates_only=True, **options)
        torch.testing.assert_close(first, maps[0])
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(last.permute(0, 3, 1, 2), maps[-1])
    with pytest.raises(zoo.ZooError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_classifier_can_be_replaced_and_removed(name):
    model, x = zoo.create_model(name, num_classes=5), images(batch=2)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    assert model(x).shape == (2, model.num_features)
    features = model.forward_features(x)
    torch.testing.assert_close(model.eval().forward_head(features, pre_logits=True), model.forward_head(features))
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    assert zoo.create_model(name, num_classes=0)(x).shape == (2, model.num_features)


def test_a_classifier_needs_pooling(name):
    model = zoo.create_model(name)
    for failing in (
        lambda: zoo.create_model(name, global_pool=""),
        lambda: model.reset_classifier(5, ""),
        lambda: zoo.create_model(name, num_classes=0, global_pool="").reset_classifier(5),
    ):
        with pytest.raises(zoo.ZooError, match="num_classes=0") as error:
            failing()
        assert "\n" not in str(error.value)
    assert (model.global_pool, model.num_classes) == ("avg", 1000)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 3, 64, 64), (1, 3, 31, 64), (1, 3, 64, 0)])
def test_what_is_no_batch_of_images_is_told(name, shape):
    for features_only in (False, True):
        with pytest.raises(zoo.ZooError, match="images") as error:
            zoo.create_model(name, features_only=features_only)(torch.rand(shape))
        assert "\n" not in str(error.value)


def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, x = zoo.create_model(name, drop_path_rate=0.0).train(), images(batch=2)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_gradient_checkpointing_saves_memory(name):
    model, x = zoo.create_model(name).train(), images(batch=2)
    plain = count_saved_bytes(model, x)
    model.set_grad_checkpointing()
    assert count_saved_bytes(model, x) < plain


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["synchronised", "frozen", "partly frozen"])
def test_other_batch_norms_train_alike(name, kind, checkpointing):
    """Same gradients as without tricks, twice through one graph, and statistics that move once or not at all."""
    model, x = zoo.create_model(name, drop_path_rate=0.0).train(), images(batch=2)
    if kind == "synchronised":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif kind == "frozen":
        model = freeze_batch_norm_2d(model)
    else:
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms[::2]:
            norm.eval()
    reference = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    first = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    torch.func.functional_call(reference, {}, (x,))
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * first[key], rtol=1e-3, atol=1e-5)
    for key, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[key], buffer, rtol=1e-4, atol=1e-5)


def test_trains_at_the_smallest_size_with_one_image(name):
    model = zoo.create_model(name).train()
    model(images((32, 32))).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_was_pruned_is_told(name):
    model = zoo.create_model(name)
    model.prune_intermediate_layers([0])
    for failing in (
        lambda: model.forward_intermediates(images(), indices=[1], intermediates_only=True),
        lambda: model.prune_intermediate_layers([1]),
    ):
        with pytest.raises(zoo.ZooError, match="pruned"):
            failing()


def test_timm_s_switch_of_fused_attention_is_respected(name):
    model, x = zoo.create_model(name).eval(), images((64, 96))
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = model(x)
        timm.layers.set_fused_attn(False)
        try:
            with Watch():
                got = model(x)
        finally:
            timm.layers.set_fused_attn(True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert name == "test_mit" or not any("scaled_dot_product" in func for func in seen)  # that is mmsegmentation's


def test_construction_is_deterministic_and_state_round_trips(name):
    first, second = (torch.manual_seed(3) and zoo.create_model(name).eval() for _ in range(2))
    x = images()
    assert torch.equal(first(x), second(x))
    other = zoo.create_model(name).eval()
    other.load_state_dict(first.state_dict(), strict=True)
    twin = copy.deepcopy(first)
    with torch.no_grad():
        expected = first(x)
        assert torch.equal(other(x), expected)
        assert torch.equal(twin(x), expected)
        for p in first.parameters():
            p.add_(0.1)
        assert torch.equal(twin(x), expected)
        assert not torch.equal(first(x), expected)


def test_layer_decay_groups_follow_depth(name):
    model = zoo.create_model(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    parameters = list(model.parameters())
    assert scale[id(parameters[-1])] == 1.0  # the head
    assert min(scale.values()) == scale[id(dict(model.named_parameters())[model.default_cfg["first_conv"] + ".weight"])]
    assert len(set(scale.values())) >= 4
    create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)


@pytest.mark.parametrize("copied", [False, True])
def test_optimizers_see_through_the_wrapper_of_dense_models(name, copied):
    model = zoo.create_model(name, features_only=True)
    model = copy.deepcopy(model) if copied else model
    assert isinstance(model, FeatureGetterNet)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    assert len({group["lr_scale"] for group in groups.values()}) >= 4
    # As deep in the wrapped model as in the bare one.
    for coarse in (False, True):
        outside = group_parameters(model, model.group_matcher(coarse), reverse=True)
        inside = group_parameters(model.model, model.model.group_matcher(coarse), reverse=True)
        assert outside == {f"model.{key}": depth for key, depth in inside.items()}
    for key, p in model.named_parameters():
        positions = ("absolute_pos_embed", "relative_position_bias_table")
        if p.ndim == 1 or key.endswith(positions):
            assert groups[id(p)]["weight_decay"] == 0, key


@pytest.mark.parametrize("features_only", [False, True])
def test_no_weight_decay_names_parameters_at_every_level(name, features_only):
    """A training program may ask each module in turn: the same parameters must come out."""
    model = zoo.create_model(name, features_only=features_only)
    asked = [
        {f"{prefix}.{key}".lstrip(".") for key in module.no_weight_decay()}
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
    ]
    assert len(asked) == 1 + features_only
    assert asked[0] == asked[-1] <= set(dict(model.named_parameters()))


def test_mmsegmentation_builds_it(name):
    from mmseg.registry import MODELS

    backbone = MODELS.build({"type": "mmseg.TIMMBackbone", "model_name": name, "features_only": True})
    assert len(backbone(images())) == len(backbone.timm_model.feature_info.channels())


@pytest.mark.parametrize("features_only", [False, True])
def test_export(name, features_only, tmp_path):
    model, x = zoo.create_model(name, features_only=features_only).eval(), images()
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-5)
    if features_only:
        torch.onnx.export(exported, f=tmp_path / "model.onnx", verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close([torch.from_numpy(o) for o in outputs], expected, rtol=1e-4, atol=1e-5)


def test_compile(name):
    model, x = zoo.create_model(name).eval(), images((48, 80))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5
        )


BLOCKS = {  # one of each kind: a whole network takes minutes to trace with its backward pass
    "test_hivit": lambda model: (model.blocks[-1], (1, 16, model.num_features), (4, 4)),
    "test_hrvit": lambda model: (model.features[-1].branches[2][0], (1, 5, 6, 24)),
    "test_hrformer": lambda model: (model.stage4[0].branches[2][0], (1, 5, 6, 16)),
    "test_cswin": lambda model: (model.stages[2].blocks[0], (1, 5, 6, 32)),
    "test_hiri_vit": lambda model: (model.stages[3].blocks[0], (1, 32, 4, 5)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_train_compiled(name):
    block, shape, *rest = BLOCKS[name](zoo.create_model(name, drop_path_rate=0.0).train())
    x = torch.rand(shape)
    gradients = []
    for run in (block, torch.compile(copy.deepcopy(block), backend="aot_eager")):
        run.zero_grad()
        run(x, *rest).square().mean().backward()
        gradients.append([p.grad for p in run.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_autocast_and_channels_last_agree(name):
    model, x = zoo.create_model(name).eval(), images((64, 96), 2)
    with torch.no_grad():
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
    assert (low.float() - expected).abs().max() < 0.05 * expected.abs().max() + 0.02
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x).float().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_meta_and_functional_call(name):
    with torch.device("meta"):
        empty = zoo.create_model(name)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)
    model, x = zoo.create_model(name).eval(), images()
    with torch.no_grad():
        expected = model(x)
        state = {key: value.to("meta") for key, value in model.state_dict().items()}
        assert torch.func.functional_call(model, state, (x.to("meta"),)).is_meta
        assert torch.equal(model(x), expected)
        doubled = {key: 2 * value for key, value in model.state_dict().items()}
        assert not torch.equal(torch.func.functional_call(model, doubled, (x,)), expected)
        assert torch.equal(model(x), expected)
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).mean())(dict(model.named_parameters()))
    assert all(grad.isfinite().all() for grad in grads.values())
    model.to("meta")
    assert model(x.to("meta")).is_meta


def test_other_input_channels_and_dtype(name):
    model = timm.create_model(name, in_chans=4, num_classes=2, dtype=torch.float64)
    assert model(torch.rand(1, 4, 64, 64, dtype=torch.float64)).dtype == torch.float64


def test_trains(name):
    model = zoo.create_model(name, num_classes=2, drop_path_rate=0.0)
    optimizer = create_optimizer_v2(model, "adamw", lr=3e-3)
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
