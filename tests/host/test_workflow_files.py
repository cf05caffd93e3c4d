"""The shipped workflows as files: form, links, names, and where their models come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
DEMO_PREFIX = "lightx2v_demo/"
MODEL_FOLDERS = {"diffusion_models", "text_encoders", "vae", "clip_vision", "loras"}
LOADERS = {
    "LightX2VLoadModel",
    "LightX2VLoadTextEncoder",
    "LightX2VLoadVae",
    "CLIPLoader",
    "CLIPVisionLoader",
}


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


@pytest.fixture(params=WORKFLOWS)
def workflow(request: pytest.FixtureRequest) -> dict:
    return load(request.param)


def test_every_user_story_has_its_workflow():
    assert set(WORKFLOWS) >= {
        "t2v_demo",
        "i2v_demo",
        "t2v_wan2.1_14b_4step",
        "i2v_wan2.1_14b_480p_4step",
        "i2v_wan2.2_a14b_4step",
    }


def test_the_form_is_0_4_with_unique_ids(workflow):
    node_ids = [node["id"] for node in workflow["nodes"]]
    link_ids = [link[0] for link in workflow["links"]]

    assert workflow["version"] == 0.4
    assert len(set(node_ids)) == len(node_ids)
    assert len(set(link_ids)) == len(link_ids)
    assert workflow["last_node_id"] == max(node_ids)
    assert workflow["last_link_id"] == max(link_ids)


def test_both_ends_of_every_link_know_it(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    known = set()

    for link_id, source, out_slot, target, in_slot, kind in workflow["links"]:
        output = nodes[source]["outputs"][out_slot]
        entry = nodes[target]["inputs"][in_slot]
        assert link_id in output["links"] and entry["link"] == link_id
        assert output["type"] == kind and entry["type"] in (kind, "*")
        known.add(link_id)

    used = {i["link"] for node in workflow["nodes"] for i in node["inputs"]} - {None}
    assert used == known


def test_every_node_names_the_pack_it_comes_from(workflow):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        ours = node["type"].startswith("LightX2V")
        assert node["properties"]["cnr_id"] == ("lightx2v-distill" if ours else "comfy-core")
        assert node["properties"]["Node name for S&R"] == node["type"]


def test_every_model_file_can_be_downloaded_or_is_shipped(workflow):
    for node in workflow["nodes"]:
        if node["type"] not in LOADERS:
            continue
        file = node["widgets_values"][0]
        if file.startswith(DEMO_PREFIX):
            continue
        (model,) = node["properties"]["models"]
        assert model["name"] == file
        assert model["directory"] in MODEL_FOLDERS
        assert model["url"].startswith("https://huggingface.co/")
        assert "/resolve/" in model["url"] and model["url"].endswith(f"/{file}")


def test_no_two_nodes_lie_on_each_other(workflow):
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in workflow["nodes"]]

    for i, (x, y, w, h, name) in enumerate(boxes):
        for x2, y2, w2, h2, other in boxes[i + 1 :]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
            assert apart, f"{name} overlaps {other}"


def test_every_workflow_explains_itself_and_ends_in_a_video(workflow):
    types = [node["type"] for node in workflow["nodes"]]

    assert types.count("MarkdownNote") == 1
    assert types.count("SaveVideo") == 1
    save = next(node for node in workflow["nodes"] if node["type"] == "SaveVideo")
    assert save["widgets_values"][1:] == ["auto", "auto"]
