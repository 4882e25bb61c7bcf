"""AFD: adversarial feature maps, each network imitating the maps of the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mclfast._base.checks import check_not_negative, check_positive
from mclfast._base.settings import setting
from mclfast._base.tensors import wide
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.losses.distillation import mutual_kd_loss
from mclfast.methods._maps import check_maps, convolution_to_width, to_smallest
from mclfast.methods._options import DistillOptions
from mclfast.methods.base import Method, check_peers, prepared
from mclfast.methods.baseline import sum_cross_entropy


class Discriminator(nn.Sequential):
    """Judges at every place of a map [B, c, h, w] whether it is real: [B, 1, h, w] in (0, 1).

    It has no BatchNorm, which would hide the shift between real and imitated maps.
    """

    def __init__(self, channels: int) -> None:
        hidden = max(channels // 2, 1)
        super().__init__(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, 1, 3, padding=1),
            nn.Sigmoid(),
        )


class AFD(Method):
    """Online distillation of feature maps, arXiv 2002.01775, for two networks or more.

    ``sum_a CE_a + distill_weight sum_a mean_{b != a} KD(z_a <- z_b) + adversarial_weight sum_a
    mean (1 - D_a(G_a))**2`` with G_a the last map of network a. The networks form a cycle: for
    discriminator D_a the maps of the network before a are real and the maps of a are imitated.
    After each step D_a lowers ``mean (1 - D_a(G_{a-1}))**2 + mean D_a(G_a)**2`` on constant maps. A
    network whose maps have another width than those of the network before it imitates them through
    a 1x1 convolution, which is trained with the network; the larger of two sizes is averaged down.

    Cycle, least-squares form and logit loss are the paper's; its constants could not be checked.
    Some choices are made here: the adversarial loss is a weighted part of the one loss of the
    networks, where the paper gives it an optimiser of its own with a small learning rate, and the
    discriminators have a shape, a learning rate (constant over the run) and a weight decay
    (decoupled, because as a part of the gradient it would outweigh it). All but the shape are
    options.
    """

    @dataclass
    class Options(DistillOptions):
        distill_weight: float = setting(1.0, "weight of the distillation between logits")
        adversarial_weight: float = setting(0.1, "weight of the networks' adversarial loss")
        discriminator_lr: float = setting(2e-5, "Adam learning rate of the discriminators")
        discriminator_weight_decay: float = setting(
            0.1, "decoupled weight decay of the discriminators"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("distill_weight", "adversarial_weight", "discriminator_weight_decay"):
                check_not_negative(name, getattr(self, name))
            check_positive("discriminator_lr", self.discriminator_lr)

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.discriminators: nn.ModuleList | None = None
        self.transfers: nn.ModuleList | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "afd", 2)
        check_maps(setup.example.maps, "afd")
        o, widths = self.options, [m.shape[1] for m in setup.example.maps]
        # For network 0, index -1 is the last network, which closes the cycle.
        real = [widths[a - 1] for a in range(len(widths))]
        self.discriminators = nn.ModuleList(Discriminator(c) for c in real)
        self.transfers = nn.ModuleList(
            convolution_to_width(own, wanted) for own, wanted in zip(widths, real, strict=True)
        )
        self.optimizer = torch.optim.AdamW(
            self.discriminators.parameters(),
            lr=o.discriminator_lr,
            weight_decay=o.discriminator_weight_decay,
        )

    def own_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {} if self.optimizer is None else {"discriminators": self.optimizer}

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        o, logits = self.options, outputs.final_logits
        ce = sum_cross_entropy(outputs, batch.labels)
        distill = mutual_kd_loss(logits, logits, o.distill_temperature)
        with torch.autocast(outputs.maps[0].device.type, enabled=False):
            adversarial = torch.stack(
                [
                    (1 - _frozen(judge, imitated)).square().mean()
                    for judge, _, imitated in self._trials(outputs.maps)
                ]
            ).sum()
        return {
            "loss": ce + o.distill_weight * distill + o.adversarial_weight * adversarial,
            "ce": ce,
            "distill": distill,
            "adversarial": adversarial,
        }

    def after_step(self, outputs: PeerOutputs, batch: Batch) -> None:
        losses = [
            (1 - judge(real)).square().mean() + judge(imitated.detach()).square().mean()
            for judge, real, imitated in self._trials(outputs.maps)
        ]
        optimizer = prepared(self.optimizer)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()

    def _trials(self, maps: Sequence[Tensor]) -> list[tuple[nn.Module, Tensor, Tensor]]:
        """Every discriminator with its real (constant) and imitated map, both of one shape."""
        parts = zip(prepared(self.discriminators), prepared(self.transfers), strict=True)
        trials = []
        for a, (judge, change) in enumerate(parts):
            real, own = to_smallest([wide(maps[a - 1]).detach(), wide(maps[a])])
            trials.append((judge, real, change(own)))
        return trials


def _frozen(module: nn.Module, x: Tensor) -> Tensor:
    """Output of a module whose parameters get no gradient."""
    return functional_call(module, {n: p.detach() for n, p in module.named_parameters()}, x)
