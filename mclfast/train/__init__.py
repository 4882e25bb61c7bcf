"""The training loop and the run on disk."""

from mclfast.train.builder import assemble, build, train
from mclfast.train.history import RunResult
from mclfast.train.trainer import Trainer

__all__ = ["RunResult", "Trainer", "assemble", "build", "train"]
