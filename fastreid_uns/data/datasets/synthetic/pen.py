"""Drawing in units of a figure on an enlarged canvas: what the synthetic figures are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]


def tone(colour: Sequence[float], factor: float) -> Colour:
    """The colour made darker (factor below 1) or lighter, within 0..255."""
    red, green, blue = (min(255, max(0, int(value * factor))) for value in colour)
    return red, green, blue


def mix(first: Sequence[float], second: Sequence[float], share: float) -> Colour:
    """The first colour with `share` (0..1) of the second."""
    red, green, blue = (int(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


class Pen:
    """Draws shapes given in units on `canvas`, whose enlargement makes their edges smooth once it is reduced.

    Args:
        canvas: RGB image; is drawn on.
        origin: pixel at which the units have their zero.
        scale: pixels per unit, horizontal and vertical.
    """

    def __init__(self, canvas: Image.Image, origin: Point, scale: Point) -> None:
        self.canvas = canvas
        self.origin = origin
        self.scale = scale
        self.draw = ImageDraw.Draw(canvas)

    def pixels(self, points: Sequence[Point]) -> list[Point]:
        """Pixel positions of points in units."""
        (x0, y0), (kx, ky) = self.origin, self.scale
        return [(x0 + x * kx, y0 + y * ky) for x, y in points]

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon."""
        self.draw.polygon(self.pixels(points), fill=colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a line, `width` in units and at least one pixel."""
        self.draw.line(self.pixels(points), fill=colour, width=max(1, round(width * self.scale[1])), joint="curve")

    def ellipse(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        """Fill an upright ellipse."""
        (x, y), (kx, ky) = self.pixels([centre])[0], self.scale
        self.draw.ellipse((x - rx * kx, y - ry * ky, x + rx * kx, y + ry * ky), fill=colour)

    def limb(self, joints: Sequence[Point], radii: Sequence[float], colours: Sequence[Colour]) -> None:
        """Draw a rounded limb lit from the upper left: one radius for each joint, one colour for each piece."""
        pieces = list(zip(joints, joints[1:], radii, radii[1:], colours, strict=False))
        for start, end, r1, r2, colour in pieces:
            self._capsule(start, end, r1, r2, tone(colour, 0.72))
        for (x1, y1), (x2, y2), r1, r2, colour in pieces:
            self._capsule((x1 - 0.2 * r1, y1 - 0.1 * r1), (x2 - 0.2 * r2, y2 - 0.1 * r2), 0.74 * r1, 0.74 * r2, colour)

    def _capsule(self, start: Point, end: Point, r1: float, r2: float, colour: Colour) -> None:
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length, dx / length
        corners = [
            (start[0] + nx * r1, start[1] + ny * r1),
            (end[0] + nx * r2, end[1] + ny * r2),
            (end[0] - nx * r2, end[1] - ny * r2),
            (start[0] - nx * r1, start[1] - ny * r1),
        ]
        self.polygon(corners, colour)
        self.ellipse(start, r1, r1, colour)
        self.ellipse(end, r2, r2, colour)

    def cloth(self, points: Sequence[Point], texture: Image.Image, shadow: Colour) -> None:
        """Fill a polygon with a texture stretched over its bounding box, darkened to `shadow` at both sides."""
        pixels = self.pixels(points)
        left, top = (math.floor(min(values)) for values in zip(*pixels, strict=True))
        right, bottom = (math.ceil(max(values)) for values in zip(*pixels, strict=True))
        size = (max(1, right - left), max(1, bottom - top))
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in pixels], fill=255)
        self.draw.polygon(pixels, fill=shadow)
        lit = ImageChops.multiply(mask, _roundness().resize(size, Image.Resampling.BILINEAR))
        self.canvas.paste(texture.resize(size, Image.Resampling.BILINEAR), (left, top), lit)

    def shade(self, centre: Point, rx: float, ry: float, strength: float) -> None:
        """Darken a soft ellipse, such as the shadow under a figure; strength 0..1."""
        (x, y), (kx, ky) = self.pixels([centre])[0], self.scale
        size = (max(1, round(2 * rx * kx)), max(1, round(2 * ry * ky)))
        mask = _soft_ellipse().resize(size, Image.Resampling.BILINEAR).point(lambda value: int(value * strength))
        self.canvas.paste((12, 12, 16), (round(x - size[0] / 2), round(y - size[1] / 2)), mask)


@lru_cache(maxsize=1)
def _roundness() -> Image.Image:
    """How much light each column of a cylinder gets from the upper left."""
    row = 1.12 - 2.0 * (np.linspace(0.0, 1.0, 32) - 0.4) ** 2
    return Image.fromarray((255 * np.clip(row, 0.25, 1.0)).astype(np.uint8)[None])


@lru_cache(maxsize=1)
def _soft_ellipse() -> Image.Image:
    """A white disc that fades to black at its edge."""
    side = np.linspace(-1.0, 1.0, 33)
    inside = np.clip(1.0 - np.hypot(side[:, None], side), 0.0, 1.0)
    return Image.fromarray((255 * inside**0.7).astype(np.uint8))
