"""Faults inside a real ComfyUI: survived, or said with what is kept; registered by
inprocess_memory."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from inside import DEVICE, WORK, Heard, check, host_nodes, pack, run, sentence

import comfy.model_management as mm
import comfy.model_patcher
import torch
from graph_runs import Queue, image_to_video, text_to_video
from small_card import SmallCard, failing
from small_codecs import LATENT, our_vae
from small_files import write
from small_models import FILES, distill, ksampler, ours, shifted, with_lora

SIZE = sum(t.nbytes for t in FILES["t2v"].values())


@check
def out_of_memory_while_loading_costs_an_attempt_and_no_bit() -> str:
    model = ours()
    whole = ksampler(model)
    mm.unload_all_models()
    engine = model.model.engine
    engine.place = failing(engine.place, 1, 1)
    with Heard() as heard:
        assert torch.equal(ksampler(model), whole)
    del engine.place
    assert engine.resident < 2, engine.describe()
    told = [line for line in heard.lines if "once more with fewer blocks" in line]
    assert len(told) == 1, heard.lines
    return told[0]


@check
def out_of_memory_twice_tells_the_cheapest_changes_where_the_host_shows_the_error() -> str:
    """`exception_message` is what both hosts show in the dialog and beside the node."""
    queue = Queue()
    core = pack("lightx2v_core.wan.model").WanModel
    forward = core.forward
    core.forward = failing(forward, 3, 2)
    try:
        told = sentence(lambda: queue.run(text_to_video()))
    finally:
        core.forward = forward
    for words in ("tried to allocate 2 GiB", "1 frames in place of 5", "GB are there"):
        assert words in told, told
    assert "you ran out of memory" in told, "the host's own tip: it knows the error"
    left = [entry for entry in mm.current_loaded_models if entry.device == DEVICE]
    assert not left, "the host knows its error and unloads everything"
    assert queue.run(text_to_video()).shape[0] == 5
    return told


class Greedy:
    """Another model that takes the whole card in the middle of a run.

    A `dynamic` one (faked: on a CPU no host makes any) is what 0.18.1 has on NVIDIA cards. The call
    is the one `load_models_gpu` makes for every device but a CPU.
    """

    def __init__(self, dynamic: bool = False) -> None:
        cpu = torch.device("cpu")
        self.model = comfy.model_patcher.ModelPatcher(torch.nn.Linear(64, 64), DEVICE, cpu)
        self.model.is_dynamic = lambda: dynamic
        self.dynamic = {"for_dynamic": True} if dynamic and hasattr(mm, "is_oom") else {}

    def take_all(self) -> None:
        mm.free_memory(1e12, DEVICE, [], **self.dynamic)
        mm.load_models_gpu([self.model])


def robbed(sample: Callable, model: object, greedy: Greedy, at: int) -> tuple[torch.Tensor, list]:
    """`sample(model)`, and what the card held at each forward; `greedy` comes after step `at`."""
    held = []

    def wrapper(apply: Callable, args: dict) -> torch.Tensor:
        result = apply(args["input"], args["timestep"], **args["c"])
        held.append(model.loaded_size())
        if len(held) == at:
            greedy.take_all()
            held.append(model.loaded_size())
        return result

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return sample(clone), held


@check
def a_model_that_takes_the_whole_card_between_two_steps_changes_no_bit() -> str:
    seen = {}
    for kind, dynamic in (("plain", False), ("dynamic", True)):
        for name, sample in (("ours", lambda m: distill(m)[0]["samples"]), ("native", ksampler)):
            model = shifted(with_lora(ours()))
            model.model.memory_required = lambda *a, **k: 0
            whole = sample(model)
            with SmallCard(SIZE * 2.0):
                result, held = robbed(sample, model, Greedy(dynamic), 2)
                assert torch.equal(result, whole), (kind, name)
                assert held[2] == 0 and min(held[:2] + held[3:]) > 0, held
                assert any(entry.model.is_clone(model) for entry in mm.current_loaded_models)
            seen[f"{kind}, {name}"] = held
    return str(seen)


@check
def in_comfyuis_own_memory_clones_and_evictions_change_no_bit() -> None:
    model = ours(memory="comfyui")
    changed = with_lora(model)
    plain, lora = ksampler(model), ksampler(changed)
    assert not torch.equal(plain, lora)
    assert torch.equal(ksampler(model), plain) and torch.equal(ksampler(changed), lora)
    mm.unload_all_models()
    assert torch.equal(ksampler(changed), lora) and torch.equal(ksampler(model), plain)
    with SmallCard(SIZE * 0.5):
        for asked, expected in ((changed, lora), (model, plain)):
            result, held = robbed(ksampler, asked, Greedy(), 2)
            assert torch.equal(result, expected)
            assert held[0] > held[2], held


def stop_at(module: torch.nn.Module) -> object:
    """Somebody presses Stop while `module` runs for the first time."""

    def hook(*_call: object) -> None:
        handle.remove()
        mm.interrupt_current_processing(True)

    handle = module.register_forward_pre_hook(hook)
    return handle


@check
def stop_is_heard_in_every_stage_and_pressing_run_again_ends_in_the_same_video() -> str:
    graph, queue, made = image_to_video(), Queue(), {}
    catch_outputs(made)
    try:
        whole = queue.run(graph)
    finally:
        release_outputs()
    stages = {
        "prompt": ("positive", made["clip"].cond_stage_model.blocks[0]),
        "start image": ("latent", made["vae"].first_stage_model.core.conv1),
        "step": ("sampler", made["model"].model.diffusion_model.blocks[0]),
        "low noise": ("sampler", made["low"].model.diffusion_model.blocks[1]),
        "decode": ("decode", made["vae"].first_stage_model.core.conv2),
    }
    pack("nodes.encode").ENCODED.clear()  # as after another picture
    graph["positive"]["inputs"]["text"] += "  "  # the same words, and another entry of the cache
    for stage, (node, module) in stages.items():
        stop_at(module)
        queue.sent.clear()
        queue.executor.execute(graph, "stopped", {"client_id": "test"}, ["keep"])
        ends = [d["node_id"] for e, d in queue.sent if e == "execution_interrupted"]
        assert ends == [node], (stage, queue.sent[-3:])
    assert torch.equal(queue.run(graph), whole)
    return ", ".join(stages)


LOADERS = {
    "LightX2VLoadModel": {"high_noise_wan2.2.safetensors": "model", "": "low"},
    "LightX2VLoadTextEncoder": {"": "clip"},
    "LightX2VLoadVae": {"": "vae"},
}
PLAIN = {}


def catch_outputs(made: dict) -> None:
    """What the loaders give, by the name of the node in the graph."""
    for kind, names in LOADERS.items():
        cls = host_nodes.NODE_CLASS_MAPPINGS[kind]
        PLAIN[kind] = cls.__dict__["execute"]

        def execute(inner: type, file: str, names: dict = names, kind: str = kind, **rest: str):
            output = PLAIN[kind].__func__(inner, file, **rest)
            made[names.get(file, names[""])] = output.result[0]
            return output

        cls.execute = classmethod(execute)


def release_outputs() -> None:
    for kind, execute in PLAIN.items():
        host_nodes.NODE_CLASS_MAPPINGS[kind].execute = execute


@check
def a_file_replaced_or_cut_short_under_a_loaded_model_is_a_sentence() -> str:
    path = WORK / "models/diffusion_models/replaced.safetensors"
    write(path, FILES["t2v"])
    model = ours("replaced")
    whole = ksampler(model)
    assert torch.equal(ksampler(model), whole)
    os.truncate(path, 100_000)
    told = [sentence(lambda: ksampler(model))]
    mm.unload_all_models()
    told.append(sentence(lambda: ksampler(model)))
    path.unlink()
    told.append(sentence(lambda: ksampler(model)))
    write(path, FILES["t2v"])
    assert torch.equal(ksampler(ours("replaced")), whole)
    assert all("replaced.safetensors was changed on disk" in line for line in told[:2]), told
    assert "is gone" in told[2], told
    return told[0]


@check
def a_latent_that_no_disk_takes_stays_in_memory_and_the_message_says_so() -> str:
    vae = our_vae()
    vae.first_stage_model.decode = failing(None, 1, 99)
    blocked = WORK / "output" / "latents"
    moved, real = blocked.with_name("moved"), tempfile.tempdir
    if blocked.exists():
        blocked.rename(moved)
    blocked.write_text("a file where the folder should be")
    tempfile.tempdir = str(blocked)
    try:
        told = sentence(lambda: run("LightX2VDecodeVideo", latent=LATENT, vae=vae))
    finally:
        tempfile.tempdir = real
        blocked.unlink()
        if moved.exists():
            moved.rename(blocked)
    assert "could not be saved either" in told and "still in ComfyUI's memory" in told, told
    assert not list(Path(WORK / "output").rglob("*.part"))
    return told
