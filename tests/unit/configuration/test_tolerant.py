"""JSON as the documentation shows it, and errors that name the place."""

from __future__ import annotations

import pytest

from lightx2v_core.configuration.tolerant import parse_object, read_object
from lightx2v_core.errors import RequestError


def parse(text: str) -> dict[str, object]:
    return parse_object(text, "c.json")[0]


def test_comments_and_a_last_comma_are_blanked():
    text = """{
      "infer_steps": 4,           // Inference steps
      /* "dit_quantized": true,
         over lines */
      "list": [1, 2, /* three */ 3,],
      // "enable_cfg": true
    }"""

    assert parse(text) == {"infer_steps": 4, "list": [1, 2, 3]}


@pytest.mark.parametrize(
    "value", ["http://host//path", "a /* b */ c", 'quote \\" // still', "x,}", "[1,]", "\\\\"]
)
def test_strings_survive_whatever_they_hold(value):
    text = '{"path": "' + value + '", /* c */ "n": 1, }'

    parsed = parse(text)

    assert parsed == {"path": value.replace('\\"', '"').replace("\\\\", "\\"), "n": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "a": 1,\n  "b": tru\n}', r"c.json, line 3, column 8: Expecting value .*\"b\": tru"),
        ('{ // c\n "a": 1 "b": 2}', r"line 2, column 9: Expecting ',' delimiter"),
        ('{"a": 1 /* never', r"line 1, column 9: this comment has no end; close it with \*/"),
        ('{"a": "open}', r"line 1, column 7: Unterminated string"),
        ('{"a": [,]}', r"line 1, column 8"),
        ("", r"line 1, column 1: Expecting value .*nothing"),
        ("[1]", "holds list, and a configuration is an object in braces"),
        ('{"a": NaN}', "holds NaN, which is no JSON number"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(text, words):
    with pytest.raises(RequestError, match=words):
        parse(text)


def test_a_key_that_stands_twice_is_told():
    assert parse_object('{"a": 1, "b": 2, "a": 3}', "c.json") == ({"a": 3, "b": 2}, ["a"])


def test_files_that_are_no_text_or_not_there_are_sentences(tmp_path):
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"\xff" * 100)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(5_000_000)

    for path, words in (
        (model, "not text in UTF-8"),
        (huge, "has 5 MB and is no configuration"),
        (tmp_path / "none.json", "cannot be read .*check the path"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(RequestError, match=words):
            read_object(path)


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')

    assert read_object(path)[0] == {"a": 1}
