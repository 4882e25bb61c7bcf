"""How an adapted network's last map becomes a feature, whatever form its stages give."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

Pool = Literal["mean", "first"]
Layout = Literal["channels_first", "channels_last"]


def shape_of(value: Any) -> str:
    """A value for an error message: the shape of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


class Pooling(NamedTuple):
    """From the last map of a network to its feature [B, D].

    Attributes:
        width: number of channels D, which tells the axis of the channels where ``layout`` is None.
        pool: "mean" over all places; "first" for the first of the tokens [B, N, D], the class
            token.
        layout: axis of the channels, behind the batch or at the end. None for the axis of D
            elements. If both have as many, tokens have them at the end and maps behind the batch.
    """

    width: int
    pool: Pool = "mean"
    layout: Layout | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Feature [B, D] of a map [B, D, h, w] or [B, h, w, D], tokens [B, N, D] or rows [B, D]."""
        axis = self._axis(x)
        if self.pool == "first":
            return x.select(3 - axis, 0)
        # Rows have no places to average over.
        places = [i for i in range(1, x.dim()) if i != axis]
        return x.mean(dim=places) if places else x

    def as_map(self, x: Tensor) -> Tensor:
        """The map [B, D, h, w] of what :meth:`__call__` takes.

        The grid that tokens come from is not known, so that N of them are a map of N by 1, without
        the class token if that is what is pooled. Rows are a map of one place.
        """
        axis = self._axis(x)
        if x.dim() == 4:
            return x if axis == 1 else x.movedim(axis, 1)
        x = x.movedim(axis, 1)
        if self.pool == "first":
            x = x[:, :, 1:]
        return x.reshape(*x.shape, *[1] * (4 - x.dim()))

    def _axis(self, x: Any) -> int:
        last = x.dim() - 1 if isinstance(x, Tensor) else 0
        if not 1 <= last <= 3:
            raise ValueError(self._refusal(x))
        if self.pool == "first" and last != 2:
            raise ValueError(
                f"pool: expected tokens [B, N, {self.width}] to take the first of, got "
                f"{shape_of(x)}; use pool='mean'"
            )
        if self.layout is not None:
            axis = 1 if self.layout == "channels_first" else last
            candidates = [axis]
        else:
            # Maps of convolutions are the common kind of four axes, tokens of three.
            candidates = [1, last] if last == 3 else [last, 1]
        for axis in candidates:
            if x.shape[axis] == self.width:
                return axis
        raise ValueError(self._refusal(x))

    def _refusal(self, x: Any) -> str:
        return (
            f"tail: expected a map of {self.width} channels, classifier.in_features, before "
            f"pooling, got {shape_of(x)}"
        )
