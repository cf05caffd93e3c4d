"""Files into running models, in one fixed order: detect, build empty, fill, place, kernels."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import ops as default_ops
from .checkpoint.detect import CheckpointInfo, detect
from .checkpoint.layouts import official_names, official_vae_names, plain_vae_names
from .checkpoint.load import assign
from .checkpoint.quantise_load import check_load_choice, read_quantised
from .checkpoint.quantised import check_scale_values, read_codes
from .checkpoint.source import DTYPE_NAMES, Checkpoint, open_checkpoint
from .checkpoint.stored import Codes
from .errors import CapabilityError, CheckpointError, RequestError
from .memory.plan import check_ram, is_ram_short
from .memory.residency import Residency
from .ops.attention import select_attention
from .ops.fused import describe_kernels
from .presets import DEMO_FILES, demo_path
from .quant.linear import holds_codes
from .quant.multiply import set_matmul
from .quant.quantise import KEEP
from .quant.schemes import select_linear
from .text.gguf_vocabulary import spiece_model
from .text.tokenizer import SPIECE_MODEL, read_tokenizer
from .text.umt5 import TextEncoder, build_text_encoder, check_text_encoder
from .vision.clip import ClipVision, build_clip_vision
from .wan.config import WanConfig
from .wan.model import Ops, WanModel
from .wan.tae import TinyConfig, TinyVae, Vae, is_tiny
from .wan.vae import VaeConfig, WanVae

log = logging.getLogger(__name__)

# Where parts of a model lie below its folder, and what they are called; the first found wins.
PART_FOLDERS = (".", "distill_models", "original", "split_files/vae", "split_files/text_encoders")
PART_NAMES = {
    "vae": ("Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth", "wan_2.1_vae.safetensors"),
    "text": (
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "umt5_xxl_fp16.safetensors",
        "umt5-xxl-enc-bf16.safetensors",
    ),
    "clip": (
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "clip_vision_h.safetensors",
    ),
}
FULL_PRECISION = {"F64", "F32", "F16", "BF16"}
WHAT = "Wan transformer"
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
PART_OPTIONS = {"vae": "--vae", "text": "--text-encoder", "clip": "--clip-vision"}


@dataclass(frozen=True, slots=True)
class Parts:
    """The files one generation needs. `low` is the second expert, `clip` only Wan 2.1 I2V's;
    `tae` decodes in place of `vae`, which then only encodes."""

    transformer: Path
    vae: Path
    text: Path
    low: Path | None = None
    clip: Path | None = None
    tokenizer: Path | None = None
    tae: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTransformer:
    """A transformer with what is known of its file, and the engine that places its weights."""

    model: WanModel
    info: CheckpointInfo
    residency: Residency
    summary: str


def load_transformer(
    path: str | Path | Checkpoint,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    device: torch.device | str = "cpu",
    ops: Ops = default_ops,
    quantisation: str = KEEP,
    matmul: str = "auto",
    cache: Path | None = None,
) -> LoadedTransformer:
    """Build the transformer in `path`: a file, a folder, or a checkpoint that is open already.

    Weights stay memory-mapped where `dtype` is the file's. `dtype` is what blocks compute in.
    `device` only chooses attention and matmul: `residency.place` moves weights. `ops` is a
    namespace of layers, for hosts that bring their own. `quantisation` keeps the number format of
    the file, or turns its linears into fp8 or int8 codes. `matmul` names a row of ops/matmul.py,
    or is "measured", whose times are kept in the folder `cache`; without one, as the command line
    runs it, they are taken anew for each model.
    Raises CheckpointError for a file that is no Wan transformer this version runs.
    """
    started = time.perf_counter()
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    info = detect(checkpoint)
    if info.refusal or info.config is None:
        raise CheckpointError(info.refusal or f"{checkpoint.name} is not a Wan transformer")
    check_load_choice(quantisation, info, checkpoint.name)
    check_ram(cast_bytes(checkpoint, dtype, quantisation), checkpoint.name)
    model = _fill_transformer(checkpoint, info.config, dtype, ops, quantisation)
    model.compute_dtype = dtype
    path, config = checkpoint.path, info.config

    def reread() -> dict[str, torch.Tensor]:
        again = open_checkpoint(path)
        return _fill_transformer(again, config, dtype, ops, quantisation).state_dict()

    residency = Residency(model, weight_files(checkpoint), reread)
    model.run_block = residency.run_block
    exact = dtype == torch.float32 or not holds_codes(model)
    model.attend = select_attention(attention, device, exact)
    multiplied = set_matmul(model, matmul, device, dtype, cache)
    summary = (
        f"{checkpoint.name}: {info.describe()}, {info.bytes / 1e9:.2f} GB, {info.tensors} tensors, "
        f"computing in {str(dtype).removeprefix('torch.')}"
    )
    if quantisation != KEEP:
        summary += f"; quantised to {quantisation}: {residency.total_bytes / 1e9:.2f} GB"
    if multiplied:
        summary += f"; matmul: {multiplied}"
    if torch.device(device).type == "cuda":
        summary += f"; kernels: {describe_kernels(device)}"
    log.info("%s, %.1f s", summary, time.perf_counter() - started)
    return LoadedTransformer(model, info, residency, summary)


def load_experts(
    parts: Parts,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    quantisation: str = KEEP,
    matmul: str = "auto",
) -> list[LoadedTransformer]:
    """The transformer, or both; the first one leaves RAM again where both do not fit."""
    experts: list[LoadedTransformer] = []
    for path in (parts.transformer, parts.low):
        if path is None:
            continue
        checkpoint = open_checkpoint(path)
        needed = cast_bytes(checkpoint, dtype, quantisation)
        for expert in experts if is_ram_short(needed) else ():
            expert.residency.forget()
        load = partial(load_transformer, quantisation=quantisation, matmul=matmul)
        experts.append(load(checkpoint, dtype, attention, device))
    return experts


def _fill_transformer(
    checkpoint: Checkpoint, config: WanConfig, dtype: torch.dtype, ops: Ops, quantisation: str
) -> WanModel:
    with torch.device("meta"):
        model = WanModel(config, ops)
    tensors, codes = _read(checkpoint, quantisation)
    swap_linears(model, codes, checkpoint.name)
    assign(model, tensors, checkpoint.name, WHAT, dtype, codes)
    check_scale_values(model, checkpoint.name)
    return model


def cast_bytes(checkpoint: Checkpoint, dtype: torch.dtype, quantisation: str = KEEP) -> int:
    """RAM that loading takes: matrices stored in another number format than they compute in, or
    turned into 8-bit codes."""
    full = [
        header
        for header in checkpoint.headers.values()
        if len(header.shape) > 1 and header.dtype in FULL_PRECISION
    ]
    if quantisation != KEEP:
        return sum(math.prod(header.shape) for header in full)
    cast = [header for header in full if header.dtype != DTYPE_NAMES[dtype]]
    return sum(math.prod(header.shape) * dtype.itemsize for header in cast)


def weight_files(checkpoint: Checkpoint) -> set[Path]:
    """The files whose contents the tensors of `checkpoint` are views of."""
    return set(checkpoint.files.values()) or {checkpoint.path}


def _read(
    checkpoint: Checkpoint, quantisation: str
) -> tuple[dict[str, torch.Tensor], dict[str, Codes]]:
    """Tensors by official name, and how those linears are stored that are codes."""
    _, names = official_names(checkpoint.headers) or ("", {})
    if quantisation != KEEP:
        return read_quantised(checkpoint, names, quantisation)

    def read(stored: str) -> torch.Tensor:
        return checkpoint.tensors({stored: stored})[stored]

    stored = read_codes(names, checkpoint.headers, checkpoint.name, checkpoint.metadata, read)
    packed = {f"{name}.weight" for name in stored.codes}
    return checkpoint.tensors(stored.names, packed) | stored.made, stored.codes


def swap_linears(model: WanModel, codes: dict[str, Codes], source: str) -> None:
    """Put a scheme's linear class, still empty, where `codes` says weights are quantised."""
    for name, code in codes.items():
        try:
            plain = model.get_submodule(name)
        except AttributeError:
            continue  # strict loading names it
        if not isinstance(plain, torch.nn.Linear):
            raise CheckpointError(
                f"{source}: {name} is quantised and is no linear; this version reads files that "
                "quantise the linears only"
            )
        shape = (plain.in_features, plain.out_features)
        with torch.device("meta"):
            linear_class = select_linear(code.scheme)
            empty = linear_class(*shape, *code.arguments, bias=plain.bias is not None)
        model.set_submodule(name, empty)


