"""Whose attention a MODEL runs: ComfyUI's, or a row of ours."""

from __future__ import annotations

import comfy.ldm.modules.attention as host
from comfy.cli_args import args

from ..lightx2v_core.ops.attention import BACKENDS, Attend, name_of, sdpa

AUTO, HOST = "auto", "comfyui"
CHOICES = (AUTO, *BACKENDS, HOST)
OVERRIDE = "optimized_attention_override"
# What ComfyUI is told by, when it is started; those that it does not have are not set.
FLAGS = (
    *("use_sage_attention", "use_flash_attention", "use_pytorch_cross_attention"),
    *("use_split_cross_attention", "use_quad_cross_attention"),
)


def wish_of_host() -> str | None:
    """Why ComfyUI's attention is to be followed; None where it runs PyTorch's unasked."""
    for flag in FLAGS:
        if getattr(args, flag, False):
            return f"it was started with --{flag.replace('_', '-')}"
    if host.optimized_attention is not host.attention_pytorch:
        return "which is not PyTorch's"
    return None


def wanted_of_ours(choice: str) -> str:
    """The row to load for `choice`; PyTorch's where the host's attention runs in its place."""
    return "sdpa" if choice == HOST or (choice == AUTO and wish_of_host()) else choice


def is_hosts(choice: str, attend: Attend) -> bool:
    """Whether the host's attention runs, and not `attend`, which is what was loaded for `choice`.

    Asked for each forward: other packs put their attention into the host's place for a run.
    """
    if choice != AUTO:
        return choice == HOST
    return attend is sdpa or wish_of_host() is not None


def describe_attention(choice: str, attend: Attend) -> str:
    """For the summary: whose runs, and why."""
    if not is_hosts(choice, attend):
        why = "faster than ComfyUI's default here, " if choice == AUTO else ""
        kind = "exact" if choice == AUTO and BACKENDS[name_of(attend)].is_exact else "8-bit codes"
        return name_of(attend) + (f" ({why}{kind})" if why else "")
    name = host.optimized_attention.__name__.removeprefix("attention_")
    why = "as chosen" if choice == HOST else wish_of_host() or "none of ours is faster here"
    return f"ComfyUI's {name} ({why})"
