"""Linears of a full-precision file into codes while it loads, as `quantize` would write them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import CheckpointError, RequestError
from ..quant.quantise import LOAD_CHOICES, ON_LOAD, WRITTEN
from ..quant.schemes import PLAIN
from .convert import is_quantised
from .detect import CheckpointInfo
from .source import Checkpoint
from .stored import Codes


def check_load_choice(choice: str, info: CheckpointInfo, source: str) -> None:
    """Raise unless the file can be loaded as `choice`."""
    if choice not in LOAD_CHOICES:
        raise RequestError(f"quantisation {choice!r} is unknown; use {', '.join(LOAD_CHOICES)}")
    if choice in ON_LOAD and info.scheme not in PLAIN:
        raise CheckpointError(
            f"{source} is quantised as {info.scheme} already and {choice} is made from "
            f"{', '.join(PLAIN)} alone; use keep, or the bf16 file of the same model"
        )


def read_quantised(
    checkpoint: Checkpoint, names: Mapping[str, str], choice: str
) -> tuple[dict[str, Tensor], dict[str, Codes]]:
    """Tensors by official name with the linears of the blocks as codes, and how they are stored.

    Memory-mapped weights are turned into codes one by one: what is held at a time is the codes made
    so far and the float32 copies of one tensor.
    """
    written, codes = WRITTEN[choice], {}
    tensors = checkpoint.tensors(names)
    for name in names:
        if not is_quantised(name, checkpoint.headers[names[name]]):
            continue
        module = name.removesuffix(".weight")
        tensors[name], scale = written.quantise(tensors[name])
        tensors[f"{module}.weight_scale"] = scale
        codes[module] = Codes(ON_LOAD[choice], (written.dtype, tuple(scale.shape)))
    return tensors, codes
