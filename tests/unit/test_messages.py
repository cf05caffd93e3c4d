"""docs/messages.md holds what is really said, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.messages.table import GROUPS, PAGE, Row, line, rows, said

ROWS = {f"{number}-{row.before[:30]}": row for number, row in enumerate(rows())}
HOST = Path(__file__).parents[1] / "host"


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_the_mistake_gives_the_message_of_the_table(row: Row, tmp_path: Path):
    written = PAGE.read_text("utf-8").splitlines()

    told = line(row, said(row, tmp_path))

    assert told in written, f"{told}\nrun python -m tests.messages.table and look at the change"


def test_the_table_holds_these_rows_and_no_other():
    written = [text for text in PAGE.read_text("utf-8").splitlines() if text.startswith("| ")]

    assert len(written) == len(rows()) + len(GROUPS)


def test_every_test_the_table_names_is_there():
    defined = "\n".join(path.read_text("utf-8") for path in HOST.glob("*.py"))

    missing = {row.check for row in rows() if row.check and f"def {row.check}(" not in defined}

    assert not missing
