"""The load benchmark, small: what it must show at full size it shows here with fake workers."""

from __future__ import annotations

import os

from benchmarks import service_load
from tests.unit.service.running import Running


def test_nothing_is_lost_or_doubled_while_tasks_are_cancelled_and_workers_killed(tmp_path):
    with Running(tmp_path, queue_size=6, processes=2) as service:
        base = f"http://127.0.0.1:{service.port}"

        def kill():
            for worker in list(service.server.pool.ready)[:1]:
                os.kill(worker.process.pid, 9)

        load = service_load.Load(base, 60, 8, {"prompt": "brief"}, cancel_share=0.2, pause=0.02)
        report = load.run(kill, kill_every=15)
        wrong = service_load.check(report, base, lambda data: int(data.rstrip(b".")))
        files = len(list((tmp_path / "outputs").iterdir()))

    assert not wrong
    assert report.kills >= 2 and report.refused and report.cancelled
    assert files == len(report.results) == 60 - len(report.cancelled)
    assert sorted(report.posted.values()) == list(range(60))
