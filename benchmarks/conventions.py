"""What the papers' tables call FLOPs: each paper's own way to count, over the same trace of operators.

`benchmarks.cost` counts all models alike; here the printed numbers themselves can be checked. Each convention was found
by reproducing table cells, which tests/benchmarks/test_conventions.py holds. Where the zoo's forward differs from the
published one in what a convention counts, the difference follows from the modules that ran and the shapes that they
saw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import nn

from benchmarks.cost import Cost
from benchmarks.trace import Trace
from zoo.backbone import Backbone
from zoo.baselines.hrnet import ReducedAttention
from zoo.baselines.mit import MiT
from zoo.hrformer import ConvFeedForward, HRFormer, WindowAttention
from zoo.hrvit import CrossAttention

CONVOLUTION, LINEAR, PRODUCT = ("aten.convolution",), ("aten.mm", "aten.addmm"), ("aten.bmm", "aten.baddbmm")
BATCH_NORM, LAYER_NORM = ("aten._native_batch_norm_legit_no_training",), ("aten.native_layer_norm",)
SOFTMAX, RELU = ("aten._softmax", "aten._safe_softmax"), ("aten.relu", "aten.relu_")
ADD, MULTIPLY = ("aten.add", "aten.add_"), ("aten.mul",)
NEAREST, BILINEAR = ("aten._unsafe_index",), ("aten.upsample_bilinear2d",)  # what they are on meta tensors
ADAPTIVE_POOLING, MEAN = ("aten._adaptive_avg_pool2d",), ("aten.mean",)
HEAD = "decode_head"


@dataclass(frozen=True)
class Convention:
    """How a paper counts."""

    name: str
    text: str  # what is counted and what is not, and in which tables
    macs: Callable[[nn.Module, Cost], int]  # what the paper would print for a model, of which the second is the count


def hrvit(model: nn.Module, cost: Cost) -> int:
    """HRViT, Tables 3 to 7, 9 and S9. `cost` is the count of `model`."""
    trace = cost.trace
    # (mmsegmentation's SegFormer head projects each map with a norm and a ReLU, the published one with a bias, which
    # is one per element as well.)
    total = _hooked(trace) + trace.sum(*PRODUCT).macs // 2 + trace.sum(*BILINEAR).elements
    # The published code pads the last stripe of rows and of columns, and multiplies the padding, too.
    for path, module in model.named_modules():
        if isinstance(module, CrossAttention):
            for (_, height, width, channels), calls in trace.inputs.get(path, {}).items():
                for across, along in ((height, width), (width, height)):
                    if rest := across % module.width:
                        # Either direction has half of the channels; of its two products one is counted.
                        total += calls * channels // 2 * ((module.width * along) ** 2 - (rest * along) ** 2)
        elif isinstance(module, ReducedAttention):  # SegFormer's own formula has both products
            total += trace.at(path, *PRODUCT).macs // 2
        elif isinstance(module, MiT):  # quoted from SegFormer, whose counter sees no LayerNorm either
            encoder = f"{path}.backbone".lstrip(".")
            total += trace.sum(*PRODUCT, under=encoder).macs // 2 - 2 * trace.sum(*LAYER_NORM, under=encoder).elements
            total -= trace.sum(*MEAN, under=encoder).inputs  # of attention maps over heads, for nobody's use
    return total


def hrformer(model: nn.Module, cost: Cost) -> int:
    """HRFormer, Tables 5 to 9, 11 and 12 (ImageNet, OCR). `cost` is the count of `model`."""
    trace = cost.trace
    elementwise = 4 * trace.sum(*BATCH_NORM).elements + trace.sum(*ADD, *RELU).elements
    own = next((module for module in model.modules() if isinstance(module, HRFormer)), None)
    dense = own is not None and own.neck is None
    if own is not None:
        elementwise += trace.sum(*MULTIPLY, under=HEAD).elements + 5 * trace.sum(*SOFTMAX, under=HEAD).elements
    else:
        elementwise += _on_tokens(model, trace)
    for path, module in model.named_modules():
        if isinstance(module, WindowAttention):
            # Published: on the attention maps the bias, the softmax and a dropout; on the tokens the scaling of the
            # queries and, operators of their own, the biases of four projections. Ours adds offsets of indices, too.
            maps = trace.at(path, *SOFTMAX).elements
            tokens = trace.at(f"{path}.attn.proj", *LINEAR).elements
            elementwise += (1 + 5 + 1) * maps + (1 + 4) * tokens - trace.at(path, *ADD).elements
        elif isinstance(module, ConvFeedForward) and not dense:
            # The published classifier, unlike the dense network, has two dropouts in each feed-forward network.
            elementwise += sum(trace.at(f"{path}.{name}", *CONVOLUTION).elements for name in ("fc1", "fc2"))
    return cost.macs + elementwise


def _on_tokens(model: nn.Module, trace: Trace) -> int:
    """What HRFormer's counter sees element by element in another paper's transformer, besides norms and additions."""
    attention = {path for path, operator in trace.operators if operator in PRODUCT}
    maps = trace.sum(*SOFTMAX).elements
    # Queries, a first argument as the maps are, are scaled once; the operator that fuses attention scales keys as well.
    queries = trace.sum(*PRODUCT).inputs - maps
    scaled = sum(trace.at(path, *MULTIPLY).elements for path in attention)
    total = trace.sum(*MULTIPLY).elements - scaled + queries + (5 + 1) * maps  # a softmax and a dropout
    total += trace.sum(*LINEAR).biased  # of more than two dimensions: additions of their own
    for path, module in model.named_modules():
        called = trace.inputs.get(path, {}).items()
        if isinstance(module, nn.Linear) and module.bias is not None:
            total -= sum(calls * shape[0] * module.out_features for shape, calls in called if len(shape) == 2)
        elif isinstance(module, nn.Dropout) and not path.endswith("attn_drop"):  # that of the maps
            total += sum(calls * prod(shape) for shape, calls in called)
    return total


def hrformer_pose(model: nn.Module, cost: Cost) -> int:
    """HRFormer, Tables 3, 4 and 10 (pose estimation). `cost` is the count of `model`."""
    trace = cost.trace
    total = _hooked(trace) + trace.sum(*BILINEAR).elements
    for path, module in model.named_modules():
        if isinstance(module, WindowAttention):  # its output projection is applied without a call of the module
            projection = trace.at(f"{path}.attn.proj", *LINEAR)
            total -= projection.macs + projection.biases
    return total


def hivit(model: nn.Module, cost: Cost) -> int:
    """HiViT, Tables 1 to 4, 7 and 9. `cost` is the count of `model`."""
    trace = cost.trace
    norms = 5 * trace.sum(*LAYER_NORM).elements + 2 * trace.sum(*BATCH_NORM).elements
    resizing = 4 * trace.sum(*BILINEAR).elements + trace.sum(*NEAREST).elements
    return cost.macs + norms + resizing + trace.sum(*ADAPTIVE_POOLING).inputs


def common(model: nn.Module, cost: Cost) -> int:
    """The convention of `benchmarks.cost`. `cost` is the count of `model`."""
    return cost.macs


def without_products(model: nn.Module, cost: Cost) -> int:
    """The same without matrix products of two activations. `cost` is the count of `model`."""
    return cost.macs - cost.trace.sum(*PRODUCT).macs


def _hooked(trace: Trace) -> int:
    """What counters see that hook modules by their type: no products, no GELU, and no synchronised batch norms."""
    convolution, linear = trace.sum(*CONVOLUTION), trace.sum(*LINEAR)
    total = convolution.macs + convolution.biased + linear.macs + linear.biases
    total += 2 * trace.sum(*LAYER_NORM).elements + trace.sum(*RELU, *NEAREST).elements
    return total + trace.sum(*ADAPTIVE_POOLING, *MEAN).inputs


_HOOKED_TEXT = (
    "MACs of convolutions with their biases (1 per element) and of linear layers with theirs (1 per output channel), "
    "2 per LayerNorm element, 1 per element of ReLU, nearest upsampling and pooled input"
)

HRVIT = Convention(
    "hrvit",
    f"HRViT, Tables 3 to 7, 9 and S9: {_HOOKED_TEXT} and bilinear resizing; of the two attention products only one, "
    "over stripes padded to their full width. Of MiT's and HRNet-MiT's attention both, as SegFormer counts, which sees "
    "no LayerNorm of MiT's. Not counted: batch norms (synchronised ones are unknown to the counter), GELU, Hardswish, "
    "softmax, additions.",
    hrvit,
)
HRFORMER = Convention(
    "hrformer",
    "HRFormer, Tables 5 to 9, 11 and 12: the flop_count of its code, from a JIT trace. MACs of convolutions, "
    "linear layers and all products; per element 4 for batch norms, 5 for softmax, 1 for additions (the biases of "
    "linear layers on tokens are some), multiplications, ReLU and dropout; of other papers' networks those dropouts "
    "that the implementation here has. Not counted: LayerNorm, GELU, resizing, the biases of convolutions.",
    hrformer,
)
HRFORMER_POSE = Convention(
    "hrformer_pose",
    f"HRFormer, Tables 3, 4 and 10: mmcv's counter of module calls, backbone alone. {_HOOKED_TEXT} and bilinear "
    "upsampling; windows with their padding. Not counted: the products of attention and its output projection (no call "
    "of a module), batch norms (synchronised), GELU, softmax, additions.",
    hrformer_pose,
)
HIVIT = Convention(
    "hivit",
    "HiViT, Tables 1 to 4, 7 and 9: fvcore's flop_count. MACs of convolutions, linear layers and all products; per "
    "element 5 for LayerNorm, 2 for batch norms, 4 for bilinear and 1 for nearest resizing, 1 for adaptively pooled "
    "input. Not counted: softmax, GELU, additions, biases.",
    hivit,
)
HIRI_VIT = Convention(
    "hiri_vit", "HIRI-ViT, Tables 2, 3, 7, 8 and 9 (ImageNet): as all models are counted here.", common
)
HIRI_VIT_DENSE = Convention(
    "hiri_vit_dense",
    "HIRI-ViT, Tables 4 to 6 (detectors, UPerNet): MACs of convolutions and linear layers, without the products of "
    "attention. The cells of Table 6 fit twice the height and width that it names; detectors are not counted here.",
    without_products,
)

CONVENTIONS = (HRVIT, HRFORMER, HRFORMER_POSE, HIVIT, HIRI_VIT, HIRI_VIT_DENSE)


def paper_convention(model: nn.Module) -> Convention | None:
    """The convention of the paper that `model` is from: a model of the zoo or a segmentor over it; None for others."""
    backbone = next((module for module in model.modules() if isinstance(module, Backbone)), None)
    match getattr(backbone, "family", None):
        case "HRViT":
            return HRVIT
        case "HRFormer":
            return HRFORMER_POSE if backbone.config.bilinear_fusion else HRFORMER
        case "HiViT":
            return HIVIT
        case "HIRI-ViT":
            return HIRI_VIT_DENSE if hasattr(model, HEAD) else HIRI_VIT
    return None
