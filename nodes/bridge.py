"""The core's transformer as a ComfyUI MODEL: call, conditioning, memory, hooks of other packs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import folder_paths
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ..lightx2v_core import ops as core_ops
from ..lightx2v_core.assemble import LoadedTransformer, load_transformer
from ..lightx2v_core.checkpoint.detect import detect
from ..lightx2v_core.checkpoint.source import open_checkpoint
from ..lightx2v_core.errors import CapabilityError
from ..lightx2v_core.memory.plan import activation_bytes
from ..lightx2v_core.quant.linear import holds_codes
from ..lightx2v_core.quant.quantise import KEEP, ON_LOAD
from ..lightx2v_core.quant.schemes import PLAIN
from ..lightx2v_core.wan.config import PATCH, TEXT_LEN
from ..lightx2v_core.wan.model import BlockInputs, WanBlock, WanModel
from .attention import AUTO, OVERRIDE, describe_attention, is_hosts, wanted_of_ours
from .checks import check_start_image, check_text_width
from .patcher import ResidentPatcher
from .strengths import STEP_OPTION, follow_step

log = logging.getLogger(__name__)

# What ComfyUI itself puts into transformer_options, and what is honoured here.
KNOWN_OPTIONS = {
    *("block_index", "block_type", "total_blocks", "grid_sizes", "img_slice", "context_window"),
    *("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "hooks", "model_options"),
    *("wrappers", "callbacks", "patches", "patches_replace", OVERRIDE),
    # State of the host's EasyCache and LazyCache, whose wrappers run here as on its own Wan.
    "easycache",
    STEP_OPTION,
}
# Methods of our patcher that some of the supported hosts never call.
NOT_EVERYWHERE = {"get_ram_usage", "state_dict_for_saving", "partially_unload_ram"}
MEMORY_CHOICES = ("auto", "ours", "comfyui")


class LoadRequest(NamedTuple):
    """What a MODEL was loaded by, so that it can be loaded again in another form.

    `attention` is one of attention.CHOICES.
    """

    path: Path
    attention: str = AUTO
    memory: str = "auto"
    quantisation: str = KEEP
    matmul: str = "auto"


class HostTransformer(WanModel):
    """WanModel, called as ComfyUI calls its own Wan.

    Never built: a loaded WanModel takes this class, so that module tree and keys stay official.
    """

    dtype = torch.float32  # what the host hands over; blocks compute in `compute_dtype`
    attention = AUTO  # the loader's choice

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict | None = None,
        **kwargs: object,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        run = WrapperExecutor.new_class_executor(self._run, self, wrappers)
        return run.execute(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def _run(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None,
        time_dim_concat: Tensor | None,
        options: dict,
        **_unused: object,
    ) -> Tensor:
        T, H, W = x.shape[2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, PATCH)
        if time_dim_concat is not None:
            more = comfy.ldm.common_dit.pad_to_patch_size(time_dim_concat, PATCH)
            x = torch.cat((x, more.to(x)), dim=2)
        self._name_unknown(options)
        follow_step(self, options)
        velocity = super().forward(
            x,
            timestep.flatten(),
            self._fit_text(context),
            self._fit_clip(clip_fea),
            run_block=self._block_runner(options, x),
            attend=self._attend(options),
        )
        return velocity[:, :, :T, :H, :W]

    def _block_runner(self, options: dict, x: Tensor) -> Callable:
        """Runs a block through the engine, after the interrupt check and any replacement of it."""
        replacements = options.get("patches_replace", {}).get("dit", {})
        options["total_blocks"], options["block_type"] = len(self.blocks), "double"
        options["grid_sizes"] = tuple(side // p for side, p in zip(x.shape[2:], PATCH, strict=True))

        def run(index: int, block: WanBlock, x: Tensor, inputs: BlockInputs) -> Tensor:
            mm.throw_exception_if_processing_interrupted()
            options["block_index"] = index
            replacement = replacements.get(("double_block", index))
            if replacement is None:
                return self.run_block(index, block, x, inputs)

            def original(args: dict) -> dict:
                changed = inputs.replace(
                    text_BSE=args["txt"], modulation_B6E=args["vec"], rotary=args["pe"]
                )
                return {"img": self.run_block(index, block, args["img"], changed)}

            args = {
                "img": x,
                "txt": inputs.text_BSE,
                "vec": inputs.modulation_B6E,
                "pe": inputs.rotary,
                "transformer_options": options,
            }
            return replacement(args, {"original_block": original})["img"]

        return run

    def runs_host_attention(self, options: dict) -> bool:
        """Always where a pack overrides it, which goes by way of the host's."""
        return OVERRIDE in options or is_hosts(self.attention, self.attend)

    def _attend(self, options: dict) -> Callable | None:
        """The host's attention where that is to run, else None: what the model holds."""
        if not self.runs_host_attention(options):
            return None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = q.shape[1]
            q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))  # BNLD -> BLE
            attention = comfy.ldm.modules.attention.optimized_attention
            y = attention(q, k, v, heads=heads, transformer_options=options)
            return y.unflatten(2, (heads, -1)).transpose(1, 2)  # BLE -> BNLD

        return attend

    def _fit_text(self, context: Tensor) -> Tensor:
        """Padded with zeros or cut to the 512 positions the model was trained with."""
        length = context.shape[1]
        if length > TEXT_LEN:
            self._say(f"the prompt has {length} text tokens, Wan takes {TEXT_LEN}: the rest is cut")
        return F.pad(context[:, :TEXT_LEN], (0, 0, 0, max(TEXT_LEN - length, 0)))

    def _fit_clip(self, clip_fea: Tensor | None) -> Tensor | None:
        if clip_fea is not None and not self.config.clip_tokens:
            self._say("CLIP vision is connected and ignored: this model has no CLIP branch")
            return None
        if clip_fea is None and self.config.clip_tokens:
            self._say("this Wan 2.1 image-to-video model runs without its CLIP vision input")
        return clip_fea

    def _name_unknown(self, options: dict) -> None:
        names = options.keys() - KNOWN_OPTIONS
        names |= {f"patches[{name!r}]" for name in options.get("patches", {})}
        for group, replaced in options.get("patches_replace", {}).items():
            if group != "dit":
                names.add(f"patches_replace[{group!r}]")
                continue
            # A node for every DiT also asks for single blocks, which no Wan has: where its double
            # blocks are here it has its effect.
            if not any(self._has_block(key) for key in replaced):
                names |= {f"{' '.join(map(str, key))} of {len(self.blocks)}" for key in replaced}
        for name in sorted(names):
            self._say(f"another pack set {name}, which LightX2V's transformer does not honour")

        for name, module in self.named_modules():
            if "forward" in vars(module):
                self._say(
                    f"another pack replaced the forward of {name or 'the transformer'}: made for "
                    "ComfyUI's own Wan it may fail here; then load the model with UNETLoader"
                )
                break

    def _has_block(self, key: tuple) -> bool:
        return key[0] == "double_block" and key[1] < len(self.blocks)

    def _say(self, sentence: str) -> None:
        """Once for each model and sentence."""
        said = self.__dict__.setdefault("said", set())
        if sentence not in said:
            said.add(sentence)
            log.warning("%s", sentence)


