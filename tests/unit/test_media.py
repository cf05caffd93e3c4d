from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from lightx2v_core import media
from lightx2v_core.errors import CheckpointError, LightX2VError, RequestError
from lightx2v_core.media import (
    contact_sheet,
    describe_padding,
    read_image,
    read_metadata,
    read_video,
    to_uint8,
    write_video,
)
from lightx2v_core.memory.codec import save_raw_latent


def moving_bar(frames: int = 9, height: int = 48, width: int = 64) -> torch.Tensor:
    clip = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    for index in range(frames):
        clip[index, :, index * 4 : index * 4 + 8] = torch.tensor([200, 60, 30], dtype=torch.uint8)
    return clip


def read_back(path: Path, height: int, width: int) -> tuple[str, torch.Tensor]:
    """What ffmpeg says of the file, and its frames."""
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    told = subprocess.run(
        [exe, "-i", str(path)], capture_output=True, text=True, check=False
    ).stderr
    raw = subprocess.run(
        [exe, "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        check=True,
    ).stdout
    return told, torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, height, width, 3)


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (48, 63), (1, 1)])
def test_a_video_keeps_size_frames_rate_and_colours_and_an_odd_side_gets_a_pixel(tmp_path, size):
    clip, even = moving_bar(9, *size), [side + side % 2 for side in size]

    write_video(clip, tmp_path / "a.mp4", fps=16)
    told, frames = read_back(tmp_path / "a.mp4", *even)

    frames = frames[:, : size[0], : size[1]]
    assert frames.shape == clip.shape
    assert " 16 fps" in told and "yuv420p" in told
    assert f"{even[1]}x{even[0]}" in told
    padded = f"{size[1]}x{size[0]} has an odd side, padded to {even[1]}x{even[0]} for mp4"
    assert describe_padding(clip) == (padded if even != list(size) else "")
    assert (frames.float() - clip.float()).abs().mean() < 6, "more than H.264 at crf 16 loses"


def test_metadata_comes_back_as_it_was_given(tmp_path):
    metadata = {"prompt": 'a "red" 圆; x=1 \\ #\nsecond line', "seed": 7, "plan": "4 steps → 0"}

    write_video(moving_bar(), tmp_path / "a.mp4", 16, metadata)

    assert read_metadata(tmp_path / "a.mp4") == metadata


def test_frames_of_a_video_are_read_back(tmp_path):
    clip = moving_bar()

    write_video(clip, tmp_path / "a.mp4", fps=16)
    frames = read_video(tmp_path / "a.mp4")

    assert frames.shape == clip.shape
    assert (frames.float() - clip.float()).abs().mean() < 6


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")

    with pytest.raises(RequestError, match="not a video"):
        read_video(tmp_path / "a.mp4")


def test_a_video_without_metadata_reads_as_empty(tmp_path):
    write_video(moving_bar(), tmp_path / "a.mp4", 16)

    assert read_metadata(tmp_path / "a.mp4") == {}


def test_a_full_disk_leaves_nothing_half_written_and_says_so(tmp_path, monkeypatch):
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tiny)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    monkeypatch.setattr("tempfile.tempdir", str(tiny))
    try:
        noise = torch.randint(0, 255, (17, 256, 256, 3), dtype=torch.uint8)

        with pytest.raises(LightX2VError, match="could not be written .* free some disk space"):
            write_video(noise, tiny / "a.mp4", 16)

        with pytest.raises(CheckpointError, match="needs .* MB: free some disk space"):
            save_raw_latent(torch.zeros(1, 16, 5, 16, 16), tiny / "a.latent")

        assert not [path for path in tiny.rglob("*") if path.is_file()]
    finally:
        subprocess.run(["umount", str(tiny)], check=True)


@pytest.mark.parametrize("before", [None, b"an older video"])
def test_a_cancel_while_writing_leaves_what_was_there_and_no_half_video(
    tmp_path, monkeypatch, before
):
    def cancelled(arguments: list[str], _data: bytes) -> bytes:
        Path(arguments[-1]).write_bytes(b"half")
        raise KeyboardInterrupt

    target = tmp_path / "a.mp4"
    if before:
        target.write_bytes(before)
    monkeypatch.setattr(media, "_ffmpeg", cancelled)

    with pytest.raises(KeyboardInterrupt):
        write_video(moving_bar(), target, 16)

    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_a_contact_sheet_has_a_row_per_clip_and_eight_pictures(tmp_path):
    contact_sheet([("one", moving_bar(17)), ("two", moving_bar(5))], tmp_path / "x" / "sheet.png")

    image = read_image(tmp_path / "x" / "sheet.png")
    assert image.shape == (3, 2 * (48 + 18), 8 * 64)


def test_pixels_round_to_the_nearest_level():
    pixels = (
        torch.tensor([-1.0, 0.0, 1.0, 2.0, 200 / 127.5 - 1]).view(1, 1, 1, 5).expand(3, 1, 1, 5)
    )

    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 128, 255, 255, 200]


def test_a_picture_comes_back_in_minus_one_to_one(tmp_path):
    contact_sheet([("", moving_bar(1))], tmp_path / "p.png")

    image = read_image(tmp_path / "p.png")

    assert (float(image.min()), float(image.max())) == (-1.0, 1.0)


def test_a_missing_and_a_broken_picture_get_a_sentence(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")

    with pytest.raises(CheckpointError, match="does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(RequestError, match="not a picture that can be read"):
        read_image(tmp_path / "broken.png")
