"""Counts and times for Prometheus, under LightX2V's names where it has one, else with its prefix.

A registry of its own, so that two services in one process (tests) do not share counters.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from .processes import end, finish

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STAGES = {
    "text": "lightx2v_run_text_encode_duration",
    "image": "lightx2v_run_vae_encoder_image_duration",
    "decode": "lightx2v_run_vae_decode_duration",
    "sampling": "lightx2v_run_sampling_duration",
}
GPU_QUERY = "index,utilization.gpu,memory.used,memory.total"
MOST_STEPS = 50  # runs with more share one label: labels must not grow without end
GPU_PAUSE = 2.0  # seconds between two questions to nvidia-smi


class Metrics:
    """What the service and its workers tell of themselves."""

    def __init__(self, model_cls: str = "") -> None:
        self.registry = registry = CollectorRegistry()
        self.model_cls = model_cls
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, text, labels, buckets=SECONDS, registry=registry)

        where = ("method", "endpoint")
        self.requests = counter("lightx2v_api_request_total", "HTTP requests", where)
        self.errors = counter(
            "lightx2v_api_request_error_total", "HTTP requests refused", (*where, "status")
        )
        self.duration = histogram(
            "lightx2v_api_request_e2e_duration_seconds", "HTTP request to reply", where
        )
        self.pending = gauge("lightx2v_task_queue_pending_size", "tasks that wait")
        self.active = gauge("lightx2v_task_queue_active_size", "tasks that wait or run")
        self.capacity = gauge("lightx2v_task_queue_capacity", "the most that may wait or run")
        self.workers = gauge("lightx2v_workers_ready", "workers with a loaded model")
        self.restarts = counter("lightx2v_worker_restarts_total", "workers started again")
        self.made = counter("lightx2v_worker_request_count", "tasks a worker was done with")
        self.success = counter("lightx2v_worker_request_success", "videos made")
        self.failure = counter("lightx2v_worker_request_failure", "tasks not made", ("error_type",))
        self.seconds = histogram(
            "lightx2v_worker_request_duration", "seconds for a task", ("model_cls",)
        )
        self.step = histogram(
            "lightx2v_run_per_step_dit_duration", "seconds a step", ("step_no", "total_steps")
        )
        self.stages = {s: histogram(name, f"seconds: {s}") for s, name in STAGES.items()}
        self.frames = counter("lightx2v_frames_total", "frames made")
        self.peak = gauge("lightx2v_worker_peak_gpu_bytes", "most GPU memory of the last video")
        self.worker_memory = gauge("lightx2v_worker_resident_bytes", "RAM of a worker", ("worker",))
        self.gpu_use = gauge("lightx2v_gpu_utilization_ratio", "by nvidia-smi", ("gpu",))
        self.gpu_used = gauge("lightx2v_gpu_memory_used_bytes", "by nvidia-smi", ("gpu",))
        self.gpu_total = gauge("lightx2v_gpu_memory_total_bytes", "by nvidia-smi", ("gpu",))
        self._gpus_asked = 0.0

    def answered(self, method: str, endpoint: str, status: int, seconds: float) -> None:
        self.requests.labels(method, endpoint).inc()
        self.duration.labels(method, endpoint).observe(seconds)
        if status >= 400:
            self.errors.labels(method, endpoint, str(status)).inc()

    def queued(self, pending: int, active: int, capacity: int) -> None:
        self.pending.set(pending)
        self.active.set(active)
        self.capacity.set(capacity)

    def restarted(self) -> None:
        self.restarts.inc()

    def stepped(self, stage: str, done: object, total: object, seconds: float) -> None:
        """The first step's time holds what comes before it: nothing is reported at its start."""
        if stage == "sampling" and isinstance(total, int):
            named = (str(done), str(total)) if total <= MOST_STEPS else ("any", "many")
            self.step.labels(*named).observe(seconds)

    def ended(self, how: str, seconds: float, facts: Mapping[str, object] | None = None) -> None:
        """`how`: completed, cancelled, or the kind of error."""
        self.made.inc()
        self.seconds.labels(self.model_cls).observe(seconds)
        if how != "completed":
            self.failure.labels(how).inc()
            return
        self.success.inc()
        facts = facts or {}
        if isinstance(frames := facts.get("frames"), int):
            self.frames.inc(frames)
        if isinstance(peak := facts.get("peak_bytes"), int):
            self.peak.set(peak)
        stages = facts.get("seconds")
        for stage, took in stages.items() if isinstance(stages, dict) else ():
            if stage in self.stages and isinstance(took, float):
                self.stages[stage].observe(took)

    def see_workers(self, pids: list[int]) -> None:
        self.workers.set(len(pids))
        self.worker_memory.clear()
        for index, pid in enumerate(sorted(pids)):
            if (held := resident_bytes(pid)) is not None:
                self.worker_memory.labels(str(index)).set(held)

    async def see_gpus(self) -> None:
        """Ask nvidia-smi, where there is one, at most every two seconds."""
        program = shutil.which("nvidia-smi")
        if program is None or time.monotonic() - self._gpus_asked < GPU_PAUSE:
            return
        self._gpus_asked = time.monotonic()
        command = (f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits")
        process = await asyncio.create_subprocess_exec(
            program, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            text, _ = await asyncio.wait_for(process.communicate(), GPU_PAUSE)
        except TimeoutError:
            return
        finally:
            await finish(end(process, GPU_PAUSE))
        self.read_gpus(text.decode("ascii", "replace"))

    def read_gpus(self, text: str) -> None:
        """Lines of nvidia-smi: index, per cent, MiB used, MiB in all; `[N/A]` stays out."""
        for line in text.splitlines():
            gpu, *values = (part.strip() for part in line.split(","))
            gauges = ((self.gpu_use, 0.01), (self.gpu_used, 2**20), (self.gpu_total, 2**20))
            for (gauge, unit), value in zip(gauges, values, strict=False):
                if value.isdecimal():
                    gauge.labels(gpu).set(int(value) * unit)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def resident_bytes(pid: int) -> int | None:
    """RAM of a process where Linux tells it, else None."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * 4096
