"""Plans, guards, sizes and what other nodes patch, on our MODEL inside a real ComfyUI."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))
from inside import Heard, check, main, node, pack, run, sentence

import comfy.model_management as mm
import attention_checks  # noqa: F401 - registers its checks
import message_checks  # noqa: F401 - registers its checks
import torch
from small_models import (
    VARIANTS,
    close,
    distill,
    image_cond,
    ksampler,
    native,
    ours,
    positive,
    states,
    with_lora,
)

negative = [[states * 0.5, {}]]


def host_node(name: str, **inputs: object) -> object:
    """The first output of one of ComfyUI's own nodes, V1 or V3."""
    from comfy_extras import nodes_easycache, nodes_slg, nodes_torch_compile

    modules = (nodes_easycache, nodes_slg, nodes_torch_compile)
    kind = next(getattr(m, name) for m in modules if hasattr(m, name))
    if hasattr(kind, "execute"):
        return kind.execute(**inputs).args[0]
    return getattr(kind(), kind.FUNCTION)(**inputs)[0]


def forwards(model: object, action: object) -> int:
    calls = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    action()
    handle.remove()
    return len(calls)


def complaints(heard: Heard) -> list[str]:
    return [line for line in heard.lines if "another pack" in line]


@check
def auto_fills_everything_and_the_plan_says_seconds_and_loras() -> str:
    _, plan = distill(with_lora(ours()), solver="auto", cfg=0.0)
    first, stage = plan.splitlines()[:2]
    assert first.startswith("4 steps, euler, CFG off"), plan
    assert "timesteps 1000.0, 937.5, 833.3, 625.0" in stage, plan
    assert "a LoRA of another loader 0.7" in stage and stage.endswith(" s"), plan
    return plan


@check
def a_dry_run_shows_the_plan_and_samples_nothing() -> None:
    model, made = ours(), []
    count = forwards(model, lambda: made.extend(distill(model, dry_run=True)))
    assert count == 0 and not made[0]["samples"].any()
    assert made[1].startswith("dry run") and "sigma 1.0000" in made[1], made[1]


@check
def each_setting_outside_the_envelope_is_one_warning_and_strict_makes_it_an_error() -> str:
    steps = {"schedule": "steps", "steps": 2, "shift": 5.0}
    asked = (
        ("cfg", {"cfg": 3.5, "negative": negative}),
        ("steps", {"schedule": steps}),
        ("shift", {"shifts": "8, 8, 5, 5"}),
        ("frames", {"latent": {"samples": torch.zeros(1, 16, 22, 2, 2)}}),
    )
    for name, changes in asked:
        _, plan = distill(ours(), dry_run=True, **changes)
        assert plan.count(f"warning: {name}: ") == 1, plan
        told = sentence(lambda: distill(ours(), strict=True, **changes))  # noqa: B023
        assert f"RequestError: strict is on: {name}: " in told, told
    return plan


@check
def guidance_by_step_calls_the_model_twice_only_where_it_is_on() -> None:
    model = ours()
    asked = {"cfgs": "3.5, 1, 1, 1", "negative": negative}
    # Both conditions of a step go through one forward as a batch of two.
    seen, whole = [], model.model.diffusion_model
    hook = whole.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[0]))
    _, plan = distill(model, **asked)
    hook.remove()
    assert seen == [2, 1, 1, 1], seen
    assert "CFG 3.5, 1, 1, 1" in plan, plan
    told = sentence(lambda: distill(model, cfgs="3.5, 1", negative=negative))
    assert "2 CFG values are given and the run has 4 steps" in told, told


@check
def a_third_model_for_motion_equals_lora_strengths_by_step_bit_for_bit() -> str:
    """base_steps 1: the first trained step by the bare model at CFG 3.5."""
    bare = ours()
    distilled = run("LightX2VApplyLora", model=bare, lora="small.safetensors", strength=1.0)[0]
    by_step = run(
        "LightX2VApplyLora",
        **{"model": bare, "lora": "small.safetensors", "strength": 1.0},
        strengths="0, 1, 1, 1",
    )[0]
    three, plan = distill(distilled, model_base=bare, base_steps=1, negative=negative)
    lists, _ = distill(by_step, cfgs="3.5, 1, 1, 1", negative=negative)
    assert torch.equal(three["samples"], lists["samples"])
    assert "step 1, not distilled: sigma 1.0000 → 0.9375" in plan, plan
    assert "warning: cfg" not in plan, plan
    _, plan = distill(distilled, model_base=bare, negative=negative, dry_run=True)
    assert "step 1-5, not distilled" in plan and "step 6-8, distilled" in plan, plan
    return plan