def load_vae(path: str | Path | Checkpoint, dtype: torch.dtype = torch.float32) -> Vae:
    """Wan 2.1's VAE in official or diffusers names, a narrower one of its kind, or a tiny one.

    Raises CheckpointError for any other file, also for VAEs of other models.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if is_tiny(names := plain_vae_names(checkpoint.headers)):
        return _load_tiny_vae(checkpoint, names, dtype)
    names = official_vae_names(checkpoint.headers, _all_vae_names)
    shapes = {name: checkpoint.headers[stored].shape for name, stored in names.items()}
    config = VaeConfig.from_shapes(shapes, checkpoint.name)
    with torch.device("meta"):
        vae = WanVae(config)
    assign(vae, checkpoint.tensors(names), checkpoint.name, "Wan 2.1 VAE", dtype)
    return vae.to(dtype)


def _all_vae_names() -> Iterable[str]:
    with torch.device("meta"):
        return WanVae(VaeConfig()).state_dict()


def _load_tiny_vae(checkpoint: Checkpoint, names: dict[str, str], dtype: torch.dtype) -> TinyVae:
    shapes = {name: checkpoint.headers[stored].shape for name, stored in names.items()}
    with torch.device("meta"):
        vae = TinyVae(TinyConfig.from_shapes(shapes, checkpoint.name))
    assign(vae, checkpoint.tensors(names), checkpoint.name, "tiny VAE (TAEHV)", dtype)
    return vae.to(dtype)


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    as_stored: bool = False,
) -> TextEncoder:
    """UMT5 from a file or folder; its tokenizer embedded, given, or found beside it. `as_stored`
    keeps matrices as the file holds them, see `build_text_encoder`."""
    checkpoint = open_checkpoint(path)
    check_text_encoder(checkpoint.headers, checkpoint.name)
    tensors = _everything(checkpoint, dtype or torch.bfloat16)
    given = None if tokenizer is None else Path(tokenizer)
    pieces = read_tokenizer(Path(path), tensors, given)
    with _transformers_needed("the text encoder"):
        return build_text_encoder(tensors, pieces, checkpoint.name, dtype, as_stored)


def load_clip_vision(path: str | Path, dtype: torch.dtype | None = None) -> ClipVision:
    """The CLIP ViT-H image tower of Wan 2.1 image-to-video."""
    checkpoint = open_checkpoint(path)
    if checkpoint.gguf:
        raise CheckpointError(
            f"{checkpoint.name} is a GGUF file, and CLIP vision is not read from GGUF; "
            "use clip_vision_h.safetensors"
        )
    with _transformers_needed("CLIP vision"):
        return build_clip_vision(_everything(checkpoint), checkpoint.name, dtype)


@contextmanager
def _transformers_needed(what: str) -> Iterator[None]:
    """Turns a transformers package that is missing or broken into a sentence with its cause."""
    try:
        yield
    except ImportError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise CapabilityError(
            f"{what} needs the package transformers, which cannot be imported here "
            f"({' '.join(str(cause).split())}); install or repair it: pip install transformers"
        ) from error


def _everything(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """All tensors, and as one of them the tokenizer a GGUF file keeps in its metadata."""
    tensors = checkpoint.tensors({name: name for name in checkpoint.headers}, dtype=dtype)
    if (file := checkpoint.gguf) and (
        model := spiece_model(file.fields.get, file.array, checkpoint.name)
    ):
        tensors[SPIECE_MODEL] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    return tensors


def find_parts(
    model: str,
    task: str,
    low: Path | None = None,
    given: dict[str, Path | None] | None = None,
    tokenizer: Path | None = None,
) -> Parts:
    """Every file for `model`: "demo", a transformer file, or a folder in a published layout.

    `given` names parts ("vae", "text", "clip", "tae") that are not to be searched for. Raises
    CheckpointError that says which part was not found, where, and under which names.
    """
    named = {part: path for part, path in (given or {}).items() if path is not None}
    if model == "demo":
        if "tae" in named:
            raise RequestError(
                "the demo model has latents of its own, which no tiny VAE reads; leave out --tae"
            )
        return Parts(
            demo_path(task),
            named.get("vae", demo_path("vae")),
            named.get("text", demo_path("text")),
        )
    path = Path(model)
    if not path.exists():
        raise CheckpointError(f"model {model} does not exist; give a file, a folder, or demo")
    home = path if path.is_dir() else path.parent
    for folder in (path, path / "distill_models"):
        high, low_folder = (folder / name for name in EXPERT_FOLDERS)
        if high.exists() and low is None:
            path, low = high, low_folder
    homes = [home, home.parent]
    return Parts(
        transformer=path,
        vae=named.get("vae") or _beside("vae", path) or _find_part("vae", homes),
        text=named.get("text") or _beside("text", path) or _find_part("text", homes),
        low=low,
        clip=named.get("clip") or _search("clip", homes),
        tokenizer=tokenizer,
        tae=named.get("tae"),
    )


def _beside(part: str, model: Path) -> Path | None:
    """The demo's own file where `model` lies, as its base and all that training writes need it."""
    place = model.parent / DEMO_FILES[part]
    return place if model.is_file() and place.is_file() else None


def _search(part: str, homes: list[Path]) -> Path | None:
    places = (
        home / folder / name
        for home in homes
        for folder in PART_FOLDERS
        for name in PART_NAMES[part]
    )
    return next((place for place in places if place.is_file()), None)


def _find_part(part: str, homes: list[Path]) -> Path:
    found = _search(part, homes)
    if found is None:
        raise CheckpointError(
            f"no {part} file beside the model: looked in {homes[0]} and {homes[1]} for "
            f"{', '.join(PART_NAMES[part])}; name it with {PART_OPTIONS[part]}"
        )
    return found
