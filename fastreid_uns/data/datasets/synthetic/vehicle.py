"""Synthetic vehicles: bodies cut from a side profile, paint and decoration, and how they are drawn from any side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastreid_uns.data.datasets.synthetic.pen import Colour, Pen, Point, mix, tone
from fastreid_uns.data.datasets.synthetic.shapes import SHAPES

Space = tuple[float, float, float]  # metres: forward, left, up

PAINTS: list[Colour] = [
    (222, 222, 220),
    (40, 42, 46),
    (148, 152, 156),
    (164, 36, 38),
    (40, 66, 128),
    (206, 166, 52),
    (54, 98, 70),
    (186, 166, 136),
    (88, 134, 172),
    (112, 62, 42),
]
GLASS: Colour = (44, 54, 64)
RUBBER: Colour = (26, 26, 28)
PAPERS: list[Colour] = [(226, 220, 190), (214, 76, 58), (88, 150, 96)]
DISTANCE = 11.0  # metres from the camera to the middle of the vehicle
EYE = 0.7  # height of the middle of the view
DECORATIONS = ("plain", "side", "racing", "lower", "logo", "text", "roof", "hood", "doors", "wrap")


class Vehicle(NamedTuple):
    """What stays the same about a vehicle from camera to camera."""

    shape: str
    paint: Colour
    second: Colour
    roof: Colour
    decoration: str
    glass: Colour
    rim: Colour
    spokes: bool
    bumper: Colour
    plate: Colour
    extra: str  # on the roof
    stickers: tuple[bool, ...]  # behind the upper edge of the windscreen, from right to left
    scale: float  # of the height
    words: tuple[float, ...]  # lengths of the words of a text


def make_vehicle(group: np.random.Generator, own: np.random.Generator, member: int, difficulty: float) -> Vehicle:
    """Build and paint one vehicle.

    Args:
        group: generator in the same state for all members of a group of look-alikes, who share body and paint.
        own: generator of this identity.
        member: place in the group; members differ in decoration, and every other one swaps the two paints.
        difficulty: 0..1; the higher, the fewer paints there are.
    """
    paints = PAINTS[: round(10 - 5 * difficulty**2)]
    shared = [paints[i] for i in group.permutation(len(paints))[:2]]
    paint, second = (tone(shared[(member + i) % 2], own.uniform(0.94, 1.06)) for i in (0, 1))
    decoration = DECORATIONS[int(group.permutation(len(DECORATIONS))[member % len(DECORATIONS)])]
    names = list(SHAPES)
    shape = names[(int(group.integers(len(names))) + (member // 2) * 2) % len(names)]
    return Vehicle(
        shape=shape,
        paint=paint,
        second=second,
        roof=second if decoration == "roof" else paint,
        decoration=decoration,
        glass=tone(GLASS, own.uniform(0.6, 1.6)),
        rim=[(176, 178, 182), (60, 60, 64), (204, 204, 200), mix(second, (120, 120, 120), 0.4)][own.integers(4)],
        spokes=bool(own.random() < 0.5),
        bumper=paint if own.random() < 0.6 else (62, 62, 66),
        plate=[(236, 236, 232), (222, 188, 60), (60, 92, 168)][own.integers(3)],
        extra=str(own.choice(["none", "none", "rack", "sign", "sunroof", "light"])),
        stickers=tuple(bool(value) for value in own.random(5) < 0.5),
        scale=float(own.uniform(0.94, 1.06)),
        words=tuple(float(value) for value in own.uniform(0.12, 0.4, 5)),
    )


class Posture(NamedTuple):
    """From where a vehicle is seen; radians."""

    yaw: float  # 0 = comes towards the camera, pi/2 = drives to the right
    pitch: float  # of the camera, looking down


@lru_cache(maxsize=64)
def extent(shape: str, posture: Posture) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a vehicle as it appears, in metres from the middle of the view."""
    body = SHAPES[shape]
    points = [
        _project((x, side * body.half, z), posture)
        for x, z in [*body.outline, (body.outline[0][0], 0.0), (body.outline[-1][0], 0.0)]
        for side in (-1, 1)
    ]
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def draw_vehicle(pen: Pen, car: Vehicle, posture: Posture) -> None:
    """Draw a vehicle; the pen's zero is the middle of the view, one unit is a metre."""
    _Figure(pen, car, posture).draw()


