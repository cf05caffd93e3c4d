"""A worker without a model, in milliseconds: the words of the prompt say how it behaves."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lightx2v_core.errors import CheckpointError, RequestError
from lightx2v_core.worker import serve


def load(arguments, check):
    if "--unusable" in arguments:
        raise CheckpointError("there is no model at this place")
    if "--dies" in arguments:
        os._exit(3)
    return make, ["a worker without a model"]


def make(request, output, on_progress):
    words = request.get("prompt", "").split()
    print("libraries print to stdout")
    marker = output.with_name("died-once")
    if "die" in words or ("die-once" in words and not marker.exists()):
        marker.touch()
        output.with_name(f"{output.stem}.part.mp4").touch()
        os._exit(9)
    if "refuse" in words:
        raise RequestError("100x100 is not divisible by 16; use 96x96")
    if "deaf" in words:
        on_progress("sampling", 1, 4)  # from here on it hears nothing
        time.sleep(60)
    steps = 400 if "slow" in words else 4
    for step in range(1, steps + 1):
        time.sleep(0.01 if "slow" in words else 0.0)
        on_progress("sampling", step, steps)
    time.sleep(0.5 if "short" in words else 0.04 if "brief" in words else 0.0)
    pictures = [request[n] for n in ("image_path", "last_frame_path") if n in request]
    parts = [str(request["seed"]).encode(), *(Path(p).read_bytes() for p in pictures)]
    output.write_bytes(b"|".join(parts).ljust(5000, b"."))
    seconds = {"text": 0.01, "image": 0.0, "sampling": 0.04, "decode": 0.02}
    return {"frames": 17, "seconds": seconds, "peak_bytes": 0, "request": sorted(request)}


if __name__ == "__main__":
    sys.exit(serve(load, sys.argv[1:]))
