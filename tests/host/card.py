"""What ComfyUI's main.py does for a card around the import of PyTorch: allocator, Dynamic VRAM.

Importing main.py itself would start a server's database, prestartup scripts and logging.
"""

from __future__ import annotations

from importlib.util import find_spec


def before_torch() -> None:
    import cuda_malloc  # noqa: F401 - chooses PyTorch's allocator by an environment variable

    if _wants_dynamic():
        import comfy_aimdo.control

        comfy_aimdo.control.init()


def after_torch(device: object) -> bool:
    """Convolutions in float32 proper (PyTorch's default there is TF32), then Dynamic VRAM; whether
    that is on."""
    import comfy.model_patcher
    import torch

    torch.backends.cudnn.allow_tf32 = False
    if not _wants_dynamic():
        return False
    import comfy.memory_management
    import comfy_aimdo.control

    assert comfy_aimdo.control.init_device(device.index), "comfy-aimdo does not run on this card"
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True


def _wants_dynamic() -> bool:
    import comfy.cli_args

    decide = getattr(comfy.cli_args, "enables_dynamic_vram", None)
    return decide is not None and decide() and find_spec("comfy_aimdo") is not None
