"""A process that holds one model and makes videos for the service, one after the other.

`python -m lightx2v_core.worker --model_cls ... --task ... --model_path ... --config_json ...` reads
requests on stdin and answers on stdout (wire.py). It takes plain data and file paths that the
service chose, never a pickle. A request that cannot be met is answered; any other exception ends
the process, since what it leaves behind is unknown: the service starts another one.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import LightX2VError, RequestError, StoppedError
from .wire import MAX_LINE, decode, encode

if TYPE_CHECKING:
    from .configuration.running import Wish
    from .configuration.settings import Settings
    from .pipeline import Pipeline

log = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]  # stage, done, total
# (request, file to write, progress) -> what is worth knowing of the result, as plain data
Make = Callable[[Mapping[str, object], Path, OnProgress], dict[str, object]]
# (command line, check that raises StoppedError) -> how to make videos, and lines for the log
Load = Callable[[Sequence[str], Callable[[], None]], tuple[Make, list[str]]]


class Line:
    """The worker's end of both pipes. A thread reads, so that a cancel is heard in the middle."""

    def __init__(self, source: BinaryIO, target: BinaryIO) -> None:
        self.source, self.target = source, target
        self._jobs: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()
        self._running: object = None
        self._cancelled: set[object] = set()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while line := self.source.readline(MAX_LINE):
            message = decode(line)
            if message["kind"] == "run":
                self._jobs.put(message)
            elif message["kind"] == "cancel":
                self._cancelled.add(message.get("id"))
        # Nobody is left to answer to; a step in progress would hold the card for minutes.
        os._exit(0)

    def jobs(self) -> Iterator[dict[str, object]]:
        while True:
            job = self._jobs.get()
            self._running = job.get("id")
            yield job
            self._cancelled.discard(self._running)
            self._running = None

    def check(self) -> None:
        """Raise StoppedError when the running request was cancelled."""
        if self._running in self._cancelled:
            raise StoppedError("cancelled")

    def send(self, kind: str, **values: object) -> None:
        self.target.write(encode({"kind": kind, **values}))
        self.target.flush()


def serve(load: Load, arguments: Sequence[str]) -> int:
    """Load, say so, and answer requests until stdin ends. 1 when the model cannot be used."""
    line = Line(os.fdopen(os.dup(0), "rb"), _private_stdout())
    try:
        make, lines = load(arguments, line.check)
    except LightX2VError as error:
        line.send("unusable", error=str(error))
        return 1
    line.send("ready", lines=lines)
    for job in line.jobs():
        _answer(line, make, job)
    return 0


def _private_stdout() -> BinaryIO:
    """Stdout for messages alone: what libraries print goes to stderr instead."""
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return own


def _answer(line: Line, make: Make, job: Mapping[str, object]) -> None:
    name, request, output = job.get("id"), job.get("request"), job.get("output")
    if not isinstance(request, dict) or not isinstance(output, str):
        raise RequestError(f"request {name!r} is not an object with an output")

    def on_progress(stage: str, done: int, total: int) -> None:
        line.check()
        line.send("progress", id=name, stage=stage, done=done, total=total)

    try:
        line.check()
        facts = make(request, Path(output), on_progress)
    except StoppedError:
        line.send("cancelled", id=name)
    except LightX2VError as error:
        line.send("failed", id=name, error=str(error), error_type=type(error).__name__)
    else:
        line.send("done", id=name, facts=facts)


def load_model(arguments: Sequence[str], check: Callable[[], None]) -> tuple[Make, list[str]]:
    """The model of LightX2V's arguments, with `check` called before every transformer block."""
    from .configuration.arguments import add_model_arguments, refuse_unknown, settings_from
    from .configuration.running import open_pipeline
    from .device import select_device

    parser = argparse.ArgumentParser(prog="python -m lightx2v_core.worker")
    add_model_arguments(parser)
    parser.add_argument("--lora_dir", type=Path, help="LoRA files that a request may name")
    options, unknown = parser.parse_known_args(arguments)
    refuse_unknown(unknown)
    settings = settings_from(options)
    pipeline, lines = open_pipeline(settings, select_device(options.device))
    for expert in pipeline.experts:
        for block in expert.model.blocks:
            block.register_forward_pre_hook(lambda *_: check())
    return Maker(settings, pipeline, options.lora_dir), [*settings.notes, *lines]


