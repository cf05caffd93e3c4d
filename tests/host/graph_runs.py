"""Whole graphs in the host's own executor, with its caches, without a server in between."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from uuid import uuid4

from inside import gc, host_nodes, pack

import comfy.model_management as mm
import execution
import torch
import small_codecs  # noqa: F401 - writes its files
import small_models  # noqa: F401

CHOICES = {"quantisation": "keep", "attention": "auto", "memory": "auto"}
SIZE = {"width": 32, "height": 32, "frames": 5}


class Keep:
    """An output node that keeps the frames it gets, bit for bit."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "keep", True, "tests"
    kept: ClassVar[list[torch.Tensor]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802 - the host's name
        return {"required": {"images": ("IMAGE",)}}

    def keep(self, images: torch.Tensor) -> dict:
        self.kept.append(images)
        return {}


host_nodes.NODE_CLASS_MAPPINGS["Keep"] = Keep


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def text_to_video(
    text: str = "a red circle moving right",
    seed: int = 1,
    strength: float | None = None,
    size: dict | None = None,
    **loader: object,
) -> dict:
    graph = {
        "model": node("LightX2VLoadModel", file="t2v.safetensors", **{**CHOICES, **loader}),
        "clip": node("LightX2VLoadTextEncoder", file="small_umt5.safetensors"),
        "vae": node("LightX2VLoadVae", file="small_vae.safetensors"),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text=text),
        "latent": node("LightX2VEmptyVideoLatent", **(size or SIZE)),
        "sampler": node(
            "LightX2VDistillSampler",
            **{"model": ["model", 0], "positive": ["positive", 0], "latent": ["latent", 0]},
            **{"seed": seed, "schedule": "auto", "split": "auto", "solver": "euler", "cfg": 1.0},
        ),
        "decode": node("LightX2VDecodeVideo", latent=["sampler", 0], vae=["vae", 0]),
        "keep": node("Keep", images=["decode", 0]),
    }
    if strength is not None:
        graph["lora"] = node(
            "LoraLoaderModelOnly",
            **{"model": ["model", 0], "lora_name": "small.safetensors"},
            strength_model=strength,
        )
        graph["sampler"]["inputs"]["model"] = ["lora", 0]
    return graph


def image_to_video(**loader: object) -> dict:
    """Both experts, from a start picture."""
    graph = text_to_video()
    choices = {**CHOICES, **loader}
    graph["model"] = node("LightX2VLoadModel", file="high_noise_wan2.2.safetensors", **choices)
    graph["low"] = node("LightX2VLoadModel", file="low_noise_wan2.2.safetensors", **choices)
    graph["picture"] = node("EmptyImage", width=32, height=32, batch_size=1, color=0x2040C0)
    graph["latent"] = node(
        "LightX2VImageToVideo",
        **{"positive": ["positive", 0], "vae": ["vae", 0], "start_image": ["picture", 0]},
        **SIZE,
    )
    graph["sampler"]["inputs"] |= {
        **{"model_low_noise": ["low", 0], "positive": ["latent", 0]},
        **{"negative": ["latent", 1], "latent": ["latent", 2]},
    }
    return graph


class Queue:
    """What ComfyUI's worker does with one prompt after another; `cache` is one of its own kinds."""

    def __init__(self, cache: str = "CLASSIC") -> None:
        self.sent: list[tuple[str, dict]] = []
        server = SimpleNamespace(
            **{"client_id": "test", "last_node_id": None, "last_prompt_id": None},
            send_sync=lambda event, data, sid=None: self.sent.append((event, data)),
            send_progress_text=lambda text, node_id, sid=None: None,
        )
        kind = getattr(execution.CacheType, cache)
        self.executor = execution.PromptExecutor(
            server, cache_type=kind, cache_args={"lru": 0, "ram": 0.0}
        )

    def run(self, graph: dict) -> torch.Tensor:
        """The frames; AssertionError with the host's message where it reported an error."""
        Keep.kept.clear()
        self.sent.clear()
        with torch.inference_mode(False):
            self.executor.execute(graph, uuid4().hex, {"client_id": "test"}, ["keep"])
        errors = [d["exception_message"] for e, d in self.sent if e == "execution_error"]
        assert not errors, errors
        return Keep.kept.pop()

    def free(self) -> None:
        """What /free with both of its flags makes the worker do."""
        mm.unload_all_models()
        self.executor.reset()
        gc.collect()
        mm.soft_empty_cache()


def anonymous() -> int:
    """RssAnon of this process, after what glibc keeps has been given back; exact, which the count
    in /proc/self/status is not."""
    gc.collect()
    pack("lightx2v_core.memory.ram").trim()
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.partition("Anonymous:")[2].split()[0]) * 1024
