"""The exceptions this package raises on purpose, and how keys are shown in their messages.

LightX2VError
├── RequestError      what was asked for does not fit the model (sizes, frames, schedule)
├── CheckpointError   a file is not what it should be, or not whole
├── CapabilityError   this machine or this version cannot do it
└── StoppedError      whoever asked for it wants it no more

A message says what was found, what is needed and what to do, in that order.
"""

from __future__ import annotations

from collections.abc import Iterable


class LightX2VError(Exception):
    """Every error whose message is meant for the person at the screen."""

    # ComfyUI's frontend puts module and name before the sentence, and its module for a pack is the
    # path of a folder.
    __module__ = "lightx2v"

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        cls.__module__ = "lightx2v"


class RequestError(LightX2VError):
    """The request does not fit the model."""


class CheckpointError(LightX2VError):
    """A file cannot be used as what it was given for."""


class CapabilityError(LightX2VError):
    """This machine, or this version, cannot do what was asked by name."""


class StoppedError(LightX2VError):
    """Work ends early because it was told to; raised by callbacks, between blocks or steps."""


def preview(names: Iterable[str], shown: int = 3) -> str:
    """At most three names and the count of the rest, for messages."""
    names = sorted(names)
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