class Maker:
    """Requests of the service into videos, with one pipeline that stays loaded."""

    def __init__(self, settings: Settings, pipeline: Pipeline, lora_dir: Path | None) -> None:
        self.settings, self.pipeline, self.lora_dir = settings, pipeline, lora_dir
        self._lora: tuple[Path, float] | None = None  # beside those of the configuration
        self._is_lora_put = True

    def __call__(
        self, request: Mapping[str, object], output: Path, on_progress: OnProgress
    ) -> dict[str, object]:
        """Make one video. `request` holds prompt, negative_prompt, seed, frames, steps, shape
        (height, width), resize_mode, lora_name, lora_strength, image files; each if asked for."""
        from .configuration.running import request_for
        from .console import result_lines
        from .media import write_video
        from .sampling.schedule import describe

        self._put_lora(request)
        settings = self._resized(request)
        asked = request_for(settings, self.pipeline, _wish(request))
        result = self.pipeline.generate(asked, on_progress)
        plan, size = describe(result.plan), result.size
        metadata = {
            "prompt": asked.prompt,
            "seed": asked.seed,
            "size": [size.width, size.height, size.frames],
            "plan": plan,
        }
        write_video(result.frames, output, settings.fps, metadata)
        for line in result_lines(result, output):
            log.info("%s", line)
        return {
            "width": size.width,
            "height": size.height,
            "frames": len(result.frames),
            "fps": settings.fps,
            "plan": plan,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "notes": _notes(request, result.plan.steps),
        }

    def _resized(self, request: Mapping[str, object]) -> Settings:
        from .configuration.sizes import RESIZE_MODES

        mode = request.get("resize_mode")
        if mode is None:
            return self.settings
        if mode not in RESIZE_MODES:
            raise RequestError(f"resize_mode {mode!r} is unknown; use {', '.join(RESIZE_MODES)}")
        return replace(self.settings, sizes=replace(self.settings.sizes, resize_mode=str(mode)))

    def _put_lora(self, request: Mapping[str, object]) -> None:
        """The configuration's LoRAs and the one the request names; nothing when none changed."""
        wanted = self._find_lora(request)
        if wanted == self._lora and self._is_lora_put:
            return
        files = [(lora.path, lora.strength) for lora in self.settings.loras]
        experts = [lora.expert for lora in self.settings.loras]
        self._lora, self._is_lora_put = wanted, False
        extra = [] if wanted is None else [wanted]
        lines = self.pipeline.set_loras([*files, *extra], experts=[*experts, *[None] * len(extra)])
        self._is_lora_put = True
        for line in lines:
            log.info("%s", line)

    def _find_lora(self, request: Mapping[str, object]) -> tuple[Path, float] | None:
        name, strength = request.get("lora_name"), request.get("lora_strength", 1.0)
        if not isinstance(name, str) or not isinstance(strength, (int, float)):
            return None
        if self.lora_dir is None:
            raise RequestError("lora_name is given and the service has no --lora_dir")
        path = self.lora_dir / name
        if not path.is_file():
            raise RequestError(f"lora_name {name} is not in the service's --lora_dir")
        return path, float(strength)


def _wish(request: Mapping[str, Any]) -> Wish:
    from .configuration.running import Wish
    from .media import read_image

    images = [request.get(name) for name in ("image_path", "last_frame_path")]
    first, last = (None if path is None else read_image(Path(path)) for path in images)
    shape = request.get("shape")
    return Wish(
        request.get("prompt", ""),
        request.get("negative_prompt", ""),
        first,
        last,
        request.get("seed"),
        request.get("frames"),
        None if shape is None else (shape[0], shape[1]),
    )


def _notes(request: Mapping[str, object], steps: int) -> list[str]:
    asked = request.get("steps")
    if asked is None or asked == steps:
        return []
    return [
        f"infer_steps {asked} has no effect: the model runs the {steps} steps it was trained for"
    ]


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="worker %(process)d: %(message)s")
    return serve(load_model, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