class HostWan(comfy.model_base.WAN21):
    """What MODEL holds. Image conditioning (concat_latent_image, concat_mask) is the host's own."""

    def __init__(self, loaded: LoadedTransformer, request: LoadRequest) -> None:
        config = loaded.info.config
        unet_config = {
            "image_model": "wan2.1",
            "model_type": "i2v" if config.clip_tokens else "t2v",
            "in_dim": config.in_dim,
            "dim": config.dim,
            "disable_unet_model_creation": True,
        }
        host_config = comfy.supported_models.WAN21_T2V(unet_config)
        host_config.set_inference_dtype(HostTransformer.dtype, None)
        super().__init__(host_config, image_to_video=config.takes_image)
        loaded.model.__class__ = HostTransformer
        self.diffusion_model = loaded.model
        self.info = loaded.info
        self.request = request
        self.engine = loaded.residency

    def extra_conds(self, **kwargs: object) -> dict:
        config = self.diffusion_model.config
        if (text := kwargs.get("cross_attn")) is not None:
            check_text_width(text.shape[-1], config.text_dim)
        check_start_image(config.in_dim, config.out_dim, kwargs.get("concat_latent_image"))
        return super().extra_conds(**kwargs)

    def apply_model(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The host's; before it the MODEL that samples is loaded again, where another model took
        all memory since the last step. ComfyUI itself would go on without its LoRA."""
        patcher = self.current_patcher
        is_loaded = any(entry.model is patcher for entry in mm.current_loaded_models)
        if patcher is not None and not is_loaded:
            log.info("another model took the memory; the transformer is loaded again")
            mm.load_models_gpu([patcher], self.memory_required(list(x.shape)))
        return super().apply_model(x, *args, **kwargs)

    def memory_required(self, input_shape: list[int], cond_shapes: dict | None = None) -> int:
        """Activation bytes of one forward for an input B C T H W."""
        batch, _, frames, height, width = input_shape
        tokens = frames * -(-height // PATCH[1]) * -(-width // PATCH[2])
        size = self.diffusion_model.compute_dtype.itemsize
        quantised = holds_codes(self.diffusion_model)
        return activation_bytes(self.diffusion_model.config, tokens, size, batch, quantised)


def load_model(
    request: LoadRequest, disable_dynamic: bool = False
) -> tuple[comfy.model_patcher.ModelPatcher, str]:
    """A MODEL and what is to be said about it."""
    device = mm.get_torch_device()
    checkpoint = open_checkpoint(request.path)
    scheme = ON_LOAD.get(request.quantisation, detect(checkpoint).scheme)
    memory, why = _select_memory(request.memory, scheme)
    loaded = load_transformer(
        checkpoint,
        dtype=_compute_dtype(device),
        attention=wanted_of_ours(request.attention),
        device=device,
        ops=comfy.ops.manual_cast if memory == "comfyui" else core_ops,
        quantisation=request.quantisation,
        matmul=request.matmul,
        cache=Path(folder_paths.get_user_directory()),
    )
    model = HostWan(loaded, request)
    model.diffusion_model.attention = request.attention
    patcher_class = _stock_patcher(disable_dynamic) if memory == "comfyui" else ResidentPatcher
    patcher = patcher_class(model, load_device=device, offload_device=mm.unet_offload_device())
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (_reload, (request,))
    attention = describe_attention(request.attention, loaded.model.attend)
    return patcher, f"{loaded.summary}\nmemory: {memory}{why}; attention: {attention}"


def _reload(
    request: LoadRequest, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    return load_model(request, disable_dynamic)[0]


def _stock_patcher(disable_dynamic: bool) -> type[comfy.model_patcher.ModelPatcher]:
    stock = comfy.model_patcher.ModelPatcher
    return stock if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", stock)


def _select_memory(choice: str, scheme: str) -> tuple[str, str]:
    mismatch = host_mismatch()
    if scheme not in PLAIN:
        if choice == "comfyui" or mismatch:
            asked = "memory 'comfyui' was asked for"
            why = f"memory 'ours' does not fit this ComfyUI: {mismatch}" if mismatch else asked
            raise CapabilityError(
                f"{why}; a model quantised as {scheme} runs through memory 'ours' alone: "
                "use that, or a bf16, fp16 or fp32 file"
            )
        return "ours", ""
    if choice == "auto":
        return ("comfyui", f" ({mismatch})") if mismatch else ("ours", "")
    if choice == "ours" and mismatch:
        raise CapabilityError(f"memory 'ours' does not fit this ComfyUI: {mismatch}; use 'comfyui'")
    return choice, ""


def host_mismatch() -> str | None:
    """Why ResidentPatcher does not fit the running ComfyUI, or None: every method it overrides must
    exist there and take no argument that ours does not."""
    for name, ours in vars(ResidentPatcher).items():
        if name.startswith("_") or not inspect.isfunction(ours) or name in NOT_EVERYWHERE:
            continue
        theirs = getattr(comfy.model_patcher.ModelPatcher, name, None)
        if theirs is None:
            return f"its ModelPatcher has no {name}"
        taken = inspect.signature(ours).parameters
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            continue
        if unknown := inspect.signature(theirs).parameters.keys() - taken.keys():
            return f"its ModelPatcher.{name} takes {', '.join(sorted(unknown))}"
    return None


def _compute_dtype(device: torch.device) -> torch.dtype:
    """What the host would compute a bfloat16 Wan in on this device."""
    return mm.unet_manual_cast(torch.bfloat16, device) or torch.bfloat16
