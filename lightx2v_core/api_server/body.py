"""What a client may ask for: LightX2V's fields of a video task, checked, and which of them count.

The names are those of VideoTaskRequest in LightX2V's lightx2v/server/schema.py. A field that is
absent leaves the service's configuration as it is. No field becomes a path: `save_result_path` is a
name under which the result is found again, not where it lies.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from ..errors import RequestError

MAX_PROMPT = 10_000  # characters; the encoder reads 512 tokens
MAX_NAME = 200
TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
LORA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,198}")
NAME_CHARACTERS = re.compile(r"[\w .,()+@=/-]+")


class Field(NamedTuple):
    """One field of the body. `use`: "used", "ignored" (said in a warning when it is sent), "quiet"
    (has no meaning for these models, nothing is said), or "refused" unless it asks for nothing."""

    kind: type | tuple[type, ...]
    use: str
    text: str


FIELDS = {
    "task_id": Field(str, "used", "1 to 64 letters, digits, - and _; made up when absent"),
    "prompt": Field(str, "used", "what the video shows"),
    "negative_prompt": Field(str, "used", "of use only where the configuration has CFG"),
    "image_path": Field(str, "used", "start image: base64 (also as data: URL), or an http(s) URL"),
    "last_frame_path": Field(str, "used", "last image, in the same forms"),
    "save_result_path": Field(str, "used", "name of the result, relative; default TASK_ID.mp4"),
    "seed": Field(int, "used", "0 to 2^63-1; random when absent"),
    "target_shape": Field(list, "used", "[height, width]; default: the configuration's"),
    "target_video_length": Field(int, "used", "frames, 4*n + 1; default: the configuration's"),
    "infer_steps": Field(int, "used", "followed only where it is the model's own count of steps"),
    "lora_name": Field(str, "used", "a file in the service's --lora_dir"),
    "lora_strength": Field((int, float), "used", "of lora_name; default 1"),
    "target_fps": Field(int, "ignored", "frames are not interpolated; the configuration's count"),
    "resize_mode": Field(str, "used", "for a start image; default: the configuration's"),
    "use_prompt_enhancer": Field(bool, "refused", "no prompt enhancer is here"),
    "image_mask_path": Field(str, "refused", "no model with masks is here"),
    "presigned_url": Field(str, "refused", "results are not sent elsewhere; fetch them"),
    "reuse": Field(bool, "refused", "a request does not depend on the one before"),
    "num_fragments": Field(int, "refused", "one clip a request"),
    "video_path": Field(str, "refused", "no video-to-video model is here"),
    "audio_path": Field(str, "refused", "no audio-driven model is here"),
    "talk_objects": Field(list, "refused", "no audio-driven model is here"),
    "sr_ratio": Field((int, float), "quiet", "of super-resolution models"),
    "video_duration": Field(int, "quiet", "of audio-driven models"),
}
NOTHING = {"num_fragments": (0, 1)}  # beside None, "", False and []
TEXTS = ("prompt", "negative_prompt", "resize_mode")
PICTURES = ("image_path", "last_frame_path")


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """One checked request. `pictures` are still as they were sent; `wish` is what the worker gets,
    plain data without paths."""

    task_id: str
    name: str  # where the client finds the result below /v1/files/download/
    wish: dict[str, object]
    pictures: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Limits(NamedTuple):
    """What one request may take at most."""

    upload_bytes: int = 32 << 20
    video_pixels: int = 300_000_000  # width x height x frames: 81 frames of 1280x720 are 75 million


def read_body(body: object, limits: Limits) -> VideoRequest:
    """The request in a JSON object, or RequestError with the field, what was found, and the form.

    An explicit null counts as absent, as it does for LightX2V's optional fields.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body is {_kind(body)}; a JSON object is needed")
    sent = {name: value for name, value in body.items() if value is not None}
    unknown = [name for name in sent if name not in FIELDS][:5]
    warnings = [f"{name!r:.60} is no field of a video task and has no effect" for name in unknown]
    for name, value in sent.items():
        if name in FIELDS:
            warnings += _check_field(name, FIELDS[name], value)
    task_id = str(sent.get("task_id") or new_task_id())
    if not TASK_ID.fullmatch(task_id):
        raise RequestError("task_id must be 1 to 64 letters, digits, - and _")
    wish = {name: sent[name] for name in TEXTS if sent.get(name)}
    wish |= _numbers(sent, limits)
    if lora := sent.get("lora_name"):
        wish |= {"lora_name": _lora(str(lora)), "lora_strength": sent.get("lora_strength", 1.0)}
    return VideoRequest(
        task_id,
        result_name(str(sent.get("save_result_path", "")), task_id),
        wish,
        {name: str(sent[name]) for name in PICTURES if sent.get(name)},
        tuple(warnings),
    )


