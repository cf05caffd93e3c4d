"""Videos and pictures on disk: mp4 through imageio-ffmpeg, PNG contact sheets, start images."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint.writing import replacing
from .errors import CheckpointError, LightX2VError, RequestError

CONTACT_COLUMNS = 8
LABEL_HEIGHT = 18


def to_uint8(pixels_CFHW: Tensor) -> Tensor:
    """[-1, 1] C F H W -> F H W C uint8 on the CPU, rounded to the nearest level."""
    levels = ((pixels_CFHW.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def write_video(
    frames_FHWC: Tensor, path: Path, fps: int, metadata: Mapping[str, object] | None = None
) -> None:
    """H.264 mp4 of uint8 frames, whole or not at all. `metadata` goes into its comment as JSON.

    Players want yuv420p, which has no odd sides: such a side gets one more pixel, a copy of its
    last (`describe_padding` says so).
    """
    even = even_sides(frames_FHWC)
    height, width = even.shape[1:3]
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    comment = json.dumps(dict(metadata or {}), ensure_ascii=False)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)]
    target = ["-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _ffmpeg(
            [*source, "-i", "-", *target, "-metadata", f"comment={comment}", "-y", str(part)],
            even.numpy().tobytes(),
        )
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise LightX2VError(
            f"{path} could not be written ({error}); free some disk space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def describe_padding(frames_FHWC: Tensor) -> str:
    """What `write_video` adds to an odd side, in words; nothing for even ones."""
    height, width = frames_FHWC.shape[1:3]
    if not height % 2 and not width % 2:
        return ""
    even = f"{width + width % 2}x{height + height % 2}"
    return f"{width}x{height} has an odd side, padded to {even} for mp4"


def even_sides(frames_FHWC: Tensor) -> Tensor:
    """The frames, with the last row or column twice where their number is odd."""
    height, width = frames_FHWC.shape[1:3]
    if not height % 2 and not width % 2:
        return frames_FHWC
    rows = torch.arange(height + height % 2).clamp_max(height - 1)
    columns = torch.arange(width + width % 2).clamp_max(width - 1)
    return frames_FHWC[:, rows][:, :, columns].contiguous()


def _ffmpeg(arguments: list[str], data: bytes = b"") -> bytes:
    """Run the ffmpeg that imageio-ffmpeg brings; RuntimeError with its last line when it fails."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"ffmpeg ended with code {done.returncode}")
    return done.stdout


def read_metadata(path: Path) -> dict[str, object]:
    """What `write_video` put into the comment of a video; empty when there is none."""
    text = _ffmpeg(["-i", str(path), "-f", "ffmetadata", "-"]).decode("utf-8")
    unescaped, escaped = [], False
    for character in text.partition("comment=")[2]:
        if character == "\n" and not escaped:
            break
        if character == "\\" and not escaped:
            escaped = True
            continue
        unescaped.append(character)
        escaped = False
    return json.loads("".join(unescaped) or "{}")


def read_video(path: Path) -> Tensor:
    """Frames, FHWC uint8, of a video that ffmpeg reads. Raises RequestError for any other file."""
    try:
        # A stream of PPM pictures, each of which says its size.
        data = _ffmpeg(["-i", str(path), "-f", "image2pipe", "-c:v", "ppm", "-"])
    except RuntimeError as error:
        raise RequestError(f"{path} is not a video that can be read ({error}); use mp4") from error
    magic, size, depth = data.split(b"\n", 3)[:3]
    width, height = (int(side) for side in size.split())
    header = len(magic) + len(size) + len(depth) + 3
    pictures = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pictures = pictures.view(-1, header + 3 * width * height)[:, header:]
    return pictures.reshape(-1, height, width, 3)


def contact_sheet(rows: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """PNG, a labelled row of up to eight evenly spaced frames for each (label, FHWC uint8)."""
    from PIL import Image, ImageDraw

    height, width = rows[0][1].shape[1:3]
    columns = min(CONTACT_COLUMNS, max(len(frames) for _, frames in rows))
    sheet = Image.new("RGB", (columns * width, len(rows) * (height + LABEL_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, frames) in enumerate(rows):
        top = row * (height + LABEL_HEIGHT)
        draw.text((4, top + 3), label, fill="black")
        picks = torch.linspace(0, len(frames) - 1, min(columns, len(frames))).round().long()
        for column, index in enumerate(picks.tolist()):
            picture = Image.fromarray(frames[index].numpy()).resize((width, height))
            sheet.paste(picture, (column * width, top + LABEL_HEIGHT))
    with replacing(path, 3 * sheet.width * sheet.height) as part:
        sheet.save(part, "PNG")


def read_image(path: Path) -> Tensor:
    """C H W float32 in [-1, 1], turned upright, on black where it is transparent."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; check the path of the image") from error
    except (UnidentifiedImageError, OSError) as error:
        raise RequestError(
            f"{path} is not a picture that can be read; use PNG, JPEG or WebP"
        ) from (error)
    flat = Image.new("RGBA", image.size, "black")
    flat.alpha_composite(image)
    data = torch.frombuffer(bytearray(flat.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1
