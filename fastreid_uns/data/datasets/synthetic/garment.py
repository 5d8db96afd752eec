"""Cloth of the synthetic pedestrians: thirteen patterns, unrolled once round the body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from fastreid_uns.data.datasets.synthetic.pen import Colour, mix, tone

HIGH = 64  # pixels from collar to hem
TURN = 160  # pixels once round the body
FRONT, BACK = TURN // 2, (0, TURN)  # columns; the back is where the cloth is cut

Draw = ImageDraw.ImageDraw
Pattern = Callable[[Draw, Colour, Colour, int, np.random.Generator], None]


def garment(member: int, main: Colour, second: Colour, rng: np.random.Generator) -> Image.Image:
    """An upper garment in two colours.

    Args:
        member: chooses the pattern, modulo their number.
        main: colour of the cloth.
        second: colour of the pattern.
        rng: chooses the size of the pattern.

    Returns:
        RGB image of 2 * TURN x HIGH pixels: the front is in the middle, and half a turn is repeated on either side,
        so that what is seen from any direction is a plain crop.
    """
    cloth = Image.new("RGB", (TURN, HIGH), main)
    PATTERNS[member % len(PATTERNS)](ImageDraw.Draw(cloth), main, second, int(rng.integers(4)), rng)
    wide = Image.new("RGB", (2 * TURN, HIGH))
    for x in (-TURN // 2, TURN // 2, 3 * TURN // 2):
        wide.paste(cloth, (x, 0))
    return wide


def _plain(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    draw.rectangle((0, HIGH - 5, TURN, HIGH), fill=mix(main, second, 0.5))


def _hoops(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    step = (11, 14, 18, 24)[size]
    for y in range(step // 2, HIGH, step):
        draw.rectangle((0, y, TURN, y + step // 2 - 1), fill=second)


def _logo(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    x, y, r = FRONT, 25, 14
    if size == 0:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=second)
    elif size == 1:
        draw.rectangle((x - r, y - r, x + r, y + r), fill=second)
    elif size == 2:
        draw.polygon([(x, y - r - 2), (x + r + 3, y + r), (x - r - 3, y + r)], fill=second)
    else:
        draw.rectangle((x - r - 2, y - 5, x + r + 2, y + 5), fill=second)
        draw.rectangle((x - 5, y - r - 2, x + 5, y + r + 2), fill=second)
    for x in BACK:
        draw.rectangle((x - 18, 14, x + 18, 22), fill=second)


def _open(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    x, top = FRONT, (10, 13, 16, 19)[size]
    draw.polygon([(x - top, 0), (x + top, 0), (x + top - 5, HIGH), (x - top + 5, HIGH)], fill=second)
    for side in (-1, 1):
        draw.line((x + side * top, 0, x + side * (top - 5), HIGH), fill=tone(main, 0.6), width=3)


def _checks(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    step, half = (16, 20)[size % 2], (8, 10)[size % 2]
    for x in range(0, TURN, step):
        draw.rectangle((x, 0, x + half - 1, HIGH), fill=mix(main, second, 0.5))
    for y in range(0, HIGH, step):
        draw.rectangle((0, y, TURN, y + half - 1), fill=mix(main, second, 0.5))
        for x in range(0, TURN, step):
            draw.rectangle((x, y, x + half - 1, y + half - 1), fill=second)


def _block(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    draw.rectangle((0, (24, 31, 38, 45)[size], TURN, HIGH), fill=second)


def _pinstripes(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    step = (10, 16, 16, 20)[size]
    for x in range(0, TURN, step):
        draw.rectangle((x, 0, x + step // 2 - 1, HIGH), fill=second)


def _text(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    for x in (*BACK, FRONT):
        for line in range(2 + size % 2):
            left, y = x - 19, 14 + 12 * line
            while left < x + 15:
                width = int(rng.integers(4, 10))
                draw.rectangle((left, y, left + width, y + 6), fill=second)
                left += width + 4


def _sash(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    lean, half = (22 if size % 2 else -22), (7 if size < 2 else 11)
    for x in (*BACK, FRONT):
        corners = [(x - half - lean, 0), (x + half - lean, 0), (x + half + lean, HIGH), (x - half + lean, HIGH)]
        draw.polygon(corners, fill=second)


def _yoke(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, TURN, (13, 17, 21, 25)[size]), fill=second)


def _halves(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    draw.rectangle((FRONT, 0, TURN, HIGH), fill=second)


def _dots(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    step = (16, 16, 20, 20)[size]
    for row, y in enumerate(range(step // 3, HIGH, step // 2 + 3)):
        for x in range((row % 2) * step // 2, TURN + step, step):
            draw.ellipse((x - step // 4, y - step // 4, x + step // 4, y + step // 4), fill=second)


def _band(draw: Draw, main: Colour, second: Colour, size: int, rng: np.random.Generator) -> None:
    top = (14, 22, 30, 38)[size]
    draw.rectangle((0, top, TURN, top + 13), fill=second)


PATTERNS: list[Pattern] = [
    _plain,
    _hoops,
    _logo,
    _open,
    _checks,
    _block,
    _pinstripes,
    _text,
    _sash,
    _yoke,
    _halves,
    _dots,
    _band,
]
