"""The operations in the graph of a network, and the tensors that it reads.

A rule of PyTorch for forward mode need not be right once it is differentiated again: some read
saved statistics as constants, and others fail. So forward mode serves a network only if all of its
operations are known, by a test of each against the unrolled steps. Known are the rules of PyTorch
that :data:`FORWARD_MODE` names, and the rules for normalisations in this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Operations by the names of their nodes in a graph of autograd, "ReluBackward0" for "Relu".
FORWARD_MODE = frozenset(
    """
    Abs AdaptiveAvgPool2D AdaptiveMaxPool2D Add Addcmul Addmm Amax AsStrided AvgPool2D AvgPool3D Bmm
    Cat Celu ChannelShuffle Clamp ClampMax ClampMin Clone ConstantPadNd Convolution Cos Div Elu Erf
    Exp Expand Flip Gather Gelu Hardshrink Hardswish Hardtanh Im2Col Index IndexSelect LeakyRelu
    Lerp LinalgVectorNorm Log LogSigmoid MaskedFill Max MaxPool2DWithIndices Maximum Mean Minimum
    Mish Mm Mul NativeDropout Neg Permute PixelShuffle PixelUnshuffle Pow PreluKernel
    ReflectionPad2D Relu Repeat ReplicationPad2D ReshapeAlias Roll Rsqrt Select Sigmoid Sign Silu
    Sin Slice Softplus Softshrink Split SplitWithSizes Sqrt Squeeze Stack Std Sub Sum T Tanh
    Threshold ToCopy Transpose Unbind UnsafeSplit UnsafeView Unsqueeze UpsampleBicubic2D
    UpsampleBilinear2D UpsampleNearest2D Var View Where
    """.split()
)
#: Operations whose second derivative in PyTorch is wrong, in plain double backward too.
INEXACT = {
    "WeightNormInterface": "PyTorch takes the norm in weight_norm for a constant when it "
    "differentiates the gradient"
}
#: Functions whose forward-mode rule is one of this package.
NORMS = (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm)
_NORM_NODES = {"CudnnBatchNorm", "NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm"}
#: Nodes between the output of a norm's function and the node of the norm itself, at most.
_NODES_AFTER_A_NORM = 4


class RecordNorms(TorchFunctionMode):
    """Remembers the nodes that came from the functions in :data:`NORMS`.

    A norm that is called in another way, from a scripted module for example, has the same node but
    keeps the rule of PyTorch. As long as this mode is kept, so are the nodes and what they save.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nodes: set[Any] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in NORMS:
            node = output.grad_fn
            for _ in range(_NODES_AFTER_A_NORM):
                if node is not None and operation(node) in _NORM_NODES:
                    self.nodes.add(node)
                if node is None or node in self.nodes or not node.next_functions:
                    break
                node = node.next_functions[0][0]
        return output


def operation(node: Any) -> str:
    """The operation of a node; the whole name of a node that is not an operation of PyTorch."""
    found = re.fullmatch(r"(\w+)Backward\d+", node.name())
    return found[1] if found else str(node.name())


def unknown_operations(outputs: Iterable[Tensor], norms: set[Any]) -> set[str]:
    """Operations in the graph of some outputs that forward mode cannot be trusted with.

    Args:
        outputs: tensors with or without a graph.
        norms: nodes found by :class:`RecordNorms` while the outputs were computed.
    """
    return {
        operation(node)
        for node, _ in _edges(outputs)
        if not (
            operation(node) in FORWARD_MODE
            or node in norms
            or hasattr(node, "variable")
            or _is_linear(node)
        )
    }


def _is_linear(node: Any) -> bool:
    """Whether a node is of a ``torch.autograd.Function`` with a rule that no value goes into.

    A rule of forward mode that reads what the function has saved may take it for a constant.
    """
    function = getattr(node, "_forward_cls", None)
    if function is None or function.jvp is torch.autograd.Function.jvp:
        return False
    return not node.saved_tensors and not any(isinstance(v, Tensor) for v in vars(node).values())


def reads(outputs: Iterable[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether the graph of some outputs leads to one of the tensors."""
    leaves = {id(t) for t in tensors if t.grad_fn is None}
    inner = {(t.grad_fn, t.output_nr) for t in tensors if t.grad_fn is not None}
    outputs = list(outputs)
    return any(id(t) in leaves for t in outputs) or any(
        edge in inner or id(getattr(edge[0], "variable", None)) in leaves
        for edge in _edges(outputs)
    )


def _edges(outputs: Iterable[Tensor]) -> Iterator[tuple[Any, int]]:
    """Every node behind the outputs with each number of its outputs that is used."""
    waiting: list[tuple[Any, int]] = [
        (o.grad_fn, o.output_nr) for o in outputs if o.grad_fn is not None
    ]
    seen = set(waiting)
    while waiting:
        edge = waiting.pop()
        yield edge
        for following in edge[0].next_functions:
            if following[0] is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
