"""Texts as a LaTeX table (packages booktabs and, for wide ones, adjustbox)."""

from __future__ import annotations

from collections.abc import Sequence

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$"}
SPECIAL |= {letter: f"\\{letter}" for letter in "&%$#_{}"}


def escape(text: str) -> str:
    """A text in which LaTeX finds no commands."""
    escaped = "".join(SPECIAL.get(letter, letter) for letter in text)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped  # after a line break, [ begins an argument


def latex_table(header: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> str:
    """A table environment; the first two columns are texts, the others centred."""
    alignment = "ll" + "c" * (len(header) - 2)
    lines = [" & ".join(map(escape, row)) + r" \\" for row in (header, *body)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(caption)}}}",
            r"\begin{adjustbox}{max width=\textwidth}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{adjustbox}",
            r"\end{table}",
            "",
        ]
    )
