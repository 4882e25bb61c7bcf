"""The command line: ``mclfast train | plan | compare | eval | ...``, one file a command."""

from mclfast.cli.main import main

__all__ = ["main"]
