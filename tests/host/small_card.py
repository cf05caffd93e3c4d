"""A card with little memory, and functions that run out of it, faked for ComfyUI."""

from __future__ import annotations

import comfy.model_management as mm


class SmallCard:
    """Makes the host believe that its device is a card with little memory."""

    def __init__(
        self, free_for_weights: float, state: mm.VRAMState = mm.VRAMState.NORMAL_VRAM
    ) -> None:
        self.free, self.state = free_for_weights, state
        self.names = ("is_device_cpu", "get_free_memory", "minimum_inference_memory", "vram_state")
        self.before = {name: getattr(mm, name) for name in self.names}

    def __enter__(self) -> SmallCard:
        mm.unload_all_models()
        total = 1.3e9
        mm.is_device_cpu = lambda device: False
        mm.vram_state = self.state
        mm.minimum_inference_memory = lambda: total - self.free
        mm.get_free_memory = lambda dev=None, torch_free_too=False: (
            (total, 0) if torch_free_too else int(total)
        )
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            setattr(mm, name, value)
        mm.unload_all_models()


def failing(function: object, first: int, times: int) -> object:
    """`function`, which runs out of memory from call number `first` on, `times` times."""
    calls = []

    def fail(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if first <= len(calls) < first + times:
            raise mm.OOM_EXCEPTION("tried to allocate 2 GiB")
        return function(*args, **kwargs)

    return fail
