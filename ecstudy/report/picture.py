"""What the report functions return: a figure or a table that shows itself in a notebook and on a page.

A figure goes into the page as inline SVG whose ink is ``currentColor``: it follows the page from light to dark and
is read out by its alternative text. Rows travel along as a link, so a page needs no other file.
"""
from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pandas as pd

from .style import INK

_BULKY = ("settings", "bytes_breakdown", "stage_seconds", "allocation")    # JSON texts of a row, kept in the store


@dataclass(frozen=True)
class Html:
    """A piece of HTML that displays as itself."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


@dataclass(frozen=True)
class Picture:
    """One figure: the SVG text, its alternative text and caption, the rows behind it and the command that makes it."""

    svg: str
    alt: str
    caption: str = ""
    rows: pd.DataFrame | None = field(default=None, repr=False)
    command: str = ""

    def _repr_html_(self) -> str:
        svg = self.svg.replace(INK, "currentColor")
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt, quote=True)}" ', 1)
        return (f'<figure class="ec-figure">{svg}<figcaption>{escape(self.caption)}'
                f'{evidence(self.rows, self.command)}</figcaption></figure>')

    def save(self, path) -> Path:
        """Write the SVG as a file of its own (mid-tone ink, transparent ground)."""
        path = Path(path)
        path.write_text(self.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt, quote=True)}" ', 1))
        return path


@dataclass(frozen=True)
class Table:
    """One table: ``frame`` holds the numbers, the HTML is how they are shown."""

    frame: pd.DataFrame
    html: str = field(repr=False)
    caption: str = ""
    rows: pd.DataFrame | None = field(default=None, repr=False)
    command: str = ""

    def _repr_html_(self) -> str:
        return (f'<figure class="ec-figure"><div class="ec-scroll">{self.html}</div>'
                f'<figcaption>{escape(self.caption)}{evidence(self.rows, self.command)}</figcaption></figure>')


def evidence(rows: pd.DataFrame | None, command: str) -> str:
    """The line under a figure: its rows as a CSV to keep, and the command that makes it again."""
    parts = []
    if rows is not None and len(rows):
        kept = rows.drop(columns=[c for c in _BULKY if c in rows])
        data = base64.b64encode(kept.to_csv(index=False, float_format="%.7g").encode()).decode()
        count = f"{len(rows)} row{'s' * (len(rows) != 1)}"
        parts.append(f'<a download="rows.csv" href="data:text/csv;base64,{data}">{count} as CSV</a>')
    if command:
        parts.append(f"<code>{escape(command)}</code>")
    return f'<span class="ec-evidence">{" · ".join(parts)}</span>' if parts else ""


def svg_of(figure) -> str:
    """The figure's ``<svg>`` element: no XML header, no date, no fixed size, so that it scales with the page."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', text).group(1))
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    text = text.replace("<svg ", f'<svg style="width:100%;max-width:{1.35 * width:.0f}px;height:auto" ', 1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return re.sub(r"\n\s*", "\n", text).strip()


def frame_html(frame: pd.DataFrame, *, index: bool = True, escape_text: bool = True) -> str:
    """A frame of strings as an HTML table in the study's style."""
    return frame.to_html(index=index, escape=escape_text, border=0, classes="ec-table", na_rep="")


def raw(shown) -> str:
    """Anything that shows itself as HTML, as a block of a MyST page."""
    return f"````{{raw}} html\n{shown._repr_html_()}\n````\n"
