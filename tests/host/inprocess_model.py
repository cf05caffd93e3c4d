"""Our MODEL among native nodes, and native MODELs in our sampler, inside a real ComfyUI."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from inside import WORK, Heard, check, fill, host_nodes, main, pack, run, sentence

import comfy.model_management as mm
import torch
from small_files import write
from small_models import (
    AUTO,
    close,
    distill,
    image_cond,
    ksampler,
    mask,
    native,
    noise_free,
    ours,
    positive,
    states,
)


@check
def our_t2v_in_ksampler_equals_native_wan() -> str:
    return close(ksampler(ours()), ksampler(native()))


@check
def our_i2v_with_clip_in_ksampler_equals_native_wan() -> str:
    cond = image_cond(257)
    return close(ksampler(ours("i2v"), cond), ksampler(native("i2v"), cond))


@check
def our_flf2v_in_ksampler_equals_native_wan() -> str:
    cond = image_cond(514)
    return close(ksampler(ours("flf2v"), cond), ksampler(native("flf2v"), cond))


@check
def our_a14b_expert_in_ksampler_equals_native_wan() -> str:
    return close(ksampler(ours("a14b"), image_cond()), ksampler(native("a14b"), image_cond()))


@check
def cfg_and_batches_equal_native_wan() -> str:
    latent = torch.zeros(2, 16, 3, 8, 8)
    negative = [[states * 0.5, {}]]
    asked = {"cfg": 2.0, "negative": negative, "latent": latent, "steps": 2}
    return close(ksampler(ours(), **asked), ksampler(native(), **asked))


@check
def odd_latent_sides_are_padded_and_cropped_as_native() -> str:
    latent = torch.zeros(1, 16, 3, 7, 9)
    return close(
        ksampler(ours(), latent=latent, steps=2), ksampler(native(), latent=latent, steps=2)
    )


@check
def a_longer_prompt_is_cut_to_512_with_a_warning() -> None:
    long = [[torch.cat((states, states), dim=1), {}]]
    with Heard() as heard:
        cut = ksampler(ours(), long)
    assert torch.equal(cut, ksampler(ours()))
    assert any("1024 text tokens" in line for line in heard.lines), heard.lines


@check
def sampler_custom_advanced_equals_our_sampler_at_the_same_sigmas() -> str:
    from comfy_extras import nodes_custom_sampler as custom

    model = ours()
    sigmas = run("LightX2VDistillSigmas", schedule=AUTO, model=model)[0]

    def made(node: type, **inputs: object) -> object:
        if hasattr(node, "execute"):
            return node.execute(**inputs).args[0]
        return getattr(node(), node.FUNCTION)(**inputs)[0]

    out = made(
        custom.SamplerCustomAdvanced,
        noise=made(custom.RandomNoise, noise_seed=7),
        guider=made(custom.BasicGuider, model=model, conditioning=positive),
        sampler=made(custom.KSamplerSelect, sampler_name="euler"),
        sigmas=sigmas,
        latent_image={"samples": noise_free.clone()},
    )
    return close(distill(model)[0]["samples"], out["samples"])


@check
def a_half_precision_file_is_computed_in_float32_on_a_cpu() -> None:
    model = ours("half")
    assert model.model.diffusion_model.compute_dtype == torch.float32
    assert torch.isfinite(ksampler(model)).all()


@check
def a_named_attention_gives_the_same_result_as_the_hosts() -> str:
    return close(ksampler(ours(attention="sdpa")), ksampler(ours()))


@check
def an_attention_that_cannot_run_is_refused_with_the_reason() -> None:
    told = sentence(lambda: ours(attention="sage"))
    assert "attention 'sage' cannot run here" in told, told


@check
def native_unet_loader_model_runs_in_our_sampler_and_equals_ours() -> str:
    reference = host_nodes.UNETLoader().load_unet("native.safetensors", "default")[0]
    cond = [[torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(8)), {}]]
    theirs, plan = distill(reference, cond)
    assert "another loader's model" in plan
    return close(theirs["samples"], distill(ours("native"), cond)[0]["samples"])


@check
def two_experts_that_are_one_model_equal_one_model_bit_for_bit() -> None:
    model, again = ours("a14b"), ours("a14b")
    cond = image_cond()
    one, _ = distill(model, cond)
    two, plan = distill(model, cond, model_low_noise=again)
    assert torch.equal(one["samples"], two["samples"])
    assert "step 1-2, high noise" in plan and "step 3-4, low noise" in plan, plan


@check
def our_model_and_a_native_one_can_be_the_two_experts() -> str:
    cond = image_cond()
    mixed, _ = distill(ours("a14b"), cond, model_low_noise=native("a14b"))
    return close(mixed["samples"], distill(ours("a14b"), cond)[0]["samples"])


@check
def a_list_from_999_starts_from_plain_noise() -> None:
    model, seen = ours(), []

    def spy(execute: object, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(x.clone())
        return execute(x, *args, **kwargs)

    from comfy.patcher_extension import WrappersMP

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    steps = {"schedule": "list", "denoising_steps": "999, 750, 500, 250", "shift": 5.0}
    _, plan = distill(model, schedule=steps)
    noise = torch.randn(noise_free.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(seen[0].cpu(), noise)
    assert "0.9998" in plan


@check
def a_seed_means_the_same_twice_and_another_seed_something_else() -> None:
    model = ours()
    first, again, other = (distill(model, seed=s)[0]["samples"] for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@check
def renoise_runs_and_differs_from_euler() -> None:
    model = ours()
    assert not torch.equal(
        distill(model, solver="renoise")[0]["samples"], distill(model)[0]["samples"]
    )


@check
def a_noise_mask_keeps_what_it_covers() -> None:
    latent = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    keep = torch.ones(1, 1, 3, 8, 8)
    keep[:, :, 0] = 0.0
    out, _ = distill(ours(), latent={"samples": latent.clone(), "noise_mask": keep})
    torch.testing.assert_close(out["samples"][:, :, 0], latent[:, :, 0], rtol=1e-4, atol=1e-4)
    assert "noise_mask" in out


@check
def progress_counts_all_steps_of_both_experts_in_one_bar() -> None:
    import latent_preview

    seen, prepare = [], latent_preview.prepare_callback

    def recording(model: object, steps: int) -> object:
        report = prepare(model, steps)

        def callback(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            assert denoised.shape == x.shape == noise_free.shape
            seen.append((step, total))
            report(step, denoised, x, total)

        return callback

    latent_preview.prepare_callback = recording
    try:
        distill(ours("a14b"), image_cond(), model_low_noise=ours("a14b"))
    finally:
        latent_preview.prepare_callback = prepare
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)], seen


@check
def taesd_previews_of_our_model_come_through_the_hosts_tiny_decoder() -> str:
    """With lighttaew2_1 in vae_approx, the name that the latent format of Wan 2.1 asks for."""
    import comfy.taesd.taehv
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    tiny = pack("lightx2v_core.wan.tae")
    weights = fill(tiny.TinyVae(tiny.TinyConfig("lighttaew2_1"))).state_dict()
    write(WORK / "models/vae_approx/lighttaew2_1.safetensors", weights)
    taehv, shown, seen = comfy.taesd.taehv.TAEHV, [], []
    decode, method, hook = taehv.decode, args.preview_method, comfy.utils.PROGRESS_BAR_HOOK

    def recorded(self: object, x: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return decode(self, x, **options)

    def show(_value: int, _total: int, preview: tuple | None, **_: object) -> None:
        if preview is not None:
            shown.append(preview[1])

    plain = [distill(ours())[0]["samples"], ksampler(ours())]
    taehv.decode, args.preview_method = recorded, LatentPreviewMethod.TAESD
    comfy.utils.set_progress_bar_global_hook(show)
    try:
        with_previews = [distill(ours())[0]["samples"], ksampler(ours())]
    finally:
        taehv.decode, args.preview_method = decode, method
        comfy.utils.set_progress_bar_global_hook(hook)
    assert seen == [(1, 16, 1, 8, 8)] * 7, seen  # 4 steps of ours, 3 of KSampler
    assert [image.size for image in shown] == [(64, 64)] * 7
    assert len({image.tobytes() for image in shown[:4]}) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, with_previews, strict=True))
    return f"{len(shown)} previews"


@check
def diffusion_model_wrappers_run_as_often_as_on_native() -> str:
    from comfy.patcher_extension import WrappersMP

    counts = {}
    for kind in ("DIFFUSION_MODEL", "APPLY_MODEL", "OUTER_SAMPLE", "CALC_COND_BATCH"):
        for name, model in (("native", native()), ("ours", ours())):
            calls = []

            def wrap(execute: object, *args: object, **kwargs: object) -> object:
                calls.append(1)  # noqa: B023
                return execute(*args, **kwargs)

            model.add_wrapper_with_key(getattr(WrappersMP, kind), "t", wrap)
            ksampler(model)
            counts[kind, name] = len(calls)
        assert counts[kind, "ours"] == counts[kind, "native"] > 0, counts
    return str(sorted(counts.items()))


@check
def a_replaced_block_acts_as_on_native() -> str:
    def half(args: dict, extra: dict) -> dict:
        out = extra["original_block"](args)
        return {"img": 0.5 * (out["img"] + args["img"])}

    results = []
    for model in (native(), ours()):
        plain = ksampler(model)
        clone = model.clone()
        clone.set_model_patch_replace(half, "dit", "double_block", 1)
        results.append(ksampler(clone))
        assert not torch.equal(results[-1], plain)
        assert torch.equal(ksampler(model), plain)
    return close(results[1], results[0])


@check
def an_attention_override_is_called_as_often_as_on_native() -> str:
    counts = []
    for model in (native("i2v"), ours("i2v"), ours("i2v", attention="sdpa")):
        calls = []

        def override(attend: object, *args: object, **kwargs: object) -> torch.Tensor:
            calls.append(1)  # noqa: B023
            return attend(*args, **kwargs)

        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = override
        ksampler(clone, image_cond(257))
        counts.append(len(calls))
    assert counts[0] == counts[1] == counts[2] > 0, counts
    return str(counts)


@check
def what_another_pack_patches_in_vain_is_named_once() -> None:
    model = ours()
    model.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    model.set_model_rope_options(2.0, 0, 1, 0, 1, 0) if hasattr(
        model, "set_model_rope_options"
    ) else None
    with Heard() as heard:
        ksampler(model)
    told = [line for line in heard.lines if "does not honour" in line]
    assert len([line for line in told if "attn1_patch" in line]) == 1, told
    if hasattr(model, "set_model_rope_options"):
        assert len([line for line in told if "rope_options" in line]) == 1, told


@check
def an_interrupt_stops_between_two_blocks() -> None:
    model = ours()
    wanted = mm.InterruptProcessingException

    def stop(args: dict, extra: dict) -> dict:
        mm.interrupt_current_processing(True)
        return extra["original_block"](args)

    model.set_model_patch_replace(stop, "dit", "double_block", 0)
    told = sentence(lambda: distill(model))
    assert told.startswith(wanted.__name__), told


@check
def a_wrong_text_width_is_a_sentence_in_both_samplers() -> str:
    cond = [[torch.randn(1, 77, 768), {}]]
    for sampler in (ksampler, distill):
        told = sentence(lambda: sampler(ours(), cond))  # noqa: B023
        assert "RequestError: the conditioning is a CLIP-L encoding (768 wide)" in told, told
    return told


@check
def a_start_image_on_a_t2v_model_is_a_sentence_in_both_samplers() -> str:
    for sampler in (ksampler, distill):
        told = sentence(lambda: sampler(ours(), image_cond()))  # noqa: B023
        assert "text-to-video model and a start image is connected" in told, told
    return told


@check
def an_i2v_model_without_a_start_image_is_a_sentence() -> str:
    told = sentence(lambda: distill(ours("a14b")))
    assert "image-to-video model and no start image" in told, told
    return told


@check
def a_start_image_from_the_5b_vae_is_a_sentence() -> str:
    cond = [[states, {"concat_latent_image": torch.zeros(1, 48, 3, 4, 4), "concat_mask": mask}]]
    told = sentence(lambda: distill(ours("a14b"), cond))
    assert "wan2.2_vae (48 channels)" in told, told
    return told


@check
def a_48_channel_latent_and_a_picture_latent_are_sentences() -> str:
    for shape, words in (((1, 48, 3, 4, 4), "got 48"), ((1, 16, 8, 8), "a picture latent")):
        told = sentence(lambda: distill(ours(), latent={"samples": torch.ones(shape)}))  # noqa: B023
        assert words in told, told
    return told


@check
def cfg_without_a_negative_prompt_and_swapped_experts_are_sentences() -> str:
    told = sentence(lambda: distill(ours(), cfg=3.5))
    assert "CFG 3.5 needs a negative prompt" in told, told
    high, low = ours("high_noise_wan2.2"), ours("low_noise_wan2.2")
    told = sentence(lambda: distill(low, image_cond(), model_low_noise=high))
    assert "the two experts are swapped" in told, told
    distill(high, image_cond(), model_low_noise=low)
    return told


@check
def cfg_on_a_distilled_model_is_named_in_the_plan() -> None:
    _, plan = distill(ours(), cfg=3.5, negative=positive)
    assert "burns the picture" in plan, plan


@check
def a_latent_with_nan_stops_before_the_decoder() -> str:
    model = ours()
    model.model.diffusion_model.head.head.bias.data.fill_(float("nan"))
    told = sentence(lambda: distill(model))
    assert "not finite after step 1 of 4" in told, told
    return told


@check
def a_model_that_is_no_flow_model_is_a_sentence() -> str:
    model = ours()
    model.add_object_patch("model_sampling", torch.nn.Identity())
    told = sentence(lambda: distill(model))
    assert "not a flow-matching model" in told, told
    return told


if __name__ == "__main__":
    main()
