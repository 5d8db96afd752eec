"""Rows of images as a PNG and as a web page that needs no server; shared by search and visualisation."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from fastreid_uns.commands.output import write_output
from fastreid_uns.data.decode import read_image
from fastreid_uns.errors import UserError

GREEN, RED, GREY = "#2a9d3f", "#d62828", "#9a9a9a"
PALETTE = (GREEN, RED, "#e08e0b", "#3366cc", "#8e44ad", "#0f9b8e", "#795548", "#c2185b")
BORDER, GAP, TITLE = 4, 6, 18

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222 }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc } h3 { font-size: 1em; margin: 1.2em 0 .3em; font-weight: 600 }
.row { display: flex; flex-wrap: wrap; gap: 6px } figure { margin: 0; text-align: center }
figure img { display: block; border: 4px solid } figcaption { font-size: 12px; color: #555 }
.first { margin-right: 18px } .picture { max-width: 100% } pre { overflow-x: auto }
"""


class Cell(NamedTuple):
    """One image: file, colour of its border, and what stands below it."""

    path: str
    colour: str = GREY
    caption: str = ""


class Row(NamedTuple):
    """Images under a title; the first one stands apart if `lead` is set."""

    title: str
    cells: Sequence[Cell]
    lead: bool = False


def thumbnail(path: str, size: tuple[int, int]) -> Image.Image:
    """An image file as RGB of (height, width) pixels; a grey box where it cannot be read."""
    try:
        return read_image(path).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    except UserError:
        return Image.new("RGB", (size[1], size[0]), GREY)


def write_png(rows: Sequence[Row], file: Path, size: tuple[int, int]) -> None:
    """Draw rows of images below each other.

    Args:
        size: height and width of each image in pixels.
    """
    height, width = size[0] + 2 * BORDER, size[1] + 2 * BORDER
    font = ImageFont.load_default()
    most = max(len(row.cells) for row in rows)
    wide = max(GAP + most * (width + GAP) + 2 * GAP, *(int(font.getlength(row.title)) + 2 * GAP for row in rows))
    sheet = Image.new("RGB", (wide, len(rows) * (TITLE + height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = GAP + r * (TITLE + height + GAP)
        draw.text((GAP, top), row.title, fill="black", font=font)
        for c, cell in enumerate(row.cells):
            left = GAP + c * (width + GAP) + (2 * GAP if row.lead and c > 0 else 0)
            box = (left, top + TITLE, left + width - 1, top + TITLE + height - 1)
            draw.rectangle(box, fill=cell.colour)
            sheet.paste(thumbnail(cell.path, size), (left + BORDER, top + TITLE + BORDER))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    write_output(file, stream.getvalue())


def rows_html(rows: Sequence[Row], size: tuple[int, int]) -> str:
    """The rows as HTML, with the images in it."""
    return "\n".join(_row_html(row, size) for row in rows)


def picture_html(file: Path, text: str) -> str:
    """A picture, in the page itself."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img class="picture" alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def write_page(title: str, sections: Sequence[tuple[str, str, str]], file: Path) -> None:
    """Write a page of its own.

    Args:
        sections: (heading, explanation, HTML) each.
    """
    body = "\n".join(
        f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>\n{content}" for heading, text, content in sections
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>\n{body}\n</html>\n"
    )
    write_output(file, page.encode("utf-8", "replace"))  # names of files may hold bytes that are no UTF-8


def _row_html(row: Row, size: tuple[int, int]) -> str:
    figures = []
    for i, cell in enumerate(row.cells):
        stream = io.BytesIO()
        thumbnail(cell.path, size).save(stream, "JPEG", quality=85)
        data = base64.b64encode(stream.getvalue()).decode()
        first = ' class="first"' if row.lead and i == 0 else ""
        figures.append(
            f'<figure{first}><img style="border-color:{cell.colour}" width="{size[1]}" height="{size[0]}" '
            f'title="{html.escape(cell.path)}" alt="" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{html.escape(cell.caption)}</figcaption></figure>"
        )
    return f'<h3>{html.escape(row.title)}</h3><div class="row">{"".join(figures)}</div>'
