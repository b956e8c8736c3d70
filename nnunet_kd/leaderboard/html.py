"""A leaderboard as one page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light; --line: #d8dee4; --soft: #f6f8fa; --text: #1f2328; --quiet: #59636e; --warn: #fff8e5; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); max-width: 1300px; margin: 2rem auto; }
body { padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p.quiet, .quiet { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { background: var(--soft); position: sticky; top: 0; }
tr:hover td { background: var(--soft); }
td.best { font-weight: 650; }
.warn { background: var(--warn); border: 1px solid #e3c76b; border-radius: 6px; padding: .6rem 1rem; }
.warn ul { margin: .3rem 0; }
figure { margin: 1rem 0; } figure img { max-width: 100%; } figcaption { color: var(--quiet); font-size: 13px; }
details summary { cursor: pointer; margin: .6rem 0; }
nav a { margin-right: 1rem; }
"""


class Page:
    """Collects sections; every text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.sections: list[tuple[str, str]] = []
        self.parts: list[str] = []

    def section(self, title: str) -> None:
        """Begin a section."""
        anchor = f"section-{len(self.sections)}"
        self.sections.append((anchor, title))
        self.parts.append(f'<h2 id="{anchor}">{escape(title)}</h2>')

    def paragraph(self, text: str) -> None:
        """A paragraph of quiet text."""
        self.parts.append(f'<p class="quiet">{escape(text)}</p>')

    def warning(self, title: str, lines: Sequence[str]) -> None:
        """A box with a list, folded where it is long."""
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        is_open = " open" if len(lines) <= 10 else ""
        self.parts.append(
            f'<div class="warn"><details{is_open}><summary>{escape(title)}</summary><ul>{items}</ul></details></div>'
        )

    def table(
        self,
        header: Sequence[str],
        body: Sequence[Sequence[str]],
        *,
        best: Sequence[bool] = (),
        best_column: int = 0,
        links: Sequence[Sequence[str]] = (),
        summary: str = "",
    ) -> None:
        """A table.

        Args:
            header: Texts.
            body: Texts.
            best: Which lines are the best of their dataset.
            best_column: Column that is emphasised there.
            links: For each line, what its last cell links to (empty: nothing).
            summary: Fold the table under this text.
        """
        rows = []
        for index, cells in enumerate(body):
            texts = [f"<td>{escape(cell)}</td>" for cell in cells]
            if best and best[index]:
                texts[best_column] = f'<td class="best">{escape(cells[best_column])}</td>'
            if links:
                hrefs = [f'<a href="{escape(href, quote=True)}">{escape(href)}</a>' for href in links[index]]
                texts.append(f"<td>{' '.join(hrefs)}</td>")
            rows.append(f"<tr>{''.join(texts)}</tr>")
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        self.parts.append(f"<details><summary>{escape(summary)}</summary>{table}</details>" if summary else table)

    def figure(self, png: bytes, caption: str) -> None:
        """A figure inside the page."""
        data = base64.b64encode(png).decode()
        text = escape(caption)
        self.parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def render(self) -> str:
        """The whole page."""
        links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in self.sections)
        title = escape(self.title)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
            f"</head><body><h1>{title}</h1><nav>{links}</nav>{''.join(self.parts)}</body></html>\n"
        )
