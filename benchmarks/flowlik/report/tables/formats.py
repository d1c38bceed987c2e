"""Tables as markdown, and text as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from flowlik.report.tables.table import Cell, Table

FORMATS: Final = ("md", "latex", "csv")


# ---------------------------------------------------------------------------------------------------------- formats
def _nothing(known: str) -> str:
    return "No results yet.\n" if known == "md" else "% no results yet\n"


def _markdown(table: Table) -> str:
    lines = [[_md_cell(cell) for cell in row] for row in table.rows]
    heads = [_md(head) for head in table.columns]
    widths = [max(3, *(len(line[k]) for line in [heads, *lines])) for k in range(len(heads))]

    def line(texts: Sequence[str]) -> str:
        padded = [
            t.ljust(w) if k < table.names else t.rjust(w)
            for k, (t, w) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if k < table.names else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    body = "\n".join([line(heads), line(rule), *(line(texts) for texts in lines)])
    return f"### {_md(table.title)}\n\n{body}\n\n{_md(table.note)}\n"


def _md_cell(cell: Cell) -> str:
    text = _md(cell.text)
    return f"*{text}*" if cell.published and text else text


def _md(text: str) -> str:
    text = " ".join(text.split())
    return (
        re.sub(r"([\\`*|\[\]])", r"\\\1", text)
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
    )


_TEX: Final = {
    **{"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%"},
    **{
        "_": r"\_",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "|": r"$|$",
        "<": r"$<$",
        ">": r"$>$",
    },
    **{"−": "$-$", "–": "--", "×": r"$\times$", "±": r"$\pm$", "·": r"$\cdot$", "∞": r"$\infty$"},
    **{"ρ": r"$\rho$", "…": r"\ldots{}", "≥": r"$\geq$", "≤": r"$\leq$", "é": r"\'e", "[": "{[}", "]": "{]}"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in " ".join(text.split()))
