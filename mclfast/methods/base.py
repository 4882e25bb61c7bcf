"""Base class of the training methods: a loss of the peers' outputs, with modules of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from mclfast._base.settings import coerce_fields
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup, mean_logits
from mclfast.data.augment_contrastive import ContrastiveAugmentation

Part = TypeVar("Part")


def prepared(part: Part | None) -> Part:
    """A part that :meth:`Method.prepare` makes; RuntimeError if it is None because it was not."""
    if part is None:
        raise RuntimeError(
            "loss: expected prepare() to be called before, got a method that is not prepared"
        )
    return part


def check_peers(setup: Setup, method: str, least: int, *, exactly: bool = False) -> None:
    """Raises ValueError if a cohort has fewer networks than a method needs, or too many.

    Args:
        setup: cohort and data of the run.
        method: name of the method in the error message.
        least: smallest number of networks.
        exactly: whether more networks than ``least`` are wrong too.
    """
    count = len(setup.example.logits)
    if count < least or (exactly and count > least):
        how = "exactly" if exactly else "at least"
        raise ValueError(
            f"cohort: expected {how} {least} networks for method {method}, got {count}"
        )


class Method(nn.Module):
    """Turns the outputs of a cohort into a loss; it never sees the networks.

    A subclass sets the class attributes, defines its ``Options`` and implements :meth:`loss`. A
    method with hyperparameters that the bilevel step learns implements :meth:`meta_parameters`,
    :meth:`inner_loss` and :meth:`outer_loss` too; the trainer calls them every ``bilevel_every``
    steps.

    Args:
        feature_dims: width of the pooled feature of every stage, networks of stages.
        options: settings of the method; None for the defaults.
    """

    #: Whether the networks carry auxiliary heads at their intermediate stages.
    auxiliary_heads: ClassVar[bool] = False
    #: "one": all peers see the same augmented images; "per_peer": each draws its own; "query_key":
    #: all peers see the first view of each image, the teacher a second one.
    views: ClassVar[Literal["one", "per_peer", "query_key"]] = "one"
    #: Whether gradients are divided where networks that share parts branch off.
    rescale_gradients: ClassVar[bool] = False
    #: Whether a moving average of the cohort runs too, as ``PeerOutputs.teacher``.
    teacher: ClassVar[bool] = False
    #: "eval": the teacher runs in evaluation mode, and all of it is averaged after the step.
    #: "train": the teacher runs like the key networks of momentum contrast (arXiv 1911.05722), in
    #: training mode with statistics of its own, on a shuffled batch (its outputs are in the order
    #: of the batch); its parameters are averaged before it runs.
    teacher_mode: ClassVar[Literal["eval", "train"]] = "eval"
    #: Whether the classifiers learn. If they do not, evaluation sets them to the class means of the
    #: features, see :mod:`mclfast.train.class_means`.
    supervised: ClassVar[bool] = True
    #: Whether the cohort carries projection heads (``PeerOutputs.embeddings``).
    projections: ClassVar[bool] = False
    #: Kind of the projection heads, see :class:`mclfast.cohort.heads.ProjectionHead`.
    projection: ClassVar[Literal["mlp", "linear"]] = "mlp"
    #: Whether the method reads the peers' maps (``PeerOutputs.maps`` and ``shared``). Maps that no
    #: method reads are not kept, which saves their memory if peers run one after the other.
    uses_maps: ClassVar[bool] = True

    @dataclass
    class Options:
        """Settings of the method; each becomes a command-line option and a recipe field.

        The options of every method derive from this class, which checks their types.
        """

        def __post_init__(self) -> None:
            coerce_fields(self)

    def __init__(self, feature_dims: Sequence[Sequence[int]], options: Any = None) -> None:
        super().__init__()
        self.options: Any = self.Options() if options is None else options
        if not isinstance(self.options, self.Options):
            raise TypeError(
                f"options: expected {self.Options.__qualname__}, got {type(options).__qualname__}"
            )

    @classmethod
    def projection_kind(cls, options: Any) -> Literal["mlp", "linear"]:
        """Kind of the projection heads: :attr:`projection`, unless a method's options choose it."""
        return cls.projection

    def augmentation(self) -> ContrastiveAugmentation | None:
        """Augmentation of training images in place of the data set's own; None to keep that."""
        return None

    def view_count(self, networks: int) -> int:
        """Number of views of an image that a cohort of ``networks`` peers gets, by ``views``."""
        return {"one": 1, "per_peer": networks, "query_key": 2}[self.views]

    def batch_parts(self) -> int:
        """Number of equal parts of a batch; batch norm takes the statistics of one at a time."""
        return 1

    def prepare(self, setup: Setup) -> None:
        """Builds the parts that depend on cohort and data; called once, before a run starts.

        Modules made here are moved to the device and trained like those of the constructor.
        """

    @property
    def repeatable(self) -> bool:
        """Whether the loss is the same function of outputs and labels in every step.

        Such a loss reads neither step nor epoch of the batch, draws no samples and never waits for
        the device, so that it can be recorded as a CUDA graph.
        """
        return False

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        """The loss of one training step.

        Returns:
            "loss", the 0-dim total to differentiate, and its parts by name for logging.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """Logits [B, C] of all peers together: the mean of their logits unless overridden."""
        return mean_logits(outputs)

    def teacher_decay(self, step: int) -> float:
        """Share of the old values when the moving average is updated after a step."""
        raise NotImplementedError(f"{type(self).__name__} has a teacher but no teacher_decay")

    def holdout(self) -> float:
        """Share of each class's training images that is kept back for :meth:`before_epoch`."""
        return 0.0

    def before_epoch(self, logits: Tensor | None, labels: Tensor | None) -> None:
        """Called at the start of every epoch.

        Args:
            logits: logits [M, H, C] of the peers in evaluation mode for the images kept back; None
                if there are no such images.
            labels: classes [H] of the images kept back; None if there are no such images.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The method's own parameters for the ordinary optimiser, with settings of their own.

        Each group has the form that torch.optim takes: "params", and settings other than the run's
        but for the learning rate, which follows the run's schedule. Parameters that the bilevel
        step or an optimiser of the method trains are left out.
        """
        apart = {id(p) for p in self.meta_parameters()}
        apart |= {
            id(p)
            for o in self.own_optimizers().values()
            for g in o.param_groups
            for p in g["params"]
        }
        return [{"params": [p for p in self.parameters() if id(p) not in apart]}]

    def own_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimisers that the method itself steps in :meth:`after_step`; kept in checkpoints."""
        return {}

    def after_step(self, outputs: PeerOutputs, batch: Batch) -> None:
        """Called after the optimiser's step with the outputs of the loss, without gradient."""

    def check_device(self, device: torch.device) -> None:
        """Raises, before a run starts, if the method cannot work on a device."""

    def meta_parameters(self) -> list[nn.Parameter]:
        """Parameters that only the bilevel step trains; none unless overridden."""
        return []

    def inner_loss(self, outputs: PeerOutputs, batch: Batch) -> Tensor:
        """The objective of the SGD steps that the bilevel gradient is taken through."""
        raise NotImplementedError(f"{type(self).__name__} has meta parameters but no inner_loss")

    def outer_loss(self, outputs: PeerOutputs, batch: Batch) -> Tensor:
        """The objective that the meta parameters should lower."""
        raise NotImplementedError(f"{type(self).__name__} has meta parameters but no outer_loss")
