"""Archives: no flipped bit gets through, and no archive is larger than its file."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mclfast._base.archives import damage_of, seal
from mclfast.train import checkpoint

STATE = {"step": 3, "weights": torch.arange(6.0).view(2, 3), "history": [{"loss": 0.5}]}


def write(path: Path, *, sealed: bool) -> bytes:
    if sealed:
        checkpoint.save(path, STATE)
    else:
        torch.save({"format": checkpoint.FORMAT, **STATE}, path)
    assert damage_of(path) is None
    return path.read_bytes()


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def same(found: dict[str, Any]) -> bool:
    weights = found.pop("weights")
    return (
        weights.dtype == torch.float32
        and torch.equal(weights, STATE["weights"])
        and found == {"format": 1, "step": 3, "history": [{"loss": 0.5}]}
    )


def test_every_flipped_bit_of_a_sealed_archive_is_found(tmp_path):
    content = write(tmp_path / "c.pt", sealed=True)
    for bit in range(8 * len(content)):
        (tmp_path / "c.pt").write_bytes(flipped(content, bit))
        assert damage_of(tmp_path / "c.pt") is not None, bit


def test_a_flipped_bit_of_an_older_checkpoint_is_found_or_changes_nothing(tmp_path):
    content = write(tmp_path / "c.pt", sealed=False)
    directory = zipfile.ZipFile(tmp_path / "c.pt").start_dir
    bits = random.Random(1).sample(range(8 * len(content)), 400)
    # All bits of the directory's entries: they have no checksum.
    for bit in [*bits, *range(8 * directory, 8 * len(content))]:
        (tmp_path / "c.pt").write_bytes(flipped(content, bit))
        try:
            found = checkpoint.load(tmp_path / "c.pt")
        except checkpoint.DamagedError:
            continue
        assert same(found), bit


def test_the_readers_accept_a_sealed_archive(tmp_path):
    write(tmp_path / "c.pt", sealed=True)
    assert zipfile.ZipFile(tmp_path / "c.pt").testzip() is None
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 3
    np.savez(tmp_path / "n.npz", a=np.arange(3))
    seal(tmp_path / "n.npz")
    assert damage_of(tmp_path / "n.npz") is None
    assert np.load(tmp_path / "n.npz")["a"].tolist() == [0, 1, 2]


def bomb() -> bytes:
    """A member of zeros, compressed a thousandfold."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    return file.getvalue()


def overlapping() -> bytes:
    """Twenty members of the directory that are all the same bytes of the file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", bytes(10_000))
        archive.filelist *= 20
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"PK", "no end of an archive"),
        (bomb(), "a compressed member 'archive/data.pkl'"),
        (overlapping(), "members larger than the file"),
    ],
)
def test_refused(tmp_path, content, message):
    (tmp_path / "c.pt").write_bytes(content)
    assert damage_of(tmp_path / "c.pt") == message
    with pytest.raises(checkpoint.DamagedError, match=f"got: {message}$"):
        checkpoint.load(tmp_path / "c.pt")
