"""Synthetic pedestrians: what an identity wears and carries, and how it is drawn in a pose."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastreid_uns.data.datasets.synthetic.garment import HIGH, PATTERNS, TURN, garment
from fastreid_uns.data.datasets.synthetic.pen import Colour, Pen, Point, tone

CLOTHES: list[Colour] = [
    (38, 38, 44),
    (226, 224, 218),
    (178, 44, 46),
    (48, 74, 140),
    (128, 130, 134),
    (214, 174, 62),
    (62, 116, 72),
    (198, 176, 142),
    (116, 62, 116),
    (92, 158, 196),
    (206, 118, 62),
    (214, 140, 156),
]
SKINS: list[Colour] = [(236, 196, 168), (214, 164, 128), (168, 116, 82), (112, 76, 56)]
HAIRS: list[Colour] = [(30, 26, 26), (72, 48, 34), (150, 108, 62), (150, 148, 146), (128, 60, 36)]
SHOES: list[Colour] = [(34, 32, 34), (224, 222, 220), (120, 78, 50)]
BAGS = ("none", "backpack", "shoulder", "hand", "backpack", "none")
HIP, KNEE, WRIST, FLANK = 0.5, 0.235, 0.145, 0.205  # heights and lengths in units of the figure, head at 0, sole at 1


class Person(NamedTuple):
    """What stays the same about a pedestrian from camera to camera."""

    build: float
    skin: Colour
    hair: Colour
    hair_style: str
    hat: str
    upper: Colour
    lower: Colour
    accent: Colour  # of hat, bag and trouser stripe
    shoes: Colour
    sleeve: str
    hem: float  # height at which the upper garment ends
    lower_kind: str
    stripe: bool
    bag: str
    cloth: Image.Image  # see `garment`


class Pose(NamedTuple):
    """How a pedestrian stands to the camera in one image; angles in radians."""

    yaw: float  # 0 = faces the camera, pi/2 = walks to the right
    phase: float  # of the step
    stride: float
    lean: float
    elbow: float
    pitch: float  # how much lower nearer things appear: height of the camera


def make_person(group: np.random.Generator, own: np.random.Generator, member: int, difficulty: float) -> Person:
    """Dress one pedestrian.

    Args:
        group: generator in the same state for all members of a group of look-alikes, who share four colours.
        own: generator of this identity.
        member: place in the group; members differ in arrangement, pattern and accessories.
        difficulty: 0..1; the higher, the fewer colours there are.
    """
    palette = CLOTHES[: round(12 - 6 * difficulty**2)]
    shared = [palette[i] for i in group.permutation(len(palette))[:4]]
    places = [int(i) for i in np.roll(group.permutation(4), member)]
    upper, second, lower, accent = (tone(shared[i], own.uniform(0.93, 1.07)) for i in places)
    pattern = int(group.permutation(len(PATTERNS))[member % len(PATTERNS)])
    kind = str(own.choice(["trousers", "trousers", "trousers", "shorts", "skirt"]))
    hem = 0.5 if kind == "skirt" else float(own.choice([0.5, 0.52, 0.55, 0.66]))
    return Person(
        build=float(own.uniform(0.9, 1.3)),
        skin=SKINS[own.integers(len(SKINS))],
        hair=HAIRS[own.integers(len(HAIRS))],
        hair_style=str(own.choice(["short", "short", "long", "bun", "bald"])),
        hat=str(own.choice(["none", "none", "none", "cap", "beanie"])),
        upper=upper,
        lower=tone(lower, 0.9),
        accent=accent,
        shoes=[*SHOES, accent][own.integers(4)],
        sleeve="long" if hem > 0.6 else str(own.choice(["long", "long", "short", "none"])),
        hem=hem,
        lower_kind=kind,
        stripe=bool(own.random() < 0.25),
        bag=BAGS[(int(group.integers(len(BAGS))) + member) % len(BAGS)],
        cloth=garment(pattern, upper, second, own),
    )


def draw_person(pen: Pen, who: Person, pose: Pose) -> None:
    """Draw a pedestrian; the pen's zero is above the middle of the head, one unit is the height of the figure."""
    figure = _Figure(pen, who, pose)
    near = -1 if figure.sin > 0 else 1
    faces = figure.cos > 0
    pen.shade((0.0, 0.985), 0.2, 0.05, 0.6)
    if faces:
        figure.backpack()
        figure.long_hair()
    figure.arm(-near)
    figure.leg(-near)
    figure.leg(near)
    figure.skirt()
    figure.trunk()
    if faces:
        figure.straps()
    figure.head()
    if not faces:
        figure.long_hair()
        figure.backpack()
    figure.shoulder_bag()
    figure.arm(near)


