"""Side profiles of the synthetic vehicles, in metres."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A kind of vehicle in metres: the outline from the front bumper over the roof to the rear one."""

    outline: list[tuple[float, float]]  # forward, up
    strips: str  # of each piece of the outline: f(ront) h(ood) g(lass) r(oof) t(runk) b(ack) c(argo)
    panes: list[list[tuple[float, float]]]  # side windows
    wheels: tuple[float, float]
    radius: float
    half: float  # half the width up to the belt
    belt: float
    tumble: float  # loss of half width per metre above the belt
    door: tuple[float, float]  # middle of the front door: where a logo stands


SHAPES = {
    "sedan": Shape(
        outline=[
            (2.2, 0.25),
            (2.24, 0.68),
            (0.95, 0.94),
            (0.2, 1.42),
            (-0.85, 1.42),
            (-1.5, 1.0),
            (-2.16, 0.94),
            (-2.2, 0.3),
        ],
        strips="fhgrgtb",
        panes=[
            [(0.78, 0.98), (0.2, 1.35), (-0.25, 1.35), (-0.25, 0.98)],
            [(-0.34, 0.98), (-0.34, 1.35), (-0.8, 1.35), (-1.28, 1.02)],
        ],
        wheels=(1.38, -1.34),
        radius=0.33,
        half=0.9,
        belt=0.95,
        tumble=0.4,
        door=(0.2, 0.7),
    ),
    "hatchback": Shape(
        outline=[(1.95, 0.25), (2.0, 0.72), (1.0, 0.98), (0.4, 1.5), (-1.35, 1.5), (-1.9, 1.0), (-1.95, 0.3)],
        strips="fhgrgb",
        panes=[
            [(0.84, 1.02), (0.4, 1.42), (-0.2, 1.42), (-0.2, 1.02)],
            [(-0.29, 1.02), (-0.29, 1.42), (-1.2, 1.42), (-1.5, 1.06)],
        ],
        wheels=(1.25, -1.25),
        radius=0.33,
        half=0.86,
        belt=1.0,
        tumble=0.36,
        door=(0.25, 0.74),
    ),
    "suv": Shape(
        outline=[(2.2, 0.35), (2.25, 0.95), (1.1, 1.15), (0.5, 1.75), (-1.85, 1.75), (-2.2, 1.15), (-2.25, 0.4)],
        strips="fhgrgb",
        panes=[
            [(0.94, 1.2), (0.5, 1.66), (-0.2, 1.66), (-0.2, 1.2)],
            [(-0.3, 1.2), (-0.3, 1.66), (-1.15, 1.66), (-1.15, 1.2)],
            [(-1.25, 1.2), (-1.25, 1.66), (-1.75, 1.66), (-1.95, 1.24)],
        ],
        wheels=(1.4, -1.4),
        radius=0.4,
        half=0.95,
        belt=1.15,
        tumble=0.25,
        door=(0.3, 0.85),
    ),
    "van": Shape(
        outline=[(2.3, 0.3), (2.36, 0.95), (1.85, 1.15), (1.2, 2.0), (-2.3, 2.05), (-2.4, 1.3), (-2.42, 0.35)],
        strips="fhgrgb",
        panes=[[(1.7, 1.2), (1.2, 1.85), (0.6, 1.85), (0.6, 1.2)]],
        wheels=(1.55, -1.5),
        radius=0.35,
        half=0.97,
        belt=1.2,
        tumble=0.12,
        door=(-0.9, 1.1),
    ),
    "minibus": Shape(
        outline=[(2.5, 0.3), (2.56, 0.9), (2.4, 1.15), (1.9, 2.1), (-2.5, 2.15), (-2.6, 1.25), (-2.6, 0.35)],
        strips="ffgrgb",
        panes=[
            [(2.15, 1.2), (1.85, 1.95), (1.2, 1.95), (1.2, 1.2)],
            [(1.1, 1.2), (1.1, 1.95), (-0.1, 1.95), (-0.1, 1.2)],
            [(-0.2, 1.2), (-0.2, 1.95), (-1.3, 1.95), (-1.3, 1.2)],
            [(-1.4, 1.2), (-1.4, 1.95), (-2.4, 1.95), (-2.4, 1.2)],
        ],
        wheels=(1.6, -1.6),
        radius=0.36,
        half=1.0,
        belt=1.2,
        tumble=0.12,
        door=(0.2, 0.85),
    ),
    "pickup": Shape(
        outline=[
            (2.4, 0.4),
            (2.45, 0.95),
            (1.2, 1.12),
            (0.6, 1.7),
            (-0.4, 1.7),
            (-0.6, 1.12),
            (-2.45, 1.08),
            (-2.5, 0.45),
        ],
        strips="fhgrgtb",
        panes=[
            [(1.02, 1.17), (0.6, 1.6), (0.2, 1.6), (0.2, 1.17)],
            [(0.1, 1.17), (0.1, 1.6), (-0.35, 1.6), (-0.48, 1.17)],
        ],
        wheels=(1.5, -1.5),
        radius=0.4,
        half=0.95,
        belt=1.12,
        tumble=0.3,
        door=(0.4, 0.82),
    ),
    "truck": Shape(
        outline=[(2.9, 0.4), (2.95, 1.2), (2.7, 2.0), (1.6, 2.05), (1.5, 2.7), (-2.9, 2.7), (-2.9, 0.6)],
        strips="fgrccc",
        panes=[[(2.7, 1.3), (2.5, 1.9), (1.8, 1.9), (1.8, 1.3)]],
        wheels=(2.1, -1.9),
        radius=0.42,
        half=1.05,
        belt=3.0,
        tumble=0.0,
        door=(-0.7, 1.7),
    ),
}
