"""Free RAM as files under /proc and /sys/fs/cgroup tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightx2v_core.memory.files import Mapped
from lightx2v_core.memory.ram import (
    available_bytes,
    limit_to,
    margin_bytes,
    pinnable_bytes,
    total_bytes,
)

GB = 10**9


def machine(root: Path, available: int, total: int, membership: str = "") -> Path:
    (root / "proc/self").mkdir(parents=True)
    lines = f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB\nHugeTotal: 0\n"
    (root / "proc/meminfo").write_text(lines)
    (root / "proc/self/cgroup").write_text(membership)
    return root


def group(root: Path, path: str, **files: int | str) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(str(value))


def near(actual: int | None, expected: float) -> bool:
    return actual is not None and abs(actual - expected) < 4096


def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path):
    root = machine(tmp_path, 20 * GB, 32 * GB)

    assert near(available_bytes(root), 20 * GB)
    assert near(total_bytes(root), 32 * GB)
    assert near(pinnable_bytes(root, "linux"), 20 * GB - margin_bytes(root))


def test_a_limit_of_cgroup_v2_counts_and_file_cache_in_it_does_not(tmp_path):
    root = machine(tmp_path, 200 * GB, 256 * GB, "0::/docker/a\n")
    statistics = f"anon 1\ninactive_file {2 * GB}\nactive_file {1 * GB}\n"
    group(root, "docker/a", memory__max="max", memory__current=9 * GB)
    group(
        root,
        "docker",
        memory__max=16 * GB,
        memory__current=10 * GB,
        memory__stat=statistics,
    )

    assert near(available_bytes(root), 9 * GB)
    assert near(total_bytes(root), 16 * GB)
    assert near(pinnable_bytes(root, "linux"), 7 * GB)


def test_a_limit_of_cgroup_v1_counts_also_where_the_container_sees_it_as_root(tmp_path):
    root = machine(tmp_path, 200 * GB, 256 * GB, "3:cpu:/x\n4:memory,hugetlb:/docker/b\n0::/\n")
    group(
        root,
        "memory",
        memory__limit_in_bytes=8 * GB,
        memory__usage_in_bytes=5 * GB,
        memory__stat=f"inactive_file 7\ntotal_inactive_file {1 * GB}\n",
    )

    assert near(available_bytes(root), 4 * GB)


def test_no_limit_in_cgroup_v1_is_a_very_large_number(tmp_path):
    root = machine(tmp_path, 20 * GB, 32 * GB, "4:memory:/\n")
    group(root, "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5 * GB)

    assert near(available_bytes(root), 20 * GB)


@pytest.mark.parametrize(
    ("available", "total", "platform", "expected"),
    [
        (1, 32, "linux", 0),  # less than the margin
        (30, 32, "win32", 0.45 * 32),
        (10, 32, "win32", 10 - 3.2),
    ],
)
def test_page_locked_memory_leaves_a_margin_and_on_windows_half_of_all(
    tmp_path, available, total, platform, expected
):
    root = machine(tmp_path, available * GB, total * GB)

    assert near(pinnable_bytes(root, platform), expected * GB)


def test_where_nothing_is_known_nothing_is_page_locked(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)

    assert available_bytes(tmp_path) is None
    assert pinnable_bytes(tmp_path) == 0


def test_this_machine_has_free_memory():
    free, total = available_bytes(), total_bytes()

    assert free is not None and total is not None
    assert 0 < free <= total


def test_mapped_tensors_are_told_from_those_in_ram(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(4096)}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        mapped = file.get_tensor("a")
    own = torch.zeros(4096)

    known = Mapped()

    assert known.holds(mapped)
    assert not known.holds(own)
    assert Mapped(tmp_path / "no such list").holds(own), "the careful answer"


def test_a_limit_of_ones_own_counts_what_is_of_no_file(tmp_path):
    root = machine(tmp_path, 20 * GB, 32 * GB)
    (root / "proc/self/status").write_text(f"VmRSS: 99 kB\nRssAnon:\t{3 * GB // 1024} kB\n")

    limit_to(8 * GB)
    try:
        limited = available_bytes(root), total_bytes(root), pinnable_bytes(root, "linux")
    finally:
        limit_to(None)

    wanted = (5 * GB, 8 * GB, 3 * GB)
    assert all(near(seen, size) for seen, size in zip(limited, wanted, strict=True)), limited
    assert near(available_bytes(root), 20 * GB)
