"""LightX2V's routes, bodies and states, as its clients use them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lightx2v_core.api_server.body import FIELDS
from tests.unit.service.running import Running, base64_png, png


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Running(tmp_path_factory.mktemp("results"), queue_size=8) as running:
        yield running


def test_a_video_goes_from_post_to_its_bytes_under_the_name_that_was_asked(service):
    body = {
        "prompt": "two cats box",
        "negative_prompt": "blurry",
        "image_path": "",
        "seed": 42,
        "save_result_path": "./cat_boxing_seed42.mp4",
    }

    status, reply = service.post(body)
    ended = service.until(reply["task_id"], "completed", "failed")
    _, headers, data = service.call("GET", f"/v1/tasks/{reply['task_id']}/result")
    by_name = service.call("GET", "/v1/files/download/cat_boxing_seed42.mp4")[2]

    assert status == 200 and reply["task_status"] == "pending"
    assert ended["save_result_path"] == "cat_boxing_seed42.mp4" and ended["error"] is None
    assert ended["start_time"] < ended["end_time"] and ended["seed"] == 42
    assert data.startswith(b"42.") and len(data) == 5000 and by_name == data
    assert headers["Content-Type"] == "video/mp4" and "cat_boxing" in headers["Content-Disposition"]


@pytest.mark.parametrize("path", ["/v1/tasks/", "/v1/tasks", "/v1/tasks/video"])
def test_older_and_shorter_paths_make_videos_too(service, path):
    status, reply = service.post({"prompt": "a", "task_id": ""}, path)

    assert status == 200 and service.until(reply["task_id"], "completed")
    assert len(reply["task_id"].split("-")) == 5


def test_everything_that_is_asked_reaches_the_worker_and_nothing_else(service):
    ended = service.made(
        prompt="a",
        target_shape=[480, 832],
        target_video_length=81,
        infer_steps=4,
        lora_name="style.safetensors",
        lora_strength=0.5,
        target_fps=16,
        video_duration=5,
        colour="red",
    )

    names = ["frames", "lora_name", "lora_strength", "prompt", "seed", "shape", "steps"]
    assert ended["facts"]["request"] == names
    assert ended["warnings"] == [
        "'colour' is no field of a video task and has no effect",
        "target_fps has no effect: frames are not interpolated; the configuration's count",
    ]


def test_a_form_carries_its_picture_to_the_worker_and_no_copy_stays(tmp_path):
    with Running(tmp_path, task="i2v") as service:
        fields = {"prompt": "it turns", "infer_steps": "5", "use_prompt_enhancer": "false"}

        status, reply = service.form(fields, [("image_file", "../../fox.png", png())])
        ended = service.until(reply["task_id"], "completed", "failed")
        data = service.call("GET", f"/v1/tasks/{reply['task_id']}/result")[2]
        old_path = service.form(fields, [("image_file", "", png())], "/v1/tasks/form")

        assert status == 200 and ended["seed"] == 42, (reply, ended)
        assert old_path[0] == 200
        assert data.startswith(b"42|" + png())
        service.until(old_path[1]["task_id"], "completed")
        assert not list((tmp_path / "inputs").iterdir())
        assert {len(path.name) for path in (tmp_path / "outputs").iterdir()} == {36}


@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_a_picture_comes_as_base64_or_as_a_data_url(tmp_path_factory, head):
    with Running(tmp_path_factory.mktemp("r"), task="flf2v") as service:
        ended = service.made(image_path=head + base64_png(), last_frame_path=base64_png())
        without = service.post({"image_path": base64_png()})

    assert ended["status"] == "completed" and "last_frame_path" in ended["facts"]["request"]
    assert without == (400, {"detail": "task flf2v needs last_frame_path"})


def test_status_routes_have_the_keys_that_clients_read(service):
    service.made(prompt="a", task_id="test_task_001")

    tasks = service.get("/v1/tasks/")[1]
    queue = service.get("/v1/tasks/queue/status")[1]
    state = service.get("/v1/service/status")[1]
    metadata = service.get("/v1/service/metadata")[1]

    assert tasks["test_task_001"] == service.status("test_task_001")
    assert queue == {
        "is_processing": False,
        "current_task": None,
        "pending_count": 0,
        "active_count": 0,
        "queue_size": 8,
        "queue_available": 8,
    }
    assert state["service_status"] == "idle" and state["total_tasks"] == len(tasks)
    assert set(state) >= {"current_task", "active_tasks", "pending_tasks", "queue_size"}
    assert metadata == {
        "nproc_per_node": 1,
        "model_cls": "wan2.1_distill",
        "model_path": "demo",
    }
    assert service.get("/health") == (200, {"status": "ok"})
    assert service.get("/ready") == (200, {"ready": True, "workers": 1})


def test_an_id_is_taken_once(service):
    service.made(prompt="a", task_id="once")

    assert service.post({"prompt": "a", "task_id": "once"})[0] == 409


def test_unknown_and_unfinished_tasks_are_not_found(service):
    _, reply = service.post({"prompt": "slow"})

    assert service.get("/v1/tasks/none/status") == (404, {"detail": "Task not found"})
    assert service.get(f"/v1/tasks/{reply['task_id']}/result")[1]["detail"] == "Task not completed"
    assert service.get("/v1/files/download/none.mp4")[0] == 404
    assert service.delete("/v1/tasks/none")[1]["stop_status"] == "do_nothing"
    service.delete(f"/v1/tasks/{reply['task_id']}")


def test_a_refusal_of_the_model_fails_the_task_with_its_sentence(service):
    ended = service.made(prompt="refuse")

    assert ended["status"] == "failed" and ended["error_type"] == "RequestError"
    assert ended["error"] == "100x100 is not divisible by 16; use 96x96"


def test_progress_is_told_while_it_runs_and_a_cancel_ends_it(service):
    _, reply = service.post({"prompt": "slow"})
    name = reply["task_id"]
    service.until(name, "processing")
    deadline = time.monotonic() + 10
    while not (progress := service.status(name)["progress"]) and time.monotonic() < deadline:
        time.sleep(0.01)

    stopped = service.delete(f"/v1/tasks/{name}")[1]
    again = service.delete(f"/v1/tasks/{name}")[1]
    after = service.made(prompt="next")

    assert progress["stage"] == "sampling" and 0 < progress["done"] < progress["total"] == 400
    assert stopped["stop_status"] == "success" and again["stop_status"] == "do_nothing"
    assert service.status(name)["status"] == "cancelled"
    assert after["status"] == "completed" and after["attempts"] == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/v1/tasks/running"),
        ("GET", "/v1/local/video/generate/stop_running_task"),
        ("DELETE", "/v1/tasks/all/running"),
    ],
)
def test_what_runs_can_be_stopped_by_every_route_there_was(service, method, path):
    running = service.post({"prompt": "slow"})[1]["task_id"]
    waiting = service.post({"prompt": "a"})[1]["task_id"]
    service.until(running, "processing")

    service.call(method, path)
    ended = service.until(waiting, "completed", "cancelled")

    assert service.status(running)["status"] == "cancelled"
    assert ended["status"] == ("cancelled" if "all" in path else "completed")


def test_a_full_queue_says_503_and_takes_again_when_there_is_room(tmp_path):
    with Running(tmp_path, queue_size=2) as service:
        first = service.post({"prompt": "slow"})[1]["task_id"]
        second = service.post({"prompt": "a"})[1]["task_id"]
        status, refused = service.post({"prompt": "a"})

        service.delete(f"/v1/tasks/{first}")
        later = service.post({"prompt": "a"})[0]

        assert (status, refused["detail"]) == (503, "Task queue is full (max 2 tasks)")
        assert later == 200 and service.until(second, "completed")


def test_results_are_served_by_range(service):
    name = service.made(prompt="a", seed=7)["task_id"]
    path = f"/v1/tasks/{name}/result"

    first = service.call("GET", path, headers={"Range": "bytes=0-0"})
    last = service.call("GET", path, headers={"Range": "bytes=-4"})

    assert first[0] == 206 and first[2] == b"7" and first[1]["Content-Range"] == "bytes 0-0/5000"
    assert last[0] == 206 and last[2] == b"...."
    assert service.call("HEAD", path)[1]["Accept-Ranges"] == "bytes"


def test_the_newest_of_two_results_of_one_name_is_found_and_the_older_one_stays(service):
    first = service.made(prompt="a", seed=1, save_result_path="folder/same.mp4")
    service.made(prompt="a", seed=2, save_result_path="folder/same.mp4")

    assert service.call("GET", "/v1/files/download/folder/same.mp4")[2].startswith(b"2.")
    assert service.call("GET", f"/v1/tasks/{first['task_id']}/result")[2].startswith(b"1.")


def test_the_description_names_every_route_and_field_and_needs_nothing_from_elsewhere(service):
    _, document = service.get("/openapi.json")
    status, headers, page = service.call("GET", "/docs")

    posts = document["paths"]["/v1/tasks/video/"]["post"]
    assert posts["summary"] and "application/json" in posts["requestBody"]["content"]
    assert set(document["components"]["schemas"]["VideoTask"]["properties"]) == set(FIELDS)
    assert "/v1/files/download/{name}" in document["paths"]
    assert status == 200 and b"<script" not in page and b"https://" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert service.call("GET", "/")[0] == 302


def test_metrics_count_requests_steps_frames_and_failures(tmp_path):
    with Running(tmp_path) as service:
        service.made(prompt="a")
        service.made(prompt="refuse")
        service.server.service.metrics.read_gpus("0, 35, 1024, 81559\n1, [N/A], 7, 8")
        text = service.call("GET", "/metrics")[2].decode()

    for line in (
        'lightx2v_api_request_total{endpoint="/v1/tasks/video/",method="POST"} 2.0',
        'lightx2v_run_per_step_dit_duration_count{step_no="4",total_steps="4"} 1.0',
        "lightx2v_run_vae_decode_duration_sum 0.02",
        "lightx2v_frames_total 17.0",
        "lightx2v_worker_request_success_total 1.0",
        'lightx2v_worker_request_failure_total{error_type="RequestError"} 1.0',
        "lightx2v_task_queue_capacity 10.0",
        "lightx2v_workers_ready 1.0",
        'lightx2v_gpu_utilization_ratio{gpu="0"} 0.35',
        'lightx2v_gpu_memory_used_bytes{gpu="1"} 7.340032e+06',
    ):
        assert line in text, line
    assert 'utilization_ratio{gpu="1"}' not in text
    if Path("/proc/self/statm").exists():
        assert 'lightx2v_worker_resident_bytes{worker="0"}' in text