def _project(point: Space, posture: Posture) -> Point:
    x, y, z = point
    cos, sin = math.cos(posture.yaw), math.sin(posture.yaw)
    near = x * cos - y * sin
    closer = DISTANCE / (DISTANCE - near)
    down = near * math.sin(posture.pitch) - (z - EYE) * math.cos(posture.pitch)
    return closer * (x * sin + y * cos), closer * down


class _Figure:
    """One vehicle from one side."""

    def __init__(self, pen: Pen, car: Vehicle, posture: Posture) -> None:
        self.pen, self.car, self.posture = pen, car, posture
        self.shape = SHAPES[car.shape]
        self.cos, self.sin = math.cos(posture.yaw), math.sin(posture.yaw)
        self.near = -1 if self.sin > 0 else 1  # the side that is seen: 1 = left

    def at(self, x: float, y: float, z: float) -> Point:
        """Where a point appears."""
        return _project((x, y, z * self.car.scale), self.posture)

    def half(self, z: float) -> float:
        """Half the width at a height."""
        return self.shape.half - self.shape.tumble * max(0.0, z - self.shape.belt)

    def side(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a shape on the side that is seen, points being (forward, up)."""
        light = 0.9 - 0.14 * self.cos * self.near
        self.pen.polygon([self.at(x, self.near * self.half(z), z) for x, z in points], tone(colour, light))

    def slab(self, front: float, rear: float, low: float, high: float, colour: Colour) -> None:
        """Fill a rectangle on the side that is seen."""
        self.side([(front, low), (front, high), (rear, high), (rear, low)], colour)

    def patch(self, strip: int, left: float, right: float, low: float, high: float, colour: Colour) -> None:
        """Fill a part of one strip of the outline.

        Args:
            strip: number of the strip.
            left: -1 = right edge of the vehicle, 1 = its left edge.
            right: likewise.
            low: share of the way along the strip, from front to rear.
            high: likewise.
            colour: before light.
        """
        (x0, z0), (x1, z1) = self.shape.outline[strip : strip + 2]
        corners = []
        for across, along in ((left, low), (right, low), (right, high), (left, high)):
            x, z = x0 + along * (x1 - x0), z0 + along * (z1 - z0)
            corners.append(self.at(x, across * self.half(z), z))
        up = (x0 - x1) / math.hypot(x1 - x0, z1 - z0)
        ahead = (z1 - z0) / math.hypot(x1 - x0, z1 - z0)
        self.pen.polygon(corners, tone(colour, 0.86 + 0.18 * up - 0.1 * ahead * self.sin))

    def faces(self, strip: int) -> bool:
        """Whether a strip is seen."""
        (x0, z0), (x1, z1) = self.shape.outline[strip : strip + 2]
        return (z1 - z0) * self.cos * math.cos(self.posture.pitch) + (x0 - x1) * math.sin(self.posture.pitch) > 0

    def draw(self) -> None:
        """Everything, the far parts first."""
        shape = self.shape
        front, rear = shape.outline[0][0] + 0.05, shape.outline[-1][0] - 0.05
        wide = abs(front * self.sin) + abs(shape.half * self.cos)
        deep = abs(front * self.cos) + abs(shape.half * self.sin)
        self.pen.shade(self.at(0.0, 0.0, 0.0), 1.15 * wide, max(0.35, 1.2 * deep * math.sin(self.posture.pitch)), 0.75)
        self.tyres()
        floor = [(front, 1), (front, -1), (rear, -1), (rear, 1)]
        self.pen.polygon([self.at(x, y * 0.95 * shape.half, 0.22) for x, y in floor], RUBBER)
        middle = [(a[0] + b[0]) * self.cos for a, b in zip(shape.outline, shape.outline[1:], strict=False)]
        for strip in sorted(filter(self.faces, range(len(shape.strips))), key=middle.__getitem__):
            self.strip(strip)
        if abs(self.sin) * DISTANCE > shape.half:
            self.flank()
        if self.car.extra in ("sign", "light", "rack"):
            self.roof_extra()

    def tyres(self) -> None:
        """The wheels as far as they are seen below the body."""
        r = self.shape.radius
        half = max(0.13 * abs(self.cos), 0.05) + 0.8 * r * abs(self.sin)
        for x in sorted(self.shape.wheels, key=lambda x: x * self.cos):
            for side in (-self.near, self.near):
                (a, top), (b, low) = (self.at(x, side * 0.82 * self.shape.half, z) for z in (r, 0.1))
                corners = [(a - half, top), (a + half, top), (b + 0.9 * half, low), (b - 0.9 * half, low)]
                self.pen.polygon(corners, RUBBER)

    def strip(self, number: int) -> None:
        """One strip of the outline with what is on it."""
        car, kind = self.car, self.shape.strips[number]
        wraps = car.decoration == "racing" or (car.decoration == "hood" and kind in "hf")
        base = {"r": car.roof, "c": car.second}.get(kind, car.paint)
        if kind == "g":
            self.patch(number, -1, 1, 0, 1, base)
            self.patch(number, -0.9, 0.9, 0.06, 0.94, car.glass)
            self.patch(number, -0.9, -0.1, 0.1, 0.5, tone(car.glass, 1.35))
            if number < 3:
                self.stickers(number)
            return
        self.patch(number, -1, 1, 0, 1, base)
        if wraps and kind in "hrtfb":
            self.patch(number, -0.34, -0.06, 0, 1, car.second)
            self.patch(number, 0.06, 0.34, 0, 1, car.second)
        if kind == "r" and car.extra == "sunroof":
            self.patch(number, -0.6, 0.6, 0.15, 0.5, tone(car.glass, 0.7))
        if kind == "t" and car.shape == "pickup":
            self.patch(number, -0.86, 0.86, 0.05, 0.94, tone(car.second, 0.45))
        if kind == "f" and number == 0:
            self.face(number, front=True)
        if kind == "b" or (kind == "c" and number == len(self.shape.strips) - 1):
            self.face(number, front=False)

    def face(self, strip: int, front: bool) -> None:
        """Lights, grille, plate and bumper at one end of the vehicle."""
        car = self.car
        low = (lambda a: a) if front else (lambda a: 1 - a)
        self.patch(strip, -1, 1, low(0.0), low(0.34), car.bumper)
        if front:
            self.patch(strip, -0.5, 0.5, 0.48, 0.86, (34, 34, 38))
        if car.decoration == "lower":
            self.patch(strip, -1, 1, low(0.0), low(0.45), car.second)
        for side in (-1, 1):
            lamp = (240, 238, 214) if front else (176, 30, 30)
            top = 0.9 if front else 0.84
            self.patch(strip, side * 0.95, side * (0.58 if front else 0.7), low(0.56 if front else 0.5), low(top), lamp)
        self.patch(strip, -0.26, 0.26, low(0.14), low(0.34), car.plate)

    def stickers(self, strip: int) -> None:
        """Papers behind the windscreen."""
        for place, there in enumerate(self.car.stickers):
            if there:
                left = -0.8 + 0.2 * place
                self.patch(strip, left, left + 0.16, 0.76, 0.92, PAPERS[place % len(PAPERS)])

    def flank(self) -> None:
        """The side with windows, decoration and wheels."""
        car, shape = self.car, self.shape
        front, rear = shape.outline[0][0], shape.outline[-1][0]
        low = max(shape.outline[0][1], shape.outline[-1][1])
        self.side(shape.outline, car.paint)
        self.slab(front, rear, low, 0.62 * shape.belt, tone(car.paint, 0.88))
        if car.shape == "truck":
            self.slab(1.5, -2.9, 0.75, 2.7, car.second)
            self.slab(1.6, -2.9, 0.5, 0.8, (58, 58, 62))
        elif car.roof != car.paint:
            self.side([point for point in shape.outline if point[1] > shape.belt + 0.12], car.roof)
        for pane in shape.panes:
            self.side(pane, car.glass)
            (a, low_a), (b, high_b), (c, _), (d, _) = pane
            self.side([(a, low_a), (b, high_b), ((b + c) / 2, high_b), ((2 * a + d) / 3, low_a)], tone(car.glass, 1.3))
        self.decorate(front, rear)
        if car.decoration == "lower":
            self.slab(front, rear, low, 0.8 if car.shape == "truck" else 0.55 * shape.belt, car.second)
        elif car.bumper != car.paint:
            self.slab(front, rear, low, 0.8 if car.shape == "truck" else 0.38 * shape.belt, car.bumper)
        for x in shape.wheels:
            self.wheel(x)

    def decorate(self, front: float, rear: float) -> None:
        """What is painted on the side."""
        car, (x, z) = self.car, self.shape.door
        colour = car.paint if car.shape == "truck" else car.second
        if car.decoration == "side":
            self.slab(0.97 * front, 0.97 * rear, z - 0.06, z + 0.08, colour)
        elif car.decoration == "doors":
            self.slab(x + 0.55, x - 0.55, z - 0.3, z + 0.25, colour)
        elif car.decoration == "wrap":
            corners = [
                (0.15 * rear, z - 0.35),
                (0.45 * rear, z + 0.26),
                (0.99 * rear, z + 0.26),
                (0.99 * rear, z - 0.35),
            ]
            self.side(corners, colour)
        elif car.decoration == "logo":
            angles = [i * math.pi / 5 for i in range(10)]
            self.side([(x + 0.27 * math.cos(a), z + 0.27 * math.sin(a)) for a in angles], colour)
        elif car.decoration == "text":
            left = x + 0.8
            for word in car.words:
                self.slab(left, left - word, z - 0.1, z + 0.12, colour)
                left -= word + 0.12

    def wheel(self, x: float) -> None:
        """One wheel of the side that is seen."""
        r, flat = self.shape.radius, max(0.12, abs(self.sin))
        centre = self.at(x, self.near * 0.99 * self.shape.half, r / self.car.scale)
        self.pen.ellipse(centre, 1.16 * r * flat, 1.16 * r, (20, 20, 22))
        self.pen.ellipse(centre, r * flat, r, RUBBER)
        self.pen.ellipse(centre, 0.66 * r * flat, 0.66 * r, self.car.rim)
        if self.car.spokes:
            for turn in range(5):
                angle = turn * 2 * math.pi / 5 + 0.3
                end = (centre[0] + 0.62 * r * flat * math.cos(angle), centre[1] + 0.62 * r * math.sin(angle))
                self.pen.line([centre, end], 0.05, tone(self.car.rim, 0.45))
        else:
            self.pen.ellipse(centre, 0.22 * r * flat, 0.22 * r, tone(self.car.rim, 0.5))

    def roof_extra(self) -> None:
        """A taxi sign, a warning light or a rack."""
        strip = self.shape.strips.index("r")
        (x0, z0), (x1, z1) = self.shape.outline[strip : strip + 2]
        if self.car.extra == "rack":
            for x in (x0 - 0.15, (x0 + x1) / 2, x1 + 0.15):
                ends = [self.at(x, side * self.half(z0), z0 + 0.1) for side in (-1, 1)]
                self.pen.line(ends, 0.05, (48, 48, 52))
            for side in (-1, 1):
                ends = [self.at(x, side * 0.94 * self.half(z0), z0 + 0.1) for x in (x0 - 0.1, x1 + 0.1)]
                self.pen.line(ends, 0.06, (70, 70, 74))
            return
        middle, z = (x0 + x1) / 2, (z0 + z1) / 2
        colour: Colour = (240, 196, 60) if self.car.extra == "sign" else (60, 110, 220)
        shift = math.copysign(0.12, self.cos)
        for x, light in ((middle - shift, 0.7), (middle + shift, 1.0)):
            corners = [(-0.36, z), (0.36, z), (0.36, z + 0.2), (-0.36, z + 0.2)]
            self.pen.polygon([self.at(x, y, high) for y, high in corners], tone(colour, light))
        if abs(self.sin) > 0.3:
            corners = [(middle - 0.12, z), (middle + 0.12, z), (middle + 0.12, z + 0.2), (middle - 0.12, z + 0.2)]
            self.pen.polygon([self.at(x, 0.36 * self.near, high) for x, high in corners], tone(colour, 0.85))