@check
def base_high_and_low_are_three_stages_with_one_bar() -> None:
    high, low, cond = ours("a14b"), ours("a14b"), image_cond()
    _, plan = distill(
        high, cond, model_low_noise=low, model_base=high, base_steps=2, negative=image_cond()
    )
    stages = [line.split(":")[0].strip() for line in plan.splitlines()[1:4]]
    assert stages == ["step 1-2, not distilled", "step 3, high noise", "step 4-5, low noise"], plan
    told = sentence(
        lambda: distill(
            high,
            cond,
            **{"model_low_noise": low, "model_base": high, "negative": cond},
            split={"split": "by step", "high_steps": 1},
        )
    )
    assert "only step of the distilled high-noise expert" in told, told


@check
def an_item_of_a_batch_is_that_of_its_own_seed() -> str:
    for solver in ("euler", "renoise"):
        batch, _ = distill(
            ours(), seed=40, solver=solver, latent={"samples": torch.zeros(3, 16, 3, 4, 4)}
        )
        for item in range(3):
            alone, _ = distill(
                ours(),
                seed=40 + item,
                solver=solver,
                latent={"samples": torch.zeros(1, 16, 3, 4, 4)},
            )
            told = close(batch["samples"][item : item + 1], alone["samples"])
    picked = {"samples": torch.zeros(1, 16, 3, 4, 4), "batch_index": [2]}
    again, _ = distill(ours(), seed=40, solver="renoise", latent=picked)
    assert torch.equal(again["samples"], alone["samples"])
    return told


@check
def an_attention_that_gives_nan_is_named_and_computed_again_plainly() -> str:
    def broken(attend: object, *args: object, **kwargs: object) -> torch.Tensor:
        return attend(*args, **kwargs) * float("nan")

    results = []
    for model in (ours(), native()):
        patched = model.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = broken
        with Heard() as heard:
            results.append(distill(patched)[0]["samples"])
        told = [line for line in heard.lines if "once more with the plain rows" in line]
        assert len(told) == 1 and "after step 1 of 4" in told[0], told
        assert "an attention override of another pack" in told[0], told
        close(results[-1], distill(model)[0]["samples"])
    return told[0]


@check
def a_latent_that_stays_broken_names_what_computed_it_and_is_not_decoded() -> str:
    model = ours(attention="comfyui")
    model.model.diffusion_model.head.head.bias.data.fill_(float("nan"))
    told = sentence(lambda: distill(model))
    assert "not finite after step 1 of 4" in told and "of ComfyUI" in told, told
    return told


@check
def a_flat_latent_is_refused_like_nan() -> str:
    model = ours()

    def flat(execute: object, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return torch.zeros_like(execute(x, *args, **kwargs))

    from comfy.patcher_extension import WrappersMP

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "flat", flat)
    told = sentence(lambda: distill(model))
    assert "without any variation after step 1" in told, told
    return told


@check
def an_interrupt_stops_within_a_block_in_native_samplers_too() -> None:
    for sampler in (ksampler, distill):
        model, seen = ours(), []

        def stop(args: dict, extra: dict) -> dict:
            seen.append(1)  # noqa: B023
            mm.interrupt_current_processing(True)
            return extra["original_block"](args)

        model.set_model_patch_replace(stop, "dit", "double_block", 0)
        told = sentence(lambda: sampler(model))  # noqa: B023
        assert told.startswith("InterruptProcessingException") and len(seen) == 1, (told, seen)


