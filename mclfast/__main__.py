"""``python -m mclfast`` is the console script ``mclfast``."""

import sys

from mclfast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