class _Figure:
    """One pedestrian in one pose: joints in units of its height, x to its left hand, y down, z forward."""

    def __init__(self, pen: Pen, who: Person, pose: Pose) -> None:
        self.pen, self.who, self.pose = pen, who, pose
        self.cos, self.sin = math.cos(pose.yaw), math.sin(pose.yaw)

    def at(self, x: float, y: float, z: float) -> Point:
        """Where a joint appears."""
        z += self.pose.lean * max(0.0, HIP - y)
        return x * self.cos + z * self.sin, y + self.pose.pitch * (z * self.cos - x * self.sin)

    def half_width(self, across: float, deep: float) -> float:
        """Half the width at which a trunk of elliptic section appears."""
        return math.hypot(across * self.cos, deep * self.sin)

    def shadow(self, side: int) -> float:
        """Tone of the limb of one side: the far one is darker where both are seen from the side."""
        return 1.0 if -side * self.sin > -0.35 else 0.78

    def box(self, x: float, top: float, low: float, wide: float, colour: Colour) -> None:
        """A bag: lit front with a darker right and lower edge."""
        self.pen.polygon([(x - wide, top), (x + wide, top), (x + wide, low), (x - wide, low)], tone(colour, 0.7))
        lit, bottom = x + 0.78 * wide, low - 0.012
        self.pen.polygon([(x - wide, top), (lit, top), (lit, bottom), (x - wide, bottom)], colour)

    def leg(self, side: int) -> None:
        """One leg with its shoe."""
        who, shadow = self.who, self.shadow(side)
        phase = self.pose.phase + (math.pi if side < 0 else 0.0)
        swing = self.pose.stride * math.sin(phase)
        bent = swing - self.pose.stride * (0.25 + 0.9 * max(0.0, math.cos(phase)))
        x = side * 0.046 * who.build
        knee = (x, HIP + KNEE * math.cos(swing), KNEE * math.sin(swing))
        ankle = (x, knee[1] + 0.215 * math.cos(bent), knee[2] + 0.215 * math.sin(bent))
        toe = (x * 1.15, ankle[1] + 0.018 - 0.05 * min(0.0, bent), ankle[2] + 0.062)
        cloth, skin = tone(who.lower, shadow), tone(who.skin, shadow)
        thigh = skin if who.lower_kind == "skirt" else cloth
        shin = cloth if who.lower_kind == "trousers" else skin
        r = 0.024 + 0.026 * who.build
        joints = [self.at(x, HIP, 0.0), self.at(*knee), self.at(*ankle)]
        self.pen.limb([joints[2], self.at(*toe)], [0.024, 0.017], [tone(who.shoes, shadow)])
        if shin == cloth:
            self.pen.limb(joints, [1.14 * r, 0.84 * r, 0.64 * r], [thigh, shin])
        else:
            self.pen.limb(joints[1:], [0.68 * r, 0.46 * r], [shin])
            self.pen.limb(joints[:2], [1.14 * r, (0.7 if thigh == skin else 0.95) * r], [thigh])
        if who.stripe and who.lower_kind == "trousers":
            self.pen.line(joints, 0.016, tone(who.accent, shadow))

    def arm(self, side: int) -> None:
        """One arm; the left one holds the hand bag."""
        who, shadow = self.who, self.shadow(side)
        phase = self.pose.phase + (math.pi if side < 0 else 0.0)
        swing = -0.75 * self.pose.stride * math.sin(phase)
        fore = swing + self.pose.elbow
        x = side * 0.092 * who.build
        elbow = (x * 1.2, FLANK + 0.15 * math.cos(swing), 0.15 * math.sin(swing))
        hand = (x * 1.22, elbow[1] + WRIST * math.cos(fore), elbow[2] + WRIST * math.sin(fore))
        cloth, skin = tone(who.upper, 0.93 * shadow), tone(who.skin, shadow)
        joints = [self.at(x, FLANK, 0.0), self.at(*elbow), self.at(*hand)]
        r = 0.013 + 0.019 * who.build
        self.pen.ellipse(joints[2], 0.02, 0.024, skin)
        colours = [skin if who.sleeve == "none" else cloth, cloth if who.sleeve == "long" else skin]
        self.pen.limb(joints, [1.1 * r, 0.88 * r, 0.64 * r], colours)
        if who.bag == "hand" and side > 0:
            (a, b), wide = joints[2], self.half_width(0.035, 0.075)
            self.pen.line([(a, b), (a, b + 0.05)], 0.014, tone(who.accent, 0.6 * shadow))
            self.box(a, b + 0.045, b + 0.16, wide, tone(who.accent, shadow))

    def skirt(self) -> None:
        """The skirt, if there is one."""
        who = self.who
        if who.lower_kind != "skirt":
            return
        x, y = self.at(0.0, 0.46, 0.0)
        hip = self.half_width(0.088 * who.build, 0.066 * who.build)
        flare = 1.25 * hip + 0.02
        self.pen.polygon(
            [(x - hip, y), (x + hip, y), (x + flare, 0.69), (x, 0.7), (x - flare, 0.69)], tone(who.lower, 0.78)
        )
        self.pen.polygon([(x - hip, y), (x + 0.5 * hip, y), (x + 0.5 * flare, 0.695), (x - flare, 0.69)], who.lower)

    def trunk(self) -> None:
        """The upper garment with the part of its cloth that faces the camera."""
        who, build = self.who, self.who.build
        top, mid, low = self.at(0, 0.155, 0), self.at(0, 0.36, 0), self.at(0, who.hem, 0)
        shoulder = self.half_width(0.108 * build, 0.062 * build)
        waist = self.half_width(0.09 * build, 0.064 * build)
        hem = self.half_width(0.096 * build, 0.07 * build) * (1.2 if who.hem > 0.6 else 1.0)
        outline = [
            (0.034, 0.0, top),
            (0.72 * shoulder, 0.014, top),
            (0.93 * shoulder, 0.03, top),
            (shoulder, 0.06, top),
            (waist, 0.0, mid),
            (hem, -0.006, low),
            (0.5 * hem, 0.003, low),
        ]
        right = [(x + dx, y + dy) for dx, dy, (x, y) in outline]
        left = [(x - dx, y + dy) for dx, dy, (x, y) in outline]
        centre = TURN * (1.0 - math.remainder(self.pose.yaw, 2 * math.pi) / (2 * math.pi))
        seen = who.cloth.crop((round(centre - 0.21 * TURN), 0, round(centre + 0.21 * TURN), HIGH))
        self.pen.cloth([*right, *left[::-1]], seen, tone(who.upper, 0.42))

    def head(self) -> None:
        """Neck, head, hair and hat."""
        who, pen = self.who, self.pen
        pen.limb([self.at(0, 0.115, 0), self.at(0, 0.168, 0)], [0.027, 0.034], [tone(who.skin, 0.88)])
        skull, face = self.at(0, 0.066, -0.008), self.at(0, 0.076, 0.016)
        hair = who.skin if who.hair_style == "bald" else who.hair
        if self.cos < 0:
            pen.ellipse(face, 0.042, 0.052, who.skin)
        pen.ellipse(skull, 0.05, 0.054, tone(hair, 0.8))
        pen.ellipse((skull[0] - 0.008, skull[1] - 0.008), 0.038, 0.042, hair)
        if self.cos >= 0:
            pen.ellipse(face, 0.04, 0.05, tone(who.skin, 0.86))
            pen.ellipse((face[0] - 0.006, face[1]), 0.033, 0.045, who.skin)
            pen.ellipse(self.at(0, 0.034, 0.02), 0.04, 0.02, hair)
        if self.cos > 0.3:
            for side in (-1, 1):
                pen.ellipse(self.at(side * 0.016, 0.07, 0.05), 0.0055, 0.0055, (40, 32, 32))
        if who.hair_style == "bun":
            pen.ellipse(self.at(0, 0.03, -0.052), 0.024, 0.024, hair)
        if who.hat != "none":
            self.hat()

    def hat(self) -> None:
        """A cap with its peak, or a beanie with its brim."""
        (x, y), r, colour = self.at(0, 0.05, -0.002), 0.056, self.who.accent
        angles = [i * math.pi / 8 for i in range(9)]
        self.pen.polygon([(x + r * math.cos(a), y - r * math.sin(a)) for a in angles], colour)
        if self.who.hat == "cap":
            self.pen.limb([self.at(0, 0.046, 0.03), self.at(0, 0.05, 0.085)], [0.014, 0.01], [tone(colour, 0.85)])
        else:
            self.pen.line([(x - r, y), (x + r, y)], 0.016, tone(colour, 0.75))

    def long_hair(self) -> None:
        """What falls on the shoulders."""
        if self.who.hair_style == "long":
            self.pen.limb([self.at(0, 0.06, -0.02), self.at(0, 0.2, -0.035)], [0.052, 0.046], [self.who.hair])

    def backpack(self) -> None:
        """The bag on the back."""
        if self.who.bag != "backpack":
            return
        colour, (x, y) = self.who.accent, self.at(0, 0.33, -0.1)
        wide, high = self.half_width(0.086, 0.054), 0.12
        right = [(0.7 * wide, -high), (wide, -0.75 * high), (wide, 0.85 * high), (0.85 * wide, high)]
        corners = [*right, *[(-a, b) for a, b in right[::-1]]]
        self.pen.polygon([(x + a, y + b) for a, b in corners], tone(colour, 0.68))
        self.pen.polygon([(x + 0.86 * a - 0.006, y + 0.9 * b) for a, b in corners], colour)
        self.pen.line([(x - 0.7 * wide, y + 0.02), (x + 0.6 * wide, y + 0.02)], 0.01, tone(colour, 0.6))

    def straps(self) -> None:
        """The straps of the backpack over the chest."""
        if self.who.bag == "backpack":
            for side in (-1, 1):
                strap = [self.at(side * 0.058, y, z) for y, z in ((0.17, 0.0), (0.24, 0.062), (0.38, 0.05))]
                self.pen.line(strap, 0.024, tone(self.who.accent, 0.85))

    def shoulder_bag(self) -> None:
        """A bag at the left hip, its strap over the right shoulder; the body hides the bag from the right."""
        if self.who.bag != "shoulder":
            return
        colour, x = self.who.accent, 0.115 * self.who.build
        chest = math.copysign(0.06, self.cos)
        strap = [self.at(-0.07, 0.172, 0.0), self.at(0.03, 0.34, chest), self.at(x, 0.47, 0.0)]
        self.pen.line(strap, 0.02, tone(colour, 0.7))
        if self.sin < 0.6:
            a, b = self.at(x, 0.52, 0.0)
            self.box(a, b - 0.055, b + 0.055, self.half_width(0.035, 0.08), colour)