PAIRINGS = {
    # model: conditioning -> words of the refusal, or nothing
    "t2v": {"text": "", "picture": "text-to-video model and a start", "5b": "text-to-video"},
    "a14b": {"text": "no start image", "picture": "", "5b": "wan2.2_vae (48 channels)"},
    "i2v": {"text": "no start image", "picture": "", "two": "this model takes one picture"},
    "flf2v": {"text": "no start image", "picture": "", "one": "takes a first and a last picture"},
}


@check
def every_wrong_pairing_is_refused_from_shapes_alone() -> str:
    """All tensors are on the meta device: nothing can have been computed."""
    checks = pack("nodes.checks")

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    def condition(kind: str) -> list:
        channels = {"picture": 16, "one": 16, "two": 16, "5b": 48}
        extra = {}
        if kind in channels:
            extra["concat_latent_image"] = meta(1, channels[kind], 3, 8, 8)
        tokens = {"one": 257, "two": 514}
        if kind in tokens:
            extra["clip_vision_output"] = SimpleNamespace(
                penultimate_hidden_states=meta(1, tokens[kind], 1280)
            )
        return [[meta(1, 512, 64), extra]]

    told = ""
    for name, kinds in PAIRINGS.items():
        config = VARIANTS[name]
        model = SimpleNamespace(
            latent_format=SimpleNamespace(latent_channels=16),
            diffusion_model=SimpleNamespace(
                config=config,
                patch_embedding=SimpleNamespace(weight=meta(256, config.in_dim, 1, 2, 2)),
            ),
        )
        for kind, words in kinds.items():

            def ask(model: object = model, kind: str = kind) -> None:
                latent = torch.zeros(1, 16, 3, 8, 8)
                checks.check_request(model, condition(kind), latent)

            if words:
                told = sentence(ask)
                assert words in told, (name, kind, told)
            else:
                ask()
        wide = [[meta(1, 77, 768), {}]]
        told = sentence(lambda: checks.check_request(model, wide, torch.zeros(1, 16, 3, 8, 8)))  # noqa: B023
        assert "CLIP-L encoding" in told, told
    return told


@check
def a_latent_of_another_size_than_its_start_image_is_refused() -> str:
    latent = {"samples": torch.zeros(1, 16, 4, 8, 8)}
    told = sentence(lambda: distill(ours("a14b"), image_cond(), latent=latent))
    assert "start image is for 64x64, 9 frames and the latent for 64x64, 13 frames" in told, told
    return told


@check
def any_size_and_length_comes_back_exactly() -> None:
    vae = SimpleNamespace(
        latent_channels=16,
        decode=lambda z: torch.zeros(1, z.shape[2] * 4 - 3, z.shape[3] * 8, z.shape[4] * 8, 3),
    )
    for width, height, frames in ((1, 1, 1), (15, 17, 2), (33, 40, 6), (64, 48, 5)):
        for fit in ("crop", "pad"):
            latent = run(
                "LightX2VEmptyVideoLatent", width=width, height=height, frames=frames, fit=fit
            )[0]
            images = run("LightX2VDecodeVideo", latent=latent, vae=vae)[0]
            assert images.shape == (frames, height, width, 3), (images.shape, fit)
    with Heard() as heard:
        even = run("LightX2VDecodeVideo", latent=latent, vae=vae, even_sides=True)[0]
    assert even.shape == (5, 48, 64, 3)
    latent = run("LightX2VEmptyVideoLatent", width=31, height=17, frames=4)[0]
    with Heard() as heard:
        even = run("LightX2VDecodeVideo", latent=latent, vae=vae, even_sides=True)[0]
    assert even.shape == (4, 18, 32, 3)
    assert any("31x17 has an odd side, padded to 32x18" in line for line in heard.lines), (
        heard.lines
    )


@check
def motion_changes_what_is_not_given_and_one_changes_nothing() -> None:
    rng = torch.Generator().manual_seed(3)

    class Vae:
        latent_channels, latent_dim, first_stage_model = 16, 3, None

        def encode(self, clip: torch.Tensor) -> torch.Tensor:
            assert clip.shape == (9, 64, 64, 3)
            return 20 * torch.randn(1, 16, 3, 8, 8, generator=rng.manual_seed(3))

    made = {}
    for motion in (None, 1.0, 1.3):
        more = {} if motion is None else {"motion": motion}
        out = run(
            "LightX2VImageToVideo",
            **{"positive": positive, "vae": Vae(), "width": 64, "height": 64, "frames": 9},
            **{"start_image": torch.rand(5, 20, 40, 3), "image_fit": "pad", **more},
        )
        made[motion] = out[0][0][1]["concat_latent_image"]
    assert torch.equal(made[None], made[1.0])
    assert torch.equal(made[1.3][:, :, :2], made[1.0][:, :, :2])
    assert made[1.3][:, :, 2].abs().max() == 6.0 < made[1.0][:, :, 2].abs().max()