def read_form(values: Mapping[str, str], limits: Limits) -> VideoRequest:
    """The same from the text fields of a form, where everything is text and the seed is 42 unless
    it is given, as LightX2V has it."""
    body: dict[str, object] = {"seed": 42}
    for name, text in values.items():
        kind = FIELDS[name].kind if name in FIELDS else str
        if name in PICTURES:
            raise RequestError(f"a form carries {name} as a file: image_file or last_frame_file")
        body[name] = _from_text(name, kind, text)
    return read_body(body, limits)


def new_task_id() -> str:
    """Five groups of four letters and digits, as LightX2V's; 103 random bits."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return "-".join("".join(secrets.choice(letters) for _ in range(4)) for _ in range(5))


def result_name(asked: str, task_id: str) -> str:
    """The name a result is found under: relative, without `..`, ending in .mp4."""
    path = PurePosixPath(asked.replace("\\", "/") or task_id)
    if path.is_absolute() or ".." in path.parts or not path.name or ":" in asked:
        raise RequestError(
            f"save_result_path {asked[:80]!r} leaves the result folder; give a relative name such "
            "as clip.mp4"
        )
    if path.suffix.lower() not in ("", ".mp4"):
        raise RequestError(f"save_result_path {asked[:80]!r} must end in .mp4")
    name = str(path if path.suffix else path.with_name(f"{path.name}.mp4"))
    if len(name) > MAX_NAME or not NAME_CHARACTERS.fullmatch(name):
        raise RequestError(
            f"save_result_path must be at most {MAX_NAME} letters, digits and . _ - , ( ) + @ = /"
        )
    return name


def _check_field(name: str, known: Field, value: object) -> list[str]:
    """A warning for what has no effect. RequestError for a wrong type or what is not done here."""
    wrong_bool = isinstance(value, bool) and known.kind is not bool
    if wrong_bool or not isinstance(value, known.kind):
        raise RequestError(f"{name} is {_kind(value)}; {_name(known.kind)} is needed")
    if known.use == "refused" and value and value not in NOTHING.get(name, ()):
        raise RequestError(f"{name} cannot be used: {known.text}; leave it out")
    if known.use == "ignored" and value:
        return [f"{name} has no effect: {known.text}"]
    if name in TEXTS and len(str(value)) > MAX_PROMPT:
        raise RequestError(f"{name} has {len(str(value))} characters; {MAX_PROMPT} are the most")
    return []


def _numbers(sent: Mapping[str, object], limits: Limits) -> dict[str, object]:
    seed = _in_range("seed", sent.get("seed", secrets.randbelow(1 << 32)), 0, (1 << 63) - 1)
    found: dict[str, object] = {"seed": seed}
    if "target_video_length" in sent:
        found["frames"] = _in_range("target_video_length", sent["target_video_length"], 1, 2001)
    if "infer_steps" in sent:
        found["steps"] = _in_range("infer_steps", sent["infer_steps"], 1, 1000)
    shape = sent.get("target_shape")
    if isinstance(shape, list) and shape:
        if len(shape) != 2:
            raise RequestError(f"target_shape has {len(shape)} numbers; [height, width] is needed")
        found["shape"] = [_in_range("target_shape", side, 16, 8192) for side in shape]
    _check_pixels(found, limits)
    strength = sent.get("lora_strength", 1.0)
    if not isinstance(strength, (int, float)) or not -100.0 <= strength <= 100.0:
        raise RequestError(f"lora_strength {strength!r} is outside -100 to 100")
    return found


def _check_pixels(found: Mapping[str, object], limits: Limits) -> None:
    """Where only one of size and length is sent the other is the configuration's: 1 counts here."""
    shape, frames = found.get("shape"), found.get("frames", 1)
    if not isinstance(shape, list) or not isinstance(frames, int):
        return
    height, width = shape
    if width * height * frames > limits.video_pixels:
        raise RequestError(
            f"{width}x{height} with {frames} frames is {width * height * frames / 1e6:.0f} million "
            f"pixels; this service makes {limits.video_pixels / 1e6:.0f} million at most"
        )


def _in_range(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {_kind(value)}; an integer is needed")
    if not low <= value <= high:
        raise RequestError(f"{name} is outside {low} to {high}")
    return value


def _lora(name: str) -> str:
    if not LORA_NAME.fullmatch(name) or ".." in name:
        raise RequestError("lora_name must be the bare name of a file in --lora_dir")
    return name


def _from_text(name: str, kind: type | tuple[type, ...], text: str) -> object:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False, "": False}[text.lower()]
        if kind is int:
            return int(text)
    except (ValueError, KeyError) as error:
        raise RequestError(f"{name} is {text[:40]!r}; {_name(kind)} is needed") from error
    return text


def _kind(value: object) -> str:
    names = {
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null" if value is None else "a number")


def _name(kind: type | tuple[type, ...]) -> str:
    names = {str: "a string", bool: "true or false", int: "an integer", list: "a list"}
    return "a number" if isinstance(kind, tuple) else names[kind]
