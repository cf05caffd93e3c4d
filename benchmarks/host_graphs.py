"""Image to video as API prompts for a running ComfyUI: our nodes, and ComfyUI's own alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightx2v_core.datatypes import VideoSize
from lightx2v_core.presets import PRESETS, Overrides, make_plan

Graph = dict[str, dict]

FPS = 16.0


@dataclass(frozen=True)
class Files:
    """Names in ComfyUI's model folders. Without `clip` the model takes no CLIP vision."""

    transformer: str
    text: str
    vae: str
    clip: str | None = None
    text_loader: str = "CLIPLoader"  # or ours, for encoders that ComfyUI's own does not know


@dataclass(frozen=True)
class Asked:
    """What one run makes."""

    size: VideoSize
    seed: int
    text: str
    picture: str = "start.png"
    lora: str | None = None
    memory: str = "auto"  # of our Load Model
    attention: str = "auto"

    def another(self, number: int) -> Asked:
        """The same with another seed and another prompt, so that only loaders stay cached."""
        return replace(self, seed=self.seed + number, text=f"{number} times {self.text}")


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def ours(files: Files, asked: Asked) -> Graph:
    """The nodes of workflows/i2v_wan2.1_14b_480p_4step.json, with the latent saved too."""
    size, choices = asked.size, {"memory": asked.memory, "attention": asked.attention}
    return _with_lora(asked.lora) | {
        "loaded": node("LightX2VLoadModel", file=files.transformer, quantisation="keep", **choices),
        "summary": node("PreviewAny", source=["loaded", 1]),
        "vae": node("LightX2VLoadVae", file=files.vae),
        **_prompt(files, asked),
        "image": node(
            "LightX2VImageToVideo",
            positive=["positive", 0],
            vae=["vae", 0],
            start_image=["picture", 0],
            width=size.width,
            height=size.height,
            frames=size.frames,
            image_fit="crop",
            **_clip_link(files),
        ),
        "sampler": node(
            "LightX2VDistillSampler",
            model=["model", 0] if asked.lora else ["loaded", 0],
            positive=["image", 0],
            negative=["image", 1],
            latent=["image", 2],
            seed=asked.seed,
            **{"schedule": "auto", "split": "auto", "solver": "auto", "cfg": 0.0},
        ),
        "plan": node("PreviewAny", source=["sampler", 1]),
        "decode": node("LightX2VDecodeVideo", latent=["sampler", 0], vae=["vae", 0]),
        **_saved("ours"),
    }


def native(files: Files, asked: Asked) -> Graph:
    """The same video by ComfyUI's own nodes: the trained sigmas, Euler, no CFG."""
    size, sigmas = asked.size, make_plan(PRESETS["distill-4step"], Overrides()).sigmas
    return _with_lora(asked.lora) | {
        "loaded": node("UNETLoader", unet_name=files.transformer, weight_dtype="default"),
        "vae": node("VAELoader", vae_name=files.vae),
        **_prompt(files, asked),
        "image": node(
            "WanImageToVideo",
            positive=["positive", 0],
            negative=["positive", 0],
            vae=["vae", 0],
            start_image=["picture", 0],
            width=size.width,
            height=size.height,
            length=size.frames,
            batch_size=1,
            **_clip_link(files),
        ),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("ManualSigmas", sigmas=", ".join(f"{sigma:.8f}" for sigma in sigmas)),
        "sampler": node(
            "SamplerCustom",
            model=["model", 0] if asked.lora else ["loaded", 0],
            add_noise=True,
            noise_seed=asked.seed,
            cfg=1.0,
            positive=["image", 0],
            negative=["image", 1],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["image", 2],
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        **_saved("native"),
    }


def _prompt(files: Files, asked: Asked) -> Graph:
    """Encoders of prompt and picture: ComfyUI's own, as in the workflow that is shipped."""
    graph = {
        "clip": node("CLIPLoader", clip_name=files.text, type="wan", device="default")
        if files.text_loader == "CLIPLoader"
        else node(files.text_loader, file=files.text),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text=asked.text),
        "picture": node("LoadImage", image=asked.picture),
    }
    if files.clip is not None:
        graph["vision"] = node("CLIPVisionLoader", clip_name=files.clip)
        graph["seen"] = node(
            "CLIPVisionEncode", clip_vision=["vision", 0], image=["picture", 0], crop="center"
        )
    return graph


def _clip_link(files: Files) -> dict[str, list]:
    return {} if files.clip is None else {"clip_vision_output": ["seen", 0]}


def _with_lora(file: str | None) -> Graph:
    if file is None:
        return {}
    loader = node("LoraLoaderModelOnly", model=["loaded", 0], lora_name=file, strength_model=1.0)
    return {"model": loader}


def _saved(prefix: str) -> Graph:
    return {
        "video": node("CreateVideo", images=["decode", 0], fps=FPS),
        "saved": node(
            "SaveVideo", video=["video", 0], filename_prefix=prefix, format="auto", codec="auto"
        ),
        "latent": node("SaveLatent", samples=["sampler", 0], filename_prefix=prefix),
    }
