"""One retry of a broken step with the host's PyTorch attention and with dequantised matmuls."""

from __future__ import annotations

import comfy.ldm.modules.attention as host_attention
import comfy.model_patcher

from ..lightx2v_core.plainly import describe_rows, use_plain_rows
from ..lightx2v_core.sampling.loop import Rescue
from ..lightx2v_core.wan.model import WanModel
from .attention import OVERRIDE


class Plainly:
    """For one stage of a run with a MODEL of any loader. Attention stays plain for the rest of the
    stage, matmuls until the model is loaded again."""

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher) -> None:
        self._patcher, self._is_on = patcher, False

    def tell(self, args: dict) -> dict:
        """The arguments of the model, with plain attention once it was needed."""
        if not self._is_on:
            return args
        options = args["model_options"]
        inside = {**options.get("transformer_options", {}), OVERRIDE: _by_pytorch}
        return {**args, "model_options": {**options, "transformer_options": inside}}

    def rescue(self) -> Rescue:
        return Rescue(self._backend(), self._switch)

    def _backend(self) -> str:
        model = self._patcher.model.diffusion_model
        options = self._patcher.model_options.get("transformer_options", {})
        rows = describe_rows(model) if isinstance(model, WanModel) else ""
        if rows and not model.runs_host_attention(options):
            return rows
        name = host_attention.optimized_attention.__name__.removeprefix("attention_")
        told = f"attention {name} of ComfyUI"
        if OVERRIDE in options:
            told = f"an attention override of another pack over {told}"
        return ", ".join([told, *rows.split(", ")[1:]])

    def _switch(self) -> bool:
        changed, self._is_on = not self._is_on, True
        model = self._patcher.model.diffusion_model
        return (use_plain_rows(model) if isinstance(model, WanModel) else False) or changed


def _by_pytorch(_attend: object, *args: object, **kwargs: object) -> object:
    return host_attention.attention_pytorch(*args, **kwargs)
