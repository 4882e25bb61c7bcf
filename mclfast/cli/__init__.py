"""The command line: ``mclfast train``, ``plan``, ``compare``, ``eval`` and others, a file each."""

from mclfast.cli.main import main

__all__ = ["main"]
