"""What the papers' tables call FLOPs: each paper's own way to count, over the same trace of operators.

The four papers count in different ways; `benchmarks.cost` counts all models alike. Here the printed numbers can be
checked. Each convention was found by reproducing table cells (tests/benchmarks/test_conventions.py has them). Where the
zoo's forward differs from the published one in what a convention counts, the difference is worked out from the modules
that ran and the shapes that they saw.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mmseg.models.decode_heads import SegformerHead
from torch import nn

from benchmarks.cost import Cost, count
from benchmarks.trace import Trace
from zoo.hrformer import ConvFeedForward, HRFormer, WindowAttention
from zoo.hrvit import CrossAttention

CONVOLUTION, LINEAR, PRODUCT = ("aten.convolution",), ("aten.mm", "aten.addmm"), ("aten.bmm", "aten.baddbmm")
BATCH_NORM, LAYER_NORM = ("aten._native_batch_norm_legit_no_training",), ("aten.native_layer_norm",)
SOFTMAX, RELU, ADD, MULTIPLY = ("aten._softmax", "aten._safe_softmax"), ("aten.relu", "aten.relu_"), ("aten.add", "aten.add_"), ("aten.mul",)
NEAREST, BILINEAR = ("aten._unsafe_index",), ("aten.upsample_bilinear2d",)
POOLING = ("aten._adaptive_avg_pool2d", "aten.mean")
HEAD = "decode_head"


@dataclass(frozen=True)
class Convention:
    """A paper's way to count. `macs(model, input_size)` applies it."""

    name: str
    text: str  # what is counted and what is not, and for which tables
    rule: Callable[[nn.Module, Cost], int]
    enlargement: int = 1  # the paper's input is so many times as high and wide as the one that it names

    def macs(self, model: nn.Module, cost: Cost) -> int:
        """What the paper would print for `model`, of which `cost` is the count; number of operations.

        Raises:
            InputError: the model cannot take the enlarged input.
        """
        if self.enlargement > 1:
            channels, height, width = cost.input_size
            cost = count(model, (channels, self.enlargement * height, self.enlargement * width))
        return self.rule(model, cost)


def hrvit(model: nn.Module, cost: Cost) -> int:
    """HRViT, Tables 3 to 9: a counter hooked to modules, with half of the attention products added by hand."""
    trace = cost.trace
    total = _hooked(trace)
    total += trace.sum(*PRODUCT).macs // 2 + trace.sum(*BILINEAR, under=HEAD).elements
    total += 2 * trace.sum(*BATCH_NORM, under=HEAD).elements - trace.sum(*RELU, under=HEAD).elements
    # The published code pads the last stripe of rows and of columns and multiplies the padding, too.
    for path, module in model.named_modules():
        if isinstance(module, CrossAttention):
            for (_, height, width, channels), calls in trace.inputs[path].items():
                for across, along in ((height, width), (width, height)):
                    if rest := across % module.width:
                        # Either direction has half of the channels; of its two products one is counted.
                        total += calls * channels // 2 * ((module.width * along) ** 2 - (rest * along) ** 2)
    # The published head projects the maps with a bias, without norm and ReLU.
    for path, head in model.named_modules():
        if isinstance(head, SegformerHead):
            total += trace.sum(*CONVOLUTION, under=f"{path}.convs").elements
            total -= 2 * trace.sum(*BATCH_NORM, under=f"{path}.convs").elements
    return total


def hrformer(model: nn.Module, cost: Cost) -> int:
    """HRFormer, Tables 2, 5 to 7, 11 and 12 (ImageNet, OCR): the `flop_count` of its repository, a JIT trace."""
    trace = cost.trace
    elementwise = 4 * trace.sum(*BATCH_NORM).elements + trace.sum(*ADD, *RELU).elements
    elementwise += trace.sum(*MULTIPLY, under=HEAD).elements + 5 * trace.sum(*SOFTMAX, under=HEAD).elements
    for path, module in model.named_modules():
        if isinstance(module, WindowAttention):
            # Ours adds the relative bias and index offsets; there: the bias, softmax and dropout of the attention
            # maps; the scaling of the queries; and, each an operator of its own, the biases of four projections.
            maps = trace.at(path, *SOFTMAX).elements
            tokens = trace.at(f"{path}.attn.proj", *LINEAR).elements
            elementwise += 7 * maps + 5 * tokens - trace.at(path, *ADD).elements
        if isinstance(module, HRFormer) and module.neck is not None:
            # The published classifier, not the dense network, has dropouts in its feed-forward networks.
            for inner, layer in module.named_modules(prefix=path):
                if isinstance(layer, ConvFeedForward):
                    elementwise += sum(trace.at(f"{inner}.{name}", *CONVOLUTION).elements for name in ("fc1", "fc2"))
    return cost.macs + elementwise


def hrformer_pose(model: nn.Module, cost: Cost) -> int:
    """HRFormer, Tables 3, 4 and 10 (pose estimation): mmcv's counter, hooked to modules."""
    trace = cost.trace
    total = _hooked(trace) + trace.sum(*BILINEAR).elements
    for path, module in model.named_modules():
        if isinstance(module, WindowAttention):  # its output projection is applied without calling the module
            projection = trace.at(f"{path}.attn.proj", *LINEAR)
            total -= projection.macs + projection.biases
    return total


def hivit(model: nn.Module, cost: Cost) -> int:
    """HiViT, Tables 2, 3, 7 and 9: fvcore's `flop_count`."""
    trace = cost.trace
    norms = 5 * trace.sum(*LAYER_NORM).elements + 2 * trace.sum(*BATCH_NORM).elements
    pooling = trace.sum("aten._adaptive_avg_pool2d").inputs
    return cost.macs + norms + pooling + 4 * trace.sum(*BILINEAR).elements + trace.sum(*NEAREST).elements


def common(model: nn.Module, cost: Cost) -> int:
    return cost.macs


def without_products(model: nn.Module, cost: Cost) -> int:
    return cost.macs - cost.trace.sum(*PRODUCT).macs


def _hooked(trace: Trace) -> int:
    """What hooks on modules see, as both of those counters have it: no products, and no synchronised batch norms."""
    convolution, linear = trace.sum(*CONVOLUTION), trace.sum(*LINEAR)
    total = convolution.macs + convolution.biased + linear.macs + linear.biases
    total += 2 * trace.sum(*LAYER_NORM).elements + trace.sum(*RELU, *NEAREST).elements
    return total + trace.sum(*POOLING).inputs
