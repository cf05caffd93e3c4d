"""The layers the transformer is built from when nobody hands it another namespace.

Every layer computes in the dtype of its input and casts its own weights at use, so that one module
tree serves float32 parts (time embedding, head) and half-precision parts alike, and ComfyUI's
``comfy.ops`` classes can stand in for these.
"""

from __future__ import annotations

from .layers import Conv3d, LayerNorm, Linear, RMSNorm

__all__ = ["Conv3d", "LayerNorm", "Linear", "RMSNorm"]
