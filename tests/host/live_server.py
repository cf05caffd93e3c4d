"""A real ComfyUI server in a folder of its own, driven over HTTP and its websocket."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import websocket

sys.path.insert(0, str(Path(__file__).parent))
from small_files import umt5_tensors, write

sys.path.pop(0)

PACK_NAME = "lightx2v-distill"
START_SECONDS = 180
RUN_SECONDS = 120
PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4


@dataclass
class Run:
    """What one posted workflow sent until it ended."""

    events: list[tuple[str, dict]] = field(default_factory=list)
    previews: int = 0
    texts: list[str] = field(default_factory=list)
    outputs: dict = field(default_factory=dict)
    clock: list[float] = field(default_factory=list)  # when each event came, in seconds

    def data(self, kind: str) -> list[dict]:
        return [data for name, data in self.events if name == kind]

    @property
    def end(self) -> str:
        return self.events[-1][0]

    @property
    def error(self) -> str:
        return self.data("execution_error")[0]["exception_message"].strip()

    def progress(self, node: str) -> list[tuple[int, int]]:
        return [(d["value"], d["max"]) for d in self.data("progress") if d["node"] == node]


class Server:
    own_flags: tuple[str, ...] = ("--cpu", "--preview-method", "latent2rgb")
    variables: Mapping[str, str] = {"OMP_NUM_THREADS": "1"}
    patience = RUN_SECONDS  # between two messages

    def __init__(
        self,
        host: Path,
        python: Path,
        pack: Path,
        folder: Path,
        environment: dict[str, str],
        flags: tuple[str, ...] = (),
    ) -> None:
        self.flags = flags
        self.host, self.python, self.pack, self.folder = host, python, pack, folder
        self.environment = {**environment, **self.variables}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.client = uuid.uuid4().hex

    def __enter__(self) -> Server:
        self._fill_folder()
        self.log = (self.folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [
                *(self.python, self.host / "main.py", *self.own_flags),
                *("--listen", "127.0.0.1", "--port", str(self.port)),
                *("--base-directory", self.folder),
                *("--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_NAME),
                *("--database-url", "sqlite:///:memory:", "--disable-api-nodes"),
                *self.flags,
            ],
            cwd=self.host,
            env=self.environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self._wait_until_ready()
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}"
        self.socket = websocket.create_connection(address, timeout=self.patience)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)
        self.log.close()

    def _fill_folder(self) -> None:
        for name in ("diffusion_models", "vae", "text_encoders"):
            (self.folder / "models" / name).mkdir(parents=True)
        for name in ("custom_nodes", "input", "output", "temp", "user"):
            (self.folder / name).mkdir()
        (self.folder / "custom_nodes" / PACK_NAME).symlink_to(self.pack, target_is_directory=True)
        write_models(self.folder / "models")

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.text()[-3000:]}")

    def anonymous(self) -> int:
        """RssAnon of the server's process, in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0]) * 1024

    def text(self) -> str:
        """All the server has logged."""
        return (self.folder / "server.log").read_text("utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"{}")

    def run(self, prompt: dict, interrupt_at: int | None = None) -> Run:
        """Post a workflow in API form and listen until it ends; stop it at a progress value."""
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client})
        assert status == 200 and not answer["node_errors"], answer
        run, ends = Run(), ("execution_success", "execution_error", "execution_interrupted")
        while not run.events or run.end not in ends:
            message = self.socket.recv()
            if isinstance(message, bytes):
                self._take_binary(run, message)
                continue
            event = json.loads(message)
            data = event["data"]
            if data.get("prompt_id") != answer["prompt_id"]:
                continue
            run.events.append((event["type"], data))
            run.clock.append(time.perf_counter())
            if event["type"] == "progress" and data["value"] == interrupt_at:
                self.post("/interrupt", {})
        run.outputs = {data["node"]: data["output"] for data in run.data("executed")}
        return run

    def _take_binary(self, run: Run, message: bytes) -> None:
        (kind,) = struct.unpack(">I", message[:4])
        if kind in (PREVIEW, PREVIEW_WITH_METADATA):
            run.previews += 1
        elif kind == TEXT:
            (length,) = struct.unpack(">I", message[4:8])
            run.texts.append(message[8 + length :].decode())


def write_models(models: Path) -> None:
    """A T2V model, two A14B experts, a VAE and a text encoder, all small and random."""
    import torch

    from lightx2v_core.wan.config import WanConfig
    from lightx2v_core.wan.model import WanModel
    from lightx2v_core.wan.vae import VaeConfig, WanVae

    torch.manual_seed(0)
    config = {"dim": 256, "ffn_dim": 512, "num_layers": 2, "text_dim": 64}
    text_model = WanModel(WanConfig(**config)).state_dict()
    image_model = WanModel(WanConfig(**config, in_dim=36)).state_dict()
    folder = models / "diffusion_models"
    write(folder / "t2v.safetensors", text_model)
    write(folder / "wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors", image_model)
    write(folder / "wan2.2_i2v_A14b_low_noise_lightx2v_4step.safetensors", image_model)
    write(models / "vae" / "vae.safetensors", WanVae(VaeConfig(16, 16)).state_dict())
    write(models / "text_encoders" / "umt5.safetensors", umt5_tensors(64))
