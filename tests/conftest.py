"""Small models with deterministic weights, shared by the unit and parity tests."""

from __future__ import annotations

import gc
import math
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightx2v_core.presets import DEMO_FOLDER
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel


def group_of(nodeid: str) -> str:
    """What shares something slow: a script or the server in one ComfyUI, elsewhere a file."""
    file, _, rest = nodeid.partition("::")
    parameters = rest.partition("[")[2]
    host = re.match(r"(\d+\.[\d.]+)[-\]]", parameters)
    if "tests/host/" not in file or host is None:
        return file
    return f"{'script' if 'inside' in file else 'server'} in {host.group(1)}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """For pytest-xdist: a group stays in one worker, in its order. Groups by name, since marks for
    `--dist loadgroup` are lost with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_finish() -> None:
    """What is imported by now lives to the end: later collections need not walk through it."""
    gc.collect()
    gc.freeze()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        FILES_SKIPPED[report.nodeid] = reason_of(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A pytest-xdist worker hands over the files it skipped; tests are reported by xdist."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["files_skipped"] = FILES_SKIPPED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    FILES_SKIPPED.update(getattr(node, "workeroutput", {}).get("files_skipped", {}))


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What did not run here, and why, in words of its own beside pytest's counts."""
    reports = terminalreporter.stats.get("skipped", [])
    tests = [reason_of(r) for r in reports if isinstance(r, pytest.TestReport)]
    skipped = Counter([*tests, *FILES_SKIPPED.values()])
    reasons = [f"{count} x {reason}" for reason, count in skipped.items()]
    if not torch.cuda.is_available():
        reasons.append("tests/gpu: no CUDA card here")
    terminalreporter.config.stash[NOT_RUN] = "not run here: " + ("; ".join(reasons) or "nothing")


def pytest_unconfigure(config: pytest.Config) -> None:
    if text := config.stash.get(NOT_RUN, ""):
        print(text)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors are small here, and threads that wait for each other on busy cores cost more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def the_shipped_demo_stays() -> Iterator[None]:
    """Training's commands write there unless they are told another folder."""
    before = _written()
    yield
    assert _written() == before, "a test wrote into the shipped demo: restore it with git"


def _written() -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in DEMO_FOLDER.iterdir()}
    return {name: (facts.st_size, facts.st_mtime_ns) for name, facts in found.items()}


NOT_RUN = pytest.StashKey[str]()
FILES_SKIPPED: dict[str, str] = {}  # node id of a file skipped as a whole -> why


def fill(module: nn.Module) -> nn.Module:
    """Weights from a deterministic pattern, scaled so that signals neither die nor explode."""
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, tensor in sorted(module.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name or name.endswith("gamma"):
                tensor.copy_(1.0 + 0.1 * noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
            else:
                tensor.copy_(0.1 * noise)
    return module.eval().requires_grad_(False)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


VARIANTS = {
    "t2v": WanConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=64),
    "i2v": WanConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=64, in_dim=36, clip_tokens=257),
    "flf2v": WanConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=64, in_dim=36, clip_tokens=514),
    "a14b_i2v": WanConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=64, in_dim=36),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def tiny_model(variant: str = "t2v") -> WanModel:
    return fill(WanModel(VARIANTS[variant]))


def tiny_inputs(config: WanConfig, batch: int = 2) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x_BCTHW": randn(batch, config.in_dim, 3, 6, 8),
        "timestep_B": torch.linspace(833.3333, 937.5, batch),
        "text_BSE": randn(batch, 512, config.text_dim),
        "clip_BSE": randn(batch, config.clip_tokens, 1280) if config.clip_tokens else None,
    }
