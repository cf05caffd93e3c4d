"""The shipped workflows in a running ComfyUI: converted by comfy-cli, validated, the demo run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest

pytestmark = pytest.mark.host

FOLDER = Path(__file__).parents[2] / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
DEMO = [name for name in WORKFLOWS if name.endswith("_demo")]
OTHERS = [name for name in WORKFLOWS if not name.endswith("_demo")]
DEMO_FILES = Path(__file__).parents[2] / "lightx2v_core/demo"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
FRONTEND_ONLY = {"MarkdownNote"}
DRAWN_WIDGETS = {"PreviewAny"}  # widgets that only the frontend knows

CONVERT = """
import json, sys
from comfy_cli.workflow_to_api import convert_ui_to_api
info, *graphs = (json.load(open(path)) for path in sys.argv[1:])
print(json.dumps([convert_ui_to_api(graph, info) for graph in graphs]))
"""


@pytest.fixture(scope="session")
def object_info(server, tmp_path_factory) -> Path:
    """/object_info of a server that has (empty) files under all names the workflows use."""
    for name in OTHERS:
        for node in json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["nodes"]:
            for model in node["properties"].get("models", []):
                folder = server.folder / "models" / model["directory"]
                folder.mkdir(exist_ok=True)
                (folder / model["name"]).touch()
    picture = server.folder / "input/example.png"
    if not picture.exists():
        write_picture(picture)
    path = tmp_path_factory.mktemp("info") / "object_info.json"
    path.write_bytes(server.get("/object_info"))
    return path


def write_picture(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48), (200, 40, 40)).save(path)


@pytest.fixture(scope="session")
def prompts(server, object_info) -> dict[str, dict]:
    """Every workflow in API form, by name."""
    done = subprocess.run(
        [
            server.python,
            "-c",
            CONVERT,
            object_info,
            *(FOLDER / f"{name}.json" for name in WORKFLOWS),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "No module named 'comfy_cli'" in done.stderr:
        pytest.skip("comfy-cli is not installed in this ComfyUI's environment")
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(WORKFLOWS, json.loads(done.stdout), strict=True))


def widget_count(about: dict, values: list) -> int:
    """How many values a node of this schema stores, given those it has (for dynamic choices)."""
    inputs = {**about["input"].get("required", {}), **about["input"].get("optional", {})}
    return _count(inputs, values)


def _count(inputs: dict, values: list) -> int:
    count = 0
    for spec in inputs.values():
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = next(o for o in options["options"] if o["key"] == values[count])
            nested = {
                **chosen["inputs"].get("required", {}),
                **chosen["inputs"].get("optional", {}),
            }
            count += 1 + _count(nested, values[count + 1 :])
        elif isinstance(kind, list) or kind in WIDGETS:
            count += (
                1 + bool(options.get("control_after_generate")) + bool(options.get("image_upload"))
            )
    return count


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_node_exists_with_as_many_widget_values_as_its_schema(server, object_info, name):
    info = json.loads(object_info.read_text("utf-8"))

    for node in json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["nodes"]:
        if node["type"] in FRONTEND_ONLY:
            continue
        values = node.get("widgets_values", [])
        assert node["type"] in info
        is_counted = node["type"] not in DRAWN_WIDGETS
        assert not is_counted or len(values) == widget_count(info[node["type"]], values), node
        sockets = {i["name"] for i in node["inputs"]}
        schema = info[node["type"]]["input"]
        assert sockets <= {*schema.get("required", {}), *schema.get("optional", {})}
        assert [o["type"] for o in node["outputs"]] == info[node["type"]]["output"], node["type"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_workflow_for_large_models_validates_and_stops_at_the_empty_file(server, prompts, name):
    run = server.run(prompts[name])  # a prompt that does not validate fails in here

    assert run.end == "execution_error"
    failed = run.data("execution_error")[0]
    assert "Load" in failed["node_type"], failed["exception_message"]


@pytest.mark.parametrize("name", DEMO)
def test_a_demo_workflow_runs_to_a_video(server, prompts, name):
    if not list(DEMO_FILES.glob("*.safetensors")):
        pytest.skip("the demo model is not in lightx2v_core/demo")

    run = server.run(prompts[name])

    assert run.end == "execution_success", run.events[-1]
    (saved,) = [out["images"][0] for out in run.outputs.values() if "images" in out]
    path = server.folder / "output" / saved["subfolder"] / saved["filename"]
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 17
