"""The LoRA files on the experts of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .assemble import LoadedTransformer
from .checkpoint.detect import CheckpointInfo, detect
from .checkpoint.source import open_checkpoint
from .lora.apply import apply_loras
from .lora.identify import identify
from .lora.read import LoraFile, read_lora
from .lora.steps import Strengths, describe_strengths

Put = tuple[str, Strengths, CheckpointInfo]  # name, strength, what it is


class Adapters:
    def __init__(self, experts: Sequence[LoadedTransformer]) -> None:
        self._experts = experts
        self._files: dict[tuple[Path, int, int], LoraFile] = {}
        self._put: list[Put] = []

    @property
    def infos(self) -> list[CheckpointInfo]:
        return [info for _, _, info in self._put]

    @property
    def _sides(self) -> tuple[str | None, ...]:
        return ("high", "low") if len(self._experts) == 2 else (None,)

    def by_expert(self) -> list[list[Put]]:
        """For each expert the LoRAs that are on it."""
        return [
            [lora for lora in self._put if side is None or lora[2].expert in (None, side)]
            for side in self._sides
        ]

    def describe(self) -> list[list[str]]:
        """For each expert what a plan says of its LoRAs."""
        return [
            [f"{name} {describe_strengths(strengths)}" for name, strengths, _ in loras]
            for loras in self.by_expert()
        ]

    def put(
        self,
        files: Sequence[tuple[Path, Strengths]],
        merge: bool = False,
        experts: Sequence[str | None] = (),
    ) -> list[str]:
        """Put LoRA files on the experts, in place of those before; a line for each, and warnings.

        A strength is one number, or one for each step of the run (of both experts together). A
        file that says high or low noise goes to that expert of two; `experts` says it for each
        file in its place (high, low, or None for what the file says). `merge`: into the weights.
        """
        for expert in self._experts if merge else ():
            expert.residency.recall()  # merging changes blocks, which must be there
        loras = [(self._read(path), strengths) for path, strengths in files]
        told = experts or [None] * len(loras)
        made_for = [
            one or identify(lora).expert for (lora, _), one in zip(loras, told, strict=True)
        ]
        lines = []
        for side, expert in zip(self._sides, self._experts, strict=True):
            wanted = [
                lora
                for lora, one in zip(loras, made_for, strict=True)
                if side is None or one in (None, side)
            ]
            reports = apply_loras(expert.model, wanted, side or expert.info.expert, merge)
            prefix = f"{side} noise: " if side else ""
            for report in reports:
                lines.append(prefix + report.describe() + (", merged" if merge else ""))
                lines += [f"warning: {warning}" for warning in report.warnings]
        self._put = [
            (lora.name, strengths, replace(detect(open_checkpoint(lora.path)), expert=one))
            for (lora, strengths), one in zip(loras, made_for, strict=True)
        ]
        used = {id(lora) for lora, _ in loras}
        self._files = {k: v for k, v in self._files.items() if id(v) in used}
        return lines

    def _read(self, path: Path) -> LoraFile:
        """Files of the set before are not read again, so that trying strengths costs nothing."""
        if not path.is_file():
            return read_lora(path)
        facts = path.stat()
        key = (path, facts.st_mtime_ns, facts.st_size)
        if key not in self._files:
            self._files[key] = read_lora(path)
        return self._files[key]
