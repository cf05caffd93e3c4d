"""The Chinese texts of the nodes beside their schemas; registered by inprocess_codecs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from inside import PACK, check, host_nodes

FOLDER = PACK / "locales/zh"
# Their choices are files on disk.
FILES = {"file", "lora"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# What the front end's translator (vue-i18n) would read as a placeholder, a plural or a link.
SYNTAX = re.compile(r"[{}|@]")


def schemas() -> dict:
    nodes = host_nodes.NODE_CLASS_MAPPINGS
    return {name: nodes[name].GET_SCHEMA() for name in nodes if name.startswith("LightX2V")}


def translated() -> dict:
    return json.loads((FOLDER / "nodeDefs.json").read_text("utf-8"))


def widgets(inputs: list, before: str = "") -> Iterator[tuple[str, object]]:
    """(key in the file, input), also of inputs that a choice brings; dots become underscores."""
    for one in inputs:
        yield f"{before}{one.id}", one
        if getattr(one, "control_after_generate", None):
            yield f"{before}control_after_generate", None
        for option in getattr(one, "options", None) or ():
            yield from widgets(getattr(option, "inputs", ()), f"{before}{one.id}_")


def texts(tree: object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    else:
        for value in tree.values():
            yield from texts(value)


@check
def every_node_input_output_and_choice_has_a_chinese_text_and_none_is_left_over() -> str:
    given, count = translated(), 0
    assert given.keys() == schemas().keys()
    for node_id, schema in schemas().items():
        node = given[node_id]
        assert node.keys() == {"display_name", "description", "inputs", "outputs"}, node_id
        wanted = dict(widgets(schema.inputs))
        assert node["inputs"].keys() == wanted.keys(), node_id
        for key, one in wanted.items():
            options = [] if one is None else getattr(one, "options", None) or []
            choices = {str(getattr(option, "key", option)) for option in options}
            told = node["inputs"][key]
            assert told["name"], (node_id, key)
            assert bool(told.get("tooltip")) == bool(getattr(one, "tooltip", "")), (node_id, key)
            assert told.get("options", {}).keys() == (choices if key not in FILES else set()), key
            count += 1
        assert list(node["outputs"]) == [str(i) for i in range(len(schema.outputs))], node_id
        for index, output in enumerate(schema.outputs):
            told = node["outputs"][str(index)]
            assert told["name"] and bool(told.get("tooltip")) == bool(output.tooltip), node_id
    return f"{len(given)} nodes, {count} inputs"


@check
def chinese_texts_are_chinese_and_hold_no_syntax_of_the_front_end() -> None:
    for node_id, node in translated().items():
        sentences = [node["display_name"], node["description"]]
        parts = [*node["inputs"].values(), *node["outputs"].values()]
        sentences += [part["tooltip"] for part in parts if "tooltip" in part]
        assert all(CHINESE.search(sentence) for sentence in sentences), node_id
        assert node["display_name"].endswith("(LightX2V)")
        assert not [text for text in texts(node) if SYNTAX.search(text)], node_id


@check
def every_node_has_a_chinese_help_page_that_names_all_its_inputs() -> str:
    pages = sorted((PACK / "web/docs").glob("*/zh.md"))
    assert {page.parent.name for page in pages} == schemas().keys()
    for page in pages:
        text, schema = page.read_text("utf-8"), schemas()[page.parent.name]
        missing = [one.id for one in schema.inputs if one.id not in text]
        assert not missing, (page.parent.name, missing)
        assert CHINESE.search(text)
    return f"{len(pages)} pages"
