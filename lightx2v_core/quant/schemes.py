"""Which linear class holds the block weights of a file, by the scheme its header shows.

Adding a scheme is one class and one row here.
"""

from __future__ import annotations

from torch import nn

from ..errors import CapabilityError
from ..ops import Linear

LINEARS: dict[str, type[nn.Module]] = {"fp32": Linear, "fp16": Linear, "bf16": Linear}


def select_linear(scheme: str) -> type[nn.Module]:
    """The class for `scheme`. Raises CapabilityError for one this version does not load."""
    if scheme not in LINEARS:
        raise CapabilityError(
            f"weights quantised as {scheme} are not loaded by this version; "
            f"use a file in {', '.join(LINEARS)}"
        )
    return LINEARS[scheme]
