"""Cleaning of prompts."""

from __future__ import annotations

import importlib.util

import pytest

from lightx2v_core.text import clean
from lightx2v_core.text.clean import clean_prompt


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a  red\n\tfox ", "a red fox"),
        ("tom &amp;amp; jerry", "tom & jerry"),
        ("红色的\u3000狐狸", "红色的 狐狸"),
        ("&lt;b&gt; &#x1F525;", "<b> 🔥"),
        (" \n", ""),
        ("", ""),
    ],
)
def test_prompt_loses_html_and_spare_whitespace(raw, cleaned):
    assert clean_prompt(raw) == cleaned


def test_broken_unicode_is_repaired_with_ftfy():
    pytest.importorskip("ftfy")

    assert clean_prompt("cafÃ© âœ” “quoted”") == 'café ✔ "quoted"'


def test_prompt_is_cleaned_without_ftfy_too(monkeypatch):
    def find_nothing(name: str) -> None:
        assert name == "ftfy"

    monkeypatch.setattr(clean, "find_spec", find_nothing)

    assert clean.find_spec is not importlib.util.find_spec
    assert clean_prompt("  tom &amp;amp; “jerry” ") == "tom & “jerry”"
