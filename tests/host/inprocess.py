"""All checks that run inside a ComfyUI's Python, in one process: to start one takes ten seconds.

Memory first, since its checks count bytes of a process; settings last, whose messages need files
under names of others.
"""

# ruff: noqa: I001, F401 - in this order; each registers its checks.

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from inside import main

import inprocess_memory
import inprocess_codecs
import inprocess_model
import inprocess_settings

if __name__ == "__main__":
    main()