@check
def easycache_skips_the_same_steps_as_on_native_and_is_warned_of() -> str:
    for name in ("EasyCacheNode", "LazyCacheNode"):
        results = []
        for model in (native(), ours()):
            cached = host_node(
                name,
                **{"model": model, "reuse_threshold": 3.0, "start_percent": 0.0},
                **{"end_percent": 1.0, "verbose": False},
            )
            with Heard() as heard:
                results.append(ksampler(cached, steps=6))
            skipped = [line for line in heard.lines if "steps (" in line]
            assert skipped and "skipped 0/" not in skipped[0], heard.lines
            assert not complaints(heard), heard.lines
        told = close(results[1], results[0])
        _, plan = distill(cached, dry_run=True)
        assert "warning: caching: " in plan and name.removesuffix("Node") in plan, plan
    return f"{told}; {skipped[0]}"


@check
def skip_layer_guidance_acts_as_on_native_and_names_layers_that_are_not_there() -> str:
    at = {"start_percent": 0.0, "end_percent": 1.0, "single_layers": "7, 8, 9"}
    told = []
    for name, scale in (
        ("SkipLayerGuidanceDiT", {"scale": 3.0}),
        ("SkipLayerGuidanceDiTSimple", {}),
    ):
        results = []
        for model in (native(), ours()):
            guided = host_node(name, model=model, double_layers="1", **scale, **at)
            with Heard() as heard:
                results.append(ksampler(guided, cfg=2.0, negative=negative, steps=2))
            assert not torch.equal(
                results[-1], ksampler(model, cfg=2.0, negative=negative, steps=2)
            )
            assert not complaints(heard), heard.lines
        told.append(close(results[1], results[0]))
        nothing = host_node(name, model=ours(), double_layers="7, 8, 9", **scale, **at)
        with Heard() as heard:
            ksampler(nothing, cfg=2.0, negative=negative, steps=2)
        assert any("double_block 7 of 2" in line for line in complaints(heard)), heard.lines
    return str(told)


@check
def a_replaced_forward_is_named_once() -> None:
    model = ours()
    attention = model.model.diffusion_model.blocks[0].cross_attn
    model.add_object_patch("diffusion_model.blocks.0.cross_attn.forward", attention.forward)
    with Heard() as heard:
        patched = ksampler(model)
    named = [line for line in complaints(heard) if "blocks.0.cross_attn" in line]
    assert len(named) == 1, heard.lines
    assert torch.equal(patched, ksampler(ours()))


@check
def torch_compile_of_the_hosts_node_gives_the_same_result() -> str:
    """What the node puts around the module is there; compiling itself takes half a minute here."""
    real, calls = torch.compile, []

    class Compiled(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def __getattr__(self, name: str) -> object:
            module = super().__getattr__("_orig_mod")
            return module if name == "_orig_mod" else getattr(module, name)

        def forward(self, *args: object, **kwargs: object) -> object:
            calls.append(1)
            return self._orig_mod(*args, **kwargs)

    torch.compile = lambda model, **_: Compiled(model)
    try:
        compiled = host_node("TorchCompileModel", model=ours(), backend="inductor")
    finally:
        torch.compile = real
    with Heard() as heard:
        results = [ksampler(compiled, steps=2), distill(compiled)[0]["samples"]]
    assert len(calls) == 6, calls
    assert not complaints(heard), heard.lines
    close(results[1], distill(ours())[0]["samples"])
    return close(results[0], ksampler(ours(), steps=2))


assert node("LightX2VDistillSampler"), "the pack is loaded"

if __name__ == "__main__":
    main()
