"""Grey images for networks of colour images."""

from __future__ import annotations

from dataclasses import replace

from mclfast.data.dataset import Dataset, ImageSet


def with_channels(data: Dataset, channels: int) -> Dataset:
    """The set with images of this many channels: grey ones are repeated, others stay.

    Args:
        data: the set.
        channels: those of the backbone's input.

    Raises:
        ValueError: images of several channels, but not of this many, or grey ones in files.
    """
    if data.in_channels == channels:
        return data
    if data.in_channels != 1 or not all(isinstance(s, ImageSet) for s in (data.train, data.test)):
        raise ValueError(
            f"data: expected in_channels={channels} as the backbone has, or grey images in memory, "
            f"got in_channels={data.in_channels} of {data.name!r}"
        )
    train, test = (
        ImageSet(s.images.repeat(1, channels, 1, 1), s.labels)
        for s in (data.train, data.test)
        if isinstance(s, ImageSet)
    )
    mean, std = data.mean * channels, data.std * channels
    return replace(data, train=train, test=test, mean=mean, std=std)
