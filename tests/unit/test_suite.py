"""How the suite is shared out to workers."""

from __future__ import annotations

import pytest

from tests.conftest import group_of

INSIDE = "tests/host/test_inside.py::test_our_vae_clip_and_nodes"


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        (f"{INSIDE}[0.18.1-inspect]", "script in 0.18.1"),
        (f"{INSIDE}[0.8.0-inspect]", "script in 0.8.0"),
        ("tests/host/test_server.py::test_an_interrupt[0.8.0]", "server in 0.8.0"),
        ("tests/host/test_workflows.py::test_demo[0.8.0-i2v_demo]", "server in 0.8.0"),
        (
            "tests/host/test_workflow_files.py::test_x[t2v_demo]",
            "tests/host/test_workflow_files.py",
        ),
        ("tests/unit/test_demo.py::test_y[0.8.0-z]", "tests/unit/test_demo.py"),
    ],
)
def test_tests_that_share_a_server_a_script_or_a_file_are_one_group(nodeid, group):
    assert group_of(nodeid) == group
