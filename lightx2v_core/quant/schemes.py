"""Which linear class holds the block weights of a file, by the scheme its header shows.

Adding a scheme is one class and one row here.
"""

from __future__ import annotations

from torch import nn

from ..errors import CapabilityError
from ..ops import Linear
from .blocks import Mxfp8Linear, Nvfp4Linear
from .ggml import BLOCK_TYPES, GgmlLinear
from .linear import QuantisedLinear

PLAIN = ("fp32", "fp16", "bf16")
LINEARS: dict[str, type[nn.Module]] = {
    **dict.fromkeys(PLAIN, Linear),
    "fp8-row": QuantisedLinear,  # LightX2V: e4m3 codes, a scale for each output row
    "fp8-tensor": QuantisedLinear,  # ComfyUI and Kijai: one scale for each tensor
    "fp8-cast": QuantisedLinear,  # e4m3 without scales
    "fp8-e5m2": QuantisedLinear,
    "int8-row": QuantisedLinear,
    "int8-tensor": QuantisedLinear,
    "nvfp4": Nvfp4Linear,  # LightX2V's and ComfyUI's, e2m1 codes in blocks of 16
    "mxfp8": Mxfp8Linear,  # ComfyUI: e4m3 codes in blocks of 32
}
LOADED = f"{', '.join(LINEARS)} or GGUF"  # for messages
# GGUF: by the type that most of the weights have; a file may mix them, plain ones included.
LINEARS |= {f"gguf-{name}": GgmlLinear for name in ("F32", "F16", "BF16", *BLOCK_TYPES)}


def select_linear(scheme: str) -> type[nn.Module]:
    """The class for `scheme`. Raises CapabilityError for one this version does not load."""
    if scheme not in LINEARS:
        raise CapabilityError(
            f"weights quantised as {scheme} are not loaded by this version; use a file in {LOADED}"
        )
    return LINEARS[scheme]
