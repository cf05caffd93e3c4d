"""The command line of the service. What it does not know goes to its workers as it is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from ..errors import RequestError
from .body import Limits

TOKEN_VARIABLE = "LIGHTX2V_TOKEN"
MODEL_ARGUMENTS = ("model_cls", "task", "model_path", "config_json")


@dataclass(frozen=True, slots=True)
class Options:
    """How the service runs. Seconds where nothing else is said; `model` goes to the workers."""

    model: tuple[str, ...]
    model_cls: str = ""
    model_path: str = ""
    task: str = "t2v"
    host: str = "127.0.0.1"
    port: int = 8000
    processes: int = 1
    token: str = ""
    result_dir: Path = Path("save_results")
    queue_size: int = 10
    limits: Limits = Limits()
    allow_remote_images: bool = False
    header_seconds: float = 10.0  # until the first byte of a request is followed by its headers
    body_seconds: float = 60.0
    stop_seconds: float = 60.0  # from SIGTERM until running tasks are marked instead of finished
    cancel_seconds: float = 10.0  # from a cancel until the worker is killed
    keep: int = 1000

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Raises RequestError for values that cannot be meant; argparse ends the process for others."""
    found, rest = _parser().parse_known_args(arguments)
    if not 1 <= found.nproc_per_node <= 64 or found.queue_size < 1:
        raise RequestError("--nproc_per_node is 1 to 64 and --queue-size at least 1")
    if found.token is not None and not found.token.strip():
        raise RequestError("--token is empty; leave it out, or give one")
    if found.max_upload_mb <= 0 or found.max_video_megapixels <= 0:
        raise RequestError("--max-upload-mb and --max-video-megapixels must be above 0")
    named = [(f"--{name}", getattr(found, name)) for name in MODEL_ARGUMENTS]
    model = [word for name, value in named if value is not None for word in (name, value)]
    return Options(
        model=(*model, *rest),
        model_cls=found.model_cls or "",
        model_path=found.model_path,
        task=found.task,
        host=found.host,
        port=found.port,
        processes=found.nproc_per_node,
        token=found.token or os.environ.get(TOKEN_VARIABLE, ""),
        result_dir=found.result_dir,
        queue_size=found.queue_size,
        limits=Limits(int(found.max_upload_mb * 1e6), int(found.max_video_megapixels * 1e6)),
        allow_remote_images=found.allow_remote_images,
        stop_seconds=found.stop_seconds,
        cancel_seconds=found.cancel_seconds,
        keep=found.keep_results,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightx2v_core.api_server",
        description="LightX2V's HTTP service. Arguments that are not below go to the workers: see "
        "python -m lightx2v_core.worker --help",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_cls", help="as LightX2V has it, such as wan2.1_distill")
    add("--task", default="t2v", help="t2v, i2v, flf2v")
    add("--model_path", required=True, help="model folder, a transformer file, or demo")
    add("--config_json", help="a LightX2V configuration")
    add("--nproc_per_node", type=int, default=1, help="workers, each with a card and one video")
    add("--host", default="127.0.0.1", help="0.0.0.0: everybody who can reach this machine")
    add("--port", type=int, default=8000)
    add("--token", help=f"clients send it as a bearer token; better in {TOKEN_VARIABLE}")
    add("--result-dir", "--result_dir", type=Path, default=Path("save_results"))
    add("--queue-size", "--max_queue_size", type=int, default=10, help="waiting and running")
    add("--keep-results", type=int, default=1000, help="ended tasks and their files that stay")
    add("--max-upload-mb", type=float, default=32.0, help="of each picture")
    add("--max-video-megapixels", type=float, default=300.0, help="width x height x frames")
    add("--allow-remote-images", action="store_true", help="fetch pictures from public addresses")
    add("--stop-seconds", type=float, default=60.0, help="for running tasks after SIGTERM")
    add("--cancel-seconds", type=float, default=10.0, help="until a deaf worker is killed")
    return parser
