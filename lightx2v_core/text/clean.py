"""Cleans a prompt the way Wan's own pipeline does before it is tokenised."""

from __future__ import annotations

import html
import re
from importlib.util import find_spec

_WHITESPACE = re.compile(r"\s+")


def clean_prompt(text: str) -> str:
    """Unescape HTML twice, then one space for every run of whitespace and none at the ends.

    Broken Unicode is repaired first when the optional package ftfy is installed; without it that
    step is left out, which only matters for prompts that hold mojibake or curly quotes.
    """
    if find_spec("ftfy") is not None:
        import ftfy

        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    return _WHITESPACE.sub(" ", text).strip()
