"""The only module that imports the package gguf, of llama.cpp: tables of IQ types, and writing.

Reading files and most block types does without it.
https://github.com/ggml-org/llama.cpp/tree/master/gguf-py
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import CapabilityError

if TYPE_CHECKING:
    from gguf import GGUFWriter as GGUFWriter  # for those who annotate what they were given


def gguf_package(needed_for: str) -> ModuleType:
    """The package, or CapabilityError that says what it is needed for and how to get it."""
    try:
        import gguf
    except ImportError as error:
        cause = " ".join(str(error).split())
        raise CapabilityError(
            f"{needed_for} needs the package gguf, which cannot be imported here ({cause}); "
            "install or repair it: pip install gguf"
        ) from error
    return gguf
