"""Size of a network: parameters and multiply-adds."""

import copy

import torch
from torch import nn


def parameter_count(module: nn.Module) -> int:
    """Number of parameter values, trainable or not; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def macs(module: nn.Module, image_size: int, in_channels: int = 3) -> int:
    """Multiply-adds of convolutions and matrix products for one image.

    Args:
        module: network that takes [1, in_channels, image_size, image_size]; it is not changed.
        image_size: height and width of the image.
        in_channels: channels of the image.

    Returns:
        The multiply-adds, counted as one each (half the FLOPs).
    """
    # Not at the top of the file, because it loads triton where that is installed.
    from torch.utils.flop_counter import FlopCounterMode

    # Counting on a copy leaves the modes and buffers of the original alone.
    counted = copy.deepcopy(module).eval()
    like = next(counted.parameters(), torch.empty(0))
    image = torch.zeros(
        1, in_channels, image_size, image_size, device=like.device, dtype=like.dtype
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(image)
    return counter.get_total_flops() // 2
