"""``python -m lightx2v_core``."""

from __future__ import annotations

import sys

from .memory.readahead import read_ahead_named

if __name__ == "__main__":
    read_ahead_named(sys.argv[1:])  # before PyTorch is imported, which takes seconds

    from .cli import main

    sys.exit(main())
