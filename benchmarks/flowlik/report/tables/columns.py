"""The table of columns as docs/records.md has it.

`python -m flowlik.report.tables.columns` prints it, with the columns of the measures that are installed;
`python -m flowlik.report.tables.columns docs/records.md` writes the suite's own between the marks of that file. A test
says when that is due.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Final

from flowlik.measures.registry import own_columns
from flowlik.records.columns import EXTRA, TABLE, Column
from flowlik_models.files import write_atomically

BEGIN: Final = "<!-- columns: python -m flowlik.report.tables.columns docs/records.md -->"
END: Final = "<!-- end of columns -->"
BETTER: Final = {"less": "less", "more": "more", "zero": "nearer 0", "one": "nearer 1", "none": ""}


def as_markdown(own: tuple[Column, ...] = ()) -> str:
    """A table for each group of columns, one for what `extra` holds, and one for `own` columns where there are any."""
    groups = {group: list(columns) for group, columns in groupby(TABLE, key=lambda column: column.group)}
    parts = {**groups, "in `extra`": EXTRA, "in `extra`, of measures that are installed": own}
    tables = [f"**{title}**\n\n{_table(columns)}" for title, columns in parts.items() if columns]
    return "\n\n".join(tables)


HEADS: Final = ("column", "unit", "better", "meaning")


def _table(columns: Iterable[Column]) -> str:
    """Markdown, without the heads that no column of the group has anything under."""
    lines = list(_lines(columns))
    kept = [k for k in range(len(HEADS)) if any(line[k] for line in lines)]
    rows = [HEADS, ("---",) * len(HEADS), *lines]
    return "\n".join(f"| {' | '.join(row[k] for k in kept)} |" for row in rows)


def _lines(columns: Iterable[Column]) -> Iterator[tuple[str, ...]]:
    """Neighbours that differ in their names alone share a line."""
    for (meaning, unit, better), alike in groupby(columns, key=lambda c: (c.meaning, c.unit, c.better)):
        names = ", ".join(f"`{column.name}`" for column in alike)
        yield names, unit, BETTER[better], " ".join(meaning.split()).replace("|", r"\|")


def in_page(page: str) -> str:
    """The page with the suite's columns between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{as_markdown()}\n{END}{after}"


def main(arguments: list[str]) -> None:
    """Print the columns, or write them into the page that is named."""
    if not arguments:
        sys.stdout.write(as_markdown(own_columns()) + "\n")
    for name in arguments:
        page = Path(name)
        write_atomically(page, in_page(page.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
