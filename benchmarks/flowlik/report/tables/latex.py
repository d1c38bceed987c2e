"""Tables as LaTeX of a known width: booktabs, no other package than `xcolor` for published values and `array`.

A table is set in `footnotesize`. Where its columns are wider than the width, names are set in paragraphs and intervals
under their values; then only the first column keeps its intervals; and where that is too wide, or the lines are more
than a page holds, the table goes on in another one. Widths are those of Computer Modern, which is wider than Times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from flowlik.report.tables.formats import _tex
from flowlik.report.tables.table import Cell, Table

WIDTHS: Final = {"column": 345.0, "page": 487.0}
"""Points of a text column (of the class `article`) and of a page of two columns (the narrowest in use)."""

COLUMN_GAP: Final = 6.0
"""Points between columns: twice `tabcolsep`."""

FONT: Final = 8 * 1.0625
"""Points of `footnotesize`; at 8 pt Computer Modern is by this factor wider than the same font at 10 pt."""

MOST_LINES: Final = 44
"""Lines of a page that a float may take besides its caption."""

UNBROKEN: Final = 12
"""Letters after which a word may be broken where it offers no other place."""


@dataclass(frozen=True)
class _Column:
    """A column with its widths in points: of the widest cell, of the widest piece of one that is not broken, and of the
    paragraph that it is set in (None: as wide as what stands in it)."""

    place: int
    words: bool
    natural: float
    least: float
    width: float | None = None


def latex(table: Table, width: str) -> str:
    """A table as one or more LaTeX tables that are no wider than `width`, a key of `WIDTHS`."""
    room = WIDTHS[width]
    if _least_width(_columns(table)) > room:
        table = _one_interval(table)
    written: list[str] = []
    for columns in _side_by_side(_columns(table), room):
        for rows in _pages(table, columns):
            written.append(_part(table, columns, rows, width, first=not written))
    return "\n".join(written)


def _columns(table: Table) -> list[_Column]:
    return [_column(table, place) for place in range(len(table.columns))]


def _column(table: Table, place: int) -> _Column:
    texts = [row[place].text for row in table.rows]
    heads = _head_lines(table.columns[place])
    words = table.holds_words(place)
    pieces = [
        piece for text in texts for piece in (_pieces(text) if words else text.split(" [")) if piece.strip()
    ]
    widest = max(map(text_width, [*heads, *texts]))
    # an opening bracket went with the space before it
    least = max(
        [text_width(piece if words else f"[{piece}" if "]" in piece else piece) for piece in pieces],
        default=0.0,
    )
    return _Column(place, words, widest, max(least, *map(text_width, heads)))


def _least_width(columns: Sequence[_Column]) -> float:
    return sum(column.least + COLUMN_GAP for column in columns)


def _one_interval(table: Table) -> Table:
    """The table with the intervals of its first column that has some; the others keep their values."""
    kept = [k for k in range(len(table.columns)) if any(" [" in row[k].text for row in table.rows)][:1]
    rows = tuple(
        tuple(
            cell if k in kept or cell.value is None else replace(cell, text=cell.text.partition(" [")[0])
            for k, cell in enumerate(row)
        )
        for row in table.rows
    )
    return replace(table, rows=rows)


def _side_by_side(columns: Sequence[_Column], room: float) -> list[list[_Column]]:
    """The columns of each part: the names in all of them, then as many others as fit."""
    names = [column for column in columns if column.words and column.place < 2] or list(columns[:1])
    parts: list[list[_Column]] = [[]]
    for column in columns:
        if column in names:
            continue
        if parts[-1] and _least_width([*names, *parts[-1], column]) > room:
            parts.append([])
        parts[-1].append(column)
    return [_shared_out([*names, *part], room) for part in parts]


def _shared_out(columns: Sequence[_Column], room: float) -> list[_Column]:
    """Columns as paragraphs, where all of them at their natural width are too wide: numbers first keep theirs."""
    free = room - COLUMN_GAP * len(columns)
    if sum(column.natural for column in columns) <= free:
        return list(columns)
    words_least = sum(column.least for column in columns if column.words)
    stacked = sum(column.natural for column in columns if not column.words) + 1.6 * words_least > free
    fixed = [
        column for column in columns if not (column.words or (stacked and column.least < column.natural))
    ]
    free -= sum(column.natural for column in fixed)
    broken = [column for column in columns if column not in fixed]
    spare = free - sum(column.least for column in broken)
    gain = sum(column.natural - column.least for column in broken if column.words)
    shared = []
    for column in columns:
        if column in fixed:
            shared.append(column)
            continue
        more = spare * (column.natural - column.least) / gain if gain and column.words else 0.0
        shared.append(replace(column, width=math.floor(100 * min(column.least + more, column.natural)) / 100))
    return shared


def _pages(table: Table, columns: Sequence[_Column]) -> list[list[tuple[Cell, ...]]]:
    """The rows of each float."""
    pages: list[list[tuple[Cell, ...]]] = [[]]
    used = 0
    for row in table.rows:
        lines = max(_lines(row[column.place].text, column) for column in columns)
        if pages[-1] and used + lines > MOST_LINES:
            pages.append([])
            used = 0
        pages[-1].append(row)
        used += lines
    return pages


def _lines(text: str, column: _Column) -> int:
    return 1 if column.width is None else max(math.ceil(1.25 * text_width(text) / column.width), 1)


def _part(
    table: Table, columns: Sequence[_Column], rows: Sequence[tuple[Cell, ...]], width: str, *, first: bool
) -> str:
    spec = "".join(_specified(column) for column in columns)
    heads = " & ".join(_head(table.columns[column.place], column) for column in columns)
    body = [" & ".join(_cell(row[column.place], column) for column in columns) + r" \\" for row in rows]
    caption = f"{_tex(table.title)}. {_tex(table.note)}" if first else f"{_tex(table.title)}, continued."
    float_ = "table*" if width == "page" else "table"
    return "\n".join(
        [
            rf"\begin{{{float_}}}[t]",
            r"\centering",
            r"\footnotesize",
            rf"\setlength{{\tabcolsep}}{{{COLUMN_GAP / 2:g}pt}}",
            rf"\caption{{{caption.strip()}}}",
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            heads + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\end{{{float_}}}",
            "",
        ]
    )


def _specified(column: _Column) -> str:
    if column.width is None:
        return "l" if column.words else "r"
    side = "raggedright" if column.words else "raggedleft"
    return rf">{{\{side}\arraybackslash}}p{{{column.width:.2f}pt}}"


def _head(head: str, column: _Column) -> str:
    """A head on as many lines as it has words, where that makes it narrower."""
    lines = _head_lines(head)
    if column.width is not None or len(lines) == 1:
        return _tex(head)
    stacked = r"\\".join(map(_tex, lines))
    return rf"\shortstack[{'l' if column.words else 'r'}]{{{stacked}}}"


def _head_lines(head: str) -> list[str]:
    """Words of a head, joined while they stay within eleven letters."""
    lines: list[str] = []
    for word in head.split():
        if lines and len(lines[-1]) + len(word) < 11:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def _cell(cell: Cell, column: _Column) -> str:
    text = _breakable(cell.text) if column.width is not None and column.words else _tex(cell.text)
    return rf"\textcolor{{gray}}{{{text}}}" if cell.published and text else text


def _breakable(text: str) -> str:
    """Words that may be broken after signs, and every few letters where they have none."""
    written = ""
    before = ""
    for piece in _pieces(text):
        joins = before and not (before.isspace() or before.endswith("-") or piece.isspace())
        written += (r"\allowbreak{}" if joins else "") + (" " if piece.isspace() else _tex(piece))
        before = piece
    return written.strip()


def _pieces(text: str) -> list[str]:
    """What is not broken: white space, or a few letters with the signs after them."""
    signs = r"_/=,)}|;+·-"
    return re.findall(rf"\s+|[^\s{signs}]{{1,{UNBROKEN}}}[{signs}]?|\S", text)


def text_width(text: str) -> float:
    """Points of one line of text in `footnotesize`.

    >>> round(text_width("0.0123"), 1)
    23.6
    """
    return sum(_letter_width(letter) for letter in " ".join(text.split()))


@cache
def _letter_width(letter: str) -> float:
    """By the metrics of Computer Modern; of what that font does not have, as a wide capital letter."""
    known = letter.isascii() and letter.isprintable() and letter not in '\\{}_^~|<>"#$%&@'
    return _advance(letter if known else "M") * FONT


@cache
def _advance(letter: str) -> float:
    """Of a letter, in units of the font's size."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    font = FT2Font(f"{get_data_path()}/fonts/ttf/cmr10.ttf")
    font.set_size(100, 72)
    advance: int = font.load_char(ord(letter)).linearHoriAdvance
    return advance / 65536 / 100
