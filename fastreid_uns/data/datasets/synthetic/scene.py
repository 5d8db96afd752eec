"""Backgrounds of the synthetic cameras, and what stands in front of a figure."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastreid_uns.data.datasets.synthetic.pen import Colour, Pen, tone

GROUNDS: list[Colour] = [(104, 104, 108), (150, 142, 130), (122, 116, 106), (92, 96, 92)]
WALLS: list[Colour] = [(142, 98, 80), (176, 168, 152), (120, 126, 134), (160, 140, 112), (98, 92, 96)]
GREENS: list[Colour] = [(64, 92, 54), (82, 104, 60), (52, 80, 60)]
NEUTRAL = np.array([128.0, 126.0, 124.0])
CONTRAST = 0.65  # of a scene: what is far looks paler, and the figures stand out


def make_scene(rng: np.random.Generator, size: tuple[int, int], horizon: tuple[float, float]) -> Image.Image:
    """A place: a back (bricks, trees, shop windows, fence or panels) over a ground (asphalt, tiles or lawn).

    Args:
        rng: chooses everything.
        size: width and height in pixels.
        horizon: range of the share of the height at which the ground begins.
    """
    wide, high = size
    edge = int(high * rng.uniform(*horizon))
    image = Image.new("RGB", size, WALLS[rng.integers(len(WALLS))])
    draw = ImageDraw.Draw(image)
    (_bricks, _trees, _shops, _fence, _panels)[rng.integers(5)](draw, rng, wide, edge)
    (_asphalt, _tiles, _lawn)[rng.integers(3)](draw, rng, wide, edge, high)
    draw.line((0, edge, wide, edge), fill=(70, 68, 66), width=max(1, high // 90))
    image = image.filter(ImageFilter.GaussianBlur(high / 180))
    grain = rng.normal(0.0, 5.0, (high, wide, 1))
    faded = NEUTRAL + CONTRAST * (np.asarray(image) + grain - NEUTRAL)
    return Image.fromarray(np.clip(faded, 0, 255).astype(np.uint8))


def _bricks(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wide: int, edge: int) -> None:
    colour, step = WALLS[rng.integers(len(WALLS))], max(3, edge // 9)
    for row, y in enumerate(range(-step, edge, step)):
        for x in range(-(row % 2) * step, wide, 2 * step):
            box = (x + 1, y + 1, x + 2 * step - 2, y + step - 2)
            draw.rectangle(box, fill=tone(colour, rng.uniform(0.86, 1.1)))


def _trees(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wide: int, edge: int) -> None:
    draw.rectangle((0, 0, wide, edge), fill=tone((186, 200, 210), rng.uniform(0.7, 1.05)))
    green = GREENS[rng.integers(len(GREENS))]
    draw.rectangle((0, int(edge * 0.6), wide, edge), fill=tone(green, 0.7))
    for _ in range(int(7 * wide / (edge + 1))):
        x, r = rng.uniform(0, wide), edge * rng.uniform(0.12, 0.4)
        y = edge * rng.uniform(0.2, 0.75)
        draw.rectangle((x - r / 9, y, x + r / 9, edge), fill=(72, 56, 44))
        draw.ellipse((x - r, y - 0.8 * r, x + r, y + 0.8 * r), fill=tone(green, rng.uniform(0.7, 1.35)))


def _shops(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wide: int, edge: int) -> None:
    x = 0
    while x < wide:
        width = int(edge * rng.uniform(0.7, 1.3)) + 4
        wall = tone(WALLS[rng.integers(len(WALLS))], rng.uniform(0.8, 1.15))
        draw.rectangle((x, 0, x + width, edge), fill=wall)
        pane = tone((120, 136, 146), rng.uniform(0.4, 1.4))
        draw.rectangle((x + width * 0.14, edge * 0.3, x + width * 0.86, edge * 0.94), fill=pane)
        awning = tone(((160, 60, 56), (60, 96, 130), (190, 170, 120))[rng.integers(3)], rng.uniform(0.7, 1.1))
        draw.rectangle((x + width * 0.08, edge * 0.12, x + width * 0.92, edge * 0.3), fill=awning)
        draw.line((x + width / 2, edge * 0.3, x + width / 2, edge * 0.94), fill=tone(wall, 0.7), width=2)
        x += width


def _fence(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wide: int, edge: int) -> None:
    draw.rectangle((0, 0, wide, edge), fill=tone((164, 170, 172), rng.uniform(0.7, 1.1)))
    bar, step = tone((86, 92, 90), rng.uniform(0.7, 1.4)), max(4, edge // 5)
    for x in range(0, wide, step):
        draw.rectangle((x, edge * 0.25, x + max(1, step // 5), edge), fill=bar)
    for y in (0.3, 0.85):
        draw.rectangle((0, edge * y, wide, edge * (y + 0.06)), fill=bar)


def _panels(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wide: int, edge: int) -> None:
    base, step = WALLS[rng.integers(len(WALLS))], max(6, int(edge * rng.uniform(0.5, 0.9)))
    for x in range(0, wide, step):
        draw.rectangle((x, 0, x + step - 2, edge), fill=tone(base, rng.uniform(0.85, 1.2)))
        if rng.random() < 0.3:
            draw.rectangle((x + step * 0.2, edge * 0.2, x + step * 0.75, edge), fill=tone(base, 0.6))
    draw.rectangle((0, 0, wide, edge * 0.08), fill=tone(base, 1.35))


def _asphalt(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wide: int, edge: int, high: int) -> None:
    draw.rectangle((0, edge, wide, high), fill=tone(GROUNDS[rng.integers(2) * 3], rng.uniform(0.8, 1.2)))
    y, gap = edge + (high - edge) * rng.uniform(0.15, 0.7), high * rng.uniform(0.2, 0.5)
    x = 0.0
    while x < wide:
        draw.polygon(
            [(x, y), (x + gap, y), (x + gap * 1.1, y + high * 0.025), (x, y + high * 0.025)], fill=(206, 204, 190)
        )
        x += 1.8 * gap
    draw.rectangle((0, edge, wide, edge + high * 0.03), fill=(158, 156, 150))


def _tiles(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wide: int, edge: int, high: int) -> None:
    base = tone(GROUNDS[rng.integers(len(GROUNDS))], rng.uniform(0.85, 1.25))
    draw.rectangle((0, edge, wide, high), fill=base)
    line, y, gap = tone(base, 0.82), float(edge), high * 0.02
    while y < high:
        draw.line((0, y, wide, y), fill=line, width=2)
        y, gap = y + gap, gap * 1.35
    slope = rng.uniform(-1.0, 1.0)
    for x in np.arange(-wide, 2 * wide, high * 0.12):
        draw.line((x, edge, x + slope * (high - edge), high), fill=line, width=2)


def _lawn(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wide: int, edge: int, high: int) -> None:
    green = GREENS[rng.integers(len(GREENS))]
    draw.rectangle((0, edge, wide, high), fill=tone(green, 1.15))
    for _ in range(60):
        x, y, r = rng.uniform(0, wide), rng.uniform(edge, high), high * rng.uniform(0.01, 0.05)
        draw.ellipse((x - 2 * r, y - 0.6 * r, x + 2 * r, y + 0.6 * r), fill=tone(green, rng.uniform(0.9, 1.35)))
    top, low = edge + (high - edge) * rng.uniform(0.1, 0.4), edge + (high - edge) * rng.uniform(0.6, 1.0)
    draw.polygon([(0, top), (wide, top), (wide, low), (0, low)], fill=GROUNDS[1])


def draw_occluder(pen: Pen, rng: np.random.Generator, kind: int, x: float) -> None:
    """Something in front of the figure; the pen's unit is the size of the image.

    Args:
        pen: draws.
        rng: chooses size and colour.
        kind: 0 post, 1 bush, 2 low wall, 3 bin.
        x: position across, 0..1.
    """
    if kind == 0:
        r = rng.uniform(0.03, 0.08)
        pen.limb([(x, -0.1), (x, 1.1)], [r, r], [tone((96, 98, 100), rng.uniform(0.5, 1.3))])
    elif kind == 1:
        green, top = GREENS[rng.integers(len(GREENS))], rng.uniform(0.62, 0.82)
        for _ in range(14):
            a, b = x + rng.normal(0, 0.16), rng.uniform(top, 1.05)
            pen.ellipse((a, b), rng.uniform(0.1, 0.2), rng.uniform(0.04, 0.09), tone(green, rng.uniform(0.6, 1.35)))
    elif kind == 2:
        top, colour = rng.uniform(0.66, 0.84), tone(WALLS[rng.integers(len(WALLS))], rng.uniform(0.7, 1.2))
        pen.polygon([(-0.1, top), (1.1, top), (1.1, 1.1), (-0.1, 1.1)], tone(colour, 0.85))
        pen.polygon([(-0.1, top), (1.1, top), (1.1, top + 0.03), (-0.1, top + 0.03)], tone(colour, 1.2))
    else:
        top, r = rng.uniform(0.6, 0.75), rng.uniform(0.12, 0.2)
        x = math.copysign(0.5 - 0.6 * r, x - 0.5) + 0.5
        colour = tone(((70, 96, 80), (90, 92, 98), (150, 110, 60))[rng.integers(3)], rng.uniform(0.7, 1.2))
        pen.polygon([(x - r, top), (x + r, top), (x + 0.85 * r, 1.1), (x - 0.85 * r, 1.1)], colour)
        pen.polygon([(x + 0.4 * r, top), (x + r, top), (x + 0.85 * r, 1.1), (x + 0.3 * r, 1.1)], tone(colour, 0.75))
        pen.ellipse((x, top), r, 0.02, tone(colour, 0.55))
