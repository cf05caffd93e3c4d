"""ComfyUI's memory calls mapped onto the core's residency engine, which gives true byte counts.

Clones share one module: what is loaded (engine, branches, backups) lives on the module or in dicts
that clones share; a patcher itself holds only what it wants loaded. The module is never moved as a
whole, so weights cannot end up on two devices.
"""

from __future__ import annotations

import logging

import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from ..lightx2v_core.memory.plan import is_ram_short, place_or_less
from ..lightx2v_core.memory.residency import Residency
from .adapt import refuse_quantised, sort_patches
from .strengths import empty_branches, fill_branches, refuse_changing, refuse_mixed

log = logging.getLogger(__name__)


class ResidentPatcher(comfy.model_patcher.ModelPatcher):
    """For a module with an attribute `engine`; LoRA goes into the branch slots of its linears."""

    @property
    def engine(self) -> Residency:
        return self.model.engine

    def model_size(self) -> int:
        """All weights and LoRA, also the LoRA that the next load will bring."""
        if self._is_applied():
            return self.engine.total_bytes
        branches, _ = sort_patches(self.model, self.patches)
        return self.engine.total_bytes + sum(b.nbytes for made in branches.values() for b in made)

    def loaded_size(self) -> int:
        return self.engine.loaded_bytes

    def get_ram_usage(self) -> int:
        return self.model_size() + self.engine.pinned_bytes

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        everything = full_load or lowvram_model_memory == 0
        with self.use_ejected():
            self.unpatch_hooks()
            self._apply_patches(merge=force_patch_weights)
            device = device_to or self.load_device
            place_or_less(self.engine, device, None if everything else lowvram_model_memory)
            self.model.device = device
            self._note_loaded()
            log.info("%s: %s", type(self.model).__name__, self.engine.describe())
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        before = self.loaded_size()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            # Object patches of the clone that was here before, then ours.
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            if extra_memory < 0:
                self.partially_unload(self.offload_device, -extra_memory)
            try:
                self.load(device_to, max(before + extra_memory, 1), force_patch_weights)
            except BaseException:
                self.detach()
                raise
        return max(self.loaded_size() - before, 0)

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        freed = self.engine.shrink(memory_to_free)
        self._note_loaded()
        return freed

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True
    ) -> None:
        if unpatch_weights:
            empty_branches(self)
            self.engine.release(keep_pinned=not is_ram_short(self.engine.pinned_bytes))
        super().unpatch_model(None, unpatch_weights)  # None: the host must not move the module
        if unpatch_weights:
            self.model.device = self.offload_device

    def partially_unload_ram(self, ram_to_unload: float) -> None:
        self.engine.unpin(ram_to_unload)

    def patch_weight_to_device(
        self, key: str, device_to: torch.device | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor | None:
        if key in self.patches:
            refuse_quantised(self.model, key, "this LoRA or merge")
        return super().patch_weight_to_device(key, device_to, *args, **kwargs)

    def add_hook_patches(
        self, hook: object, patches: dict, *args: object, **kwargs: object
    ) -> list:
        refuse_changing(self.patches, "a weight hook")
        known = self.model.state_dict().keys()
        for key in (k if isinstance(k, str) else k[0] for k in patches):
            if key in known:
                refuse_quantised(self.model, key, "a weight hook")
        return super().add_hook_patches(hook, patches, *args, **kwargs)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        refuse_changing(self.patches, "merging or saving")
        found = super().get_key_patches(filter_prefix)
        for key in found:
            refuse_quantised(self.model, key, "merging or saving")
        return found

    def state_dict_for_saving(self, *args: object, **kwargs: object) -> dict:
        """Newer hosts save this: the LoRA must be in the weights. The next load takes it out."""
        self._apply_patches(merge=True)
        return super().state_dict_for_saving(*args, **kwargs)

    def _is_applied(self) -> bool:
        return self.model.current_weight_patches_uuid == self.patches_uuid

    def _note_loaded(self) -> None:
        self.model.model_lowvram = False
        self.model.model_loaded_weight_memory = self.loaded_size()

    def _apply_patches(self, merge: bool) -> None:
        if self._is_applied() and not merge:
            return
        branches, in_place = sort_patches(self.model, self.patches, merge)
        refuse_mixed(self.patches, in_place)
        # Patched weights become the homes that those on the card return to.
        changed = {*self.backup, *in_place}
        self.engine.lift(comfy.utils.get_attr(self.model, key) for key in changed)
        for key, backup in self.backup.items():
            comfy.utils.set_attr_param(self.model, key, backup.weight)
        self.backup.clear()
        for key in in_place:
            self.patch_weight_to_device(key)
        fill_branches(self, branches, in_place)
        self.model.current_weight_patches_uuid = None if merge else self.patches_uuid
