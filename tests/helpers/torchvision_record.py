"""Records state dicts and outputs of torchvision's networks, for machines without torchvision.

Run with a torchvision that imports; no weights are downloaded:

    python tests/helpers/torchvision_record.py > tests/helpers/torchvision_record.json
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

NETWORKS = ("resnet18", "resnet34", "resnet50", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0")
CLASSES = 5
RECORD = Path(__file__).with_name("torchvision_record.json")


def layout(state: dict[str, Tensor]) -> list[str]:
    """One line per module in order: its name, then name, shape and dtype of what it owns.

    float32 is left out, and so is the shape of a scalar.
    """
    lines: dict[str, list[str]] = {}
    last = None
    for key, value in state.items():
        module, _, name = key.rpartition(".")
        assert module == last or module not in lines, f"{module} comes in two places"
        last = module
        shape = "x".join(str(side) for side in value.shape)
        dtype = str(value.dtype).removeprefix("torch.").replace("float32", "")
        lines.setdefault(module, []).append(":".join(filter(None, (name, shape, dtype))))
    return [" ".join((module, *entries)) for module, entries in lines.items()]


def spread(shape: Sequence[int], start: float) -> Tensor:
    """Values over (-0.5, 0.5) in no visible order, the same with every version of torch."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((index * 0.7548776662466927 + start) % 1 - 0.5).float().reshape(shape)


def outputs(network: nn.Module) -> list[float]:
    """Logits, in evaluation mode, of one image of 64 x 64 pixels under weights made by rule."""
    state = network.state_dict()
    for position, (key, value) in enumerate(state.items()):
        filled = spread(value.shape, 0.5698402909980532 * position)
        if value.dim() > 1:
            # Unit variance of what follows a ReLU.
            filled = filled * (24 / value[0].numel()) ** 0.5
        elif key.endswith(("running_var", "weight")):
            filled = filled + 1
        state[key] = filled.to(value.dtype)
    network.load_state_dict(state)
    with torch.no_grad():
        return network.eval()(spread((1, 3, 64, 64), 0.25)).flatten().tolist()


def main() -> None:
    import torchvision

    layouts, logits = {}, {}
    for name in NETWORKS:
        network = getattr(torchvision.models, name)(num_classes=CLASSES)
        layouts[name] = layout(network.state_dict())
        logits[name] = outputs(network)
    version = torchvision.__version__.split("+")[0]
    json.dump({"torchvision": version, "outputs": logits, "layouts": layouts}, sys.stdout, indent=0)
    print()


if __name__ == "__main__":
    main()
