"""From a line of the plan to an image: a figure in a scene, seen by a camera with a taste of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops

from fastreid_uns.data.datasets.synthetic.pen import Pen
from fastreid_uns.data.datasets.synthetic.person import Person, Pose, draw_person, make_person
from fastreid_uns.data.datasets.synthetic.scene import draw_occluder, make_scene
from fastreid_uns.data.datasets.synthetic.vehicle import Posture, Vehicle, draw_vehicle, extent, make_vehicle

ENLARGE = 3  # the canvas is drawn this much larger than the image
STRANGER = 1_000_000  # identities from here on occur once, as passers-by and distractors
QUALITY = 90  # of JPEG
TURN = {"person": math.pi, "vehicle": 0.6 * math.pi}  # a vehicle shows less of itself on its other side
CAMERA, GROUP, IDENTITY, TRACKLET, FRAME, OCCLUDER = range(6)  # independent streams of random numbers


class Style(NamedTuple):
    """The knobs that decide what images look like."""

    kind: str
    difficulty: float
    camera_bias: float
    cameras: int
    size: tuple[int, int]  # height, width
    seed: int


class Shot(NamedTuple):
    """One image of the plan."""

    path: str  # below the folder of the set
    identity: int  # who is drawn, which the name need not tell
    camera: int
    tracklet: int  # one passage of an identity past a camera
    frame: int
    box: str  # "good", "bad" = beside the figure or a part of it, "empty" = nobody


class Camera(NamedTuple):
    """What one camera does to everything that it sees."""

    scene: Image.Image
    matrix: tuple[float, ...]  # of colours, 3 x 4
    gamma: tuple[float, float, float]
    floor: float  # haze: what black becomes, 0..1
    sharpness: float  # share of the resolution that is left
    grain: Image.Image  # noise around 128, twice the image size
    yaw: float  # direction of the way past it
    pitch: float


class Track(NamedTuple):
    """What the frames of one tracklet have in common."""

    yaw: float
    phase: float
    stride: float
    lean: float
    elbow: float
    speed: float
    scene: int  # camera whose scene is behind
    place: tuple[float, float]  # in the scene, 0..1
    light: float
    bystander: float  # where another figure stands, in widths from the middle; 0 = nowhere
    occluder: int  # -1 = none
    obstacle: float  # position of the occluder, 0..1


def write_shots(style: Style, shots: Sequence[Shot], folder: Path) -> int:
    """Render shots as JPEG files below `folder`; returns their number."""
    for shot in shots:
        render(style, shot).save(folder / shot.path, "JPEG", quality=QUALITY)
    return len(shots)


def render(style: Style, shot: Shot) -> Image.Image:
    """One RGB image; a function of its arguments alone."""
    high, wide = (ENLARGE * side for side in style.size)
    camera = _camera(style, shot.camera)
    track = _track(style, shot.identity, shot.camera, shot.tracklet)
    rng = np.random.default_rng([style.seed, FRAME, shot.identity, shot.camera, shot.tracklet, shot.frame])
    scene = _camera(style, track.scene).scene
    x = int((track.place[0] + 0.03 * shot.frame) % 1.0 * (scene.width - wide))
    y = int(track.place[1] * (scene.height - high))
    canvas = scene.crop((x, y, x + wide, y + high))
    spread = style.difficulty
    shift = [rng.normal(0.0, 0.07 * spread), rng.normal(0.0, 0.035 * spread)]
    zoom = math.exp(rng.normal(-0.03, 0.12 * spread))
    if shot.box == "bad":
        shift = [float(rng.choice([-1, 1])) * rng.uniform(0.4, 0.6), rng.uniform(-0.3, 0.3)]
        zoom = rng.uniform(0.7, 1.6)
    if track.bystander:
        behind = shot._replace(identity=STRANGER + 31 * shot.identity + shot.tracklet)
        aside = (shift[0] + track.bystander + 0.02 * shot.frame, shift[1] - 0.04, 0.92 * zoom)
        _figure(canvas, style, behind, track._replace(yaw=track.yaw + 2.0), aside, rng)
    if shot.box != "empty":
        _figure(canvas, style, shot, track, (shift[0], shift[1], zoom), rng)
    if track.occluder >= 0:
        here = np.random.default_rng([style.seed, OCCLUDER, shot.identity, shot.camera, shot.tracklet])
        draw_occluder(Pen(canvas, (0.0, 0.0), (wide, high)), here, track.occluder, track.obstacle + 0.05 * shot.frame)
    return _expose(style, canvas, camera, track.light + rng.normal(0.0, 0.04 * spread), rng)


def _figure(
    canvas: Image.Image,
    style: Style,
    shot: Shot,
    track: Track,
    place: tuple[float, float, float],
    rng: np.random.Generator,
) -> None:
    """Draw who is in the shot, `place` being the shift from the middle in image sizes, and the zoom."""
    wide, high = canvas.size
    middle, zoom = (wide * (0.5 + place[0]), high * (0.5 + place[1])), place[2]
    pitch, phase = _camera(style, shot.camera).pitch, track.phase + 0.8 * track.speed * shot.frame
    yaw = track.yaw + rng.normal(0.0, 0.15 * style.difficulty)
    who = _identity(style, shot.identity)
    if isinstance(who, Person):
        scale = (2.15 * wide * zoom, 0.97 * high * zoom)
        pose = Pose(yaw, phase, track.stride, track.lean, track.elbow, pitch)
        draw_person(Pen(canvas, (middle[0], middle[1] - 0.5 * scale[1]), scale), who, pose)
        return
    posture = Posture(yaw, pitch)
    left, top, right, bottom = extent(who.shape, posture)
    kx, ky = 0.88 * wide / (right - left), 0.84 * high / (bottom - top)
    scale = (zoom * min(kx, 1.35 * ky * wide / high), zoom * min(ky, 1.35 * kx * high / wide))
    centre = (middle[0] - (left + right) / 2 * scale[0], middle[1] - (top + bottom) / 2 * scale[1])
    draw_vehicle(Pen(canvas, centre, scale), who, posture)


def _expose(style: Style, canvas: Image.Image, camera: Camera, light: float, rng: np.random.Generator) -> Image.Image:
    """What the camera makes of the canvas: resolution, colours, brightness and noise."""
    high, wide = style.size
    coarse = (max(4, round(wide * camera.sharpness)), max(4, round(high * camera.sharpness)))
    image = canvas.resize(coarse, Image.Resampling.BOX).resize((wide, high), Image.Resampling.BILINEAR)
    levels = np.linspace(0.0, 1.0, 256)
    curves = [camera.floor + (1 - camera.floor) * math.exp(light) * levels**gamma for gamma in camera.gamma]
    table = (np.clip(np.concatenate(curves), 0.0, 1.0) * 255).astype(np.uint8).tolist()
    image = image.convert("RGB", camera.matrix).point(table)
    x, y = int(rng.integers(wide)), int(rng.integers(high))
    return ImageChops.add(image, camera.grain.crop((x, y, x + wide, y + high)), 1.0, -128)


@lru_cache(maxsize=64)
def _camera(style: Style, number: int) -> Camera:
    bias, strong = style.camera_bias, style.camera_bias**2
    rng = np.random.default_rng([style.seed, CAMERA, number])
    place = np.random.default_rng([style.seed, CAMERA, number, 1])
    high, wide = style.size
    horizon = (0.3, 0.5) if style.kind == "person" else (0.12, 0.35)
    gains = np.exp(rng.uniform(-0.25, 0.25, 3) * strong + rng.uniform(-0.3, 0.2) * strong)
    saturation = 1.0 - strong * rng.uniform(0.0, 0.7)
    grey = np.full((3, 3), [0.3, 0.59, 0.11])
    matrix = np.diag(gains) @ (saturation * np.eye(3) + (1 - saturation) * grey)
    gamma = np.exp(rng.uniform(-0.25, 0.25) * strong + rng.uniform(-0.1, 0.1, 3) * strong)
    sigma = 3.0 + 14.0 * bias * rng.uniform() * (0.5 + style.difficulty)
    grain = place.normal(128.0, sigma, (2 * high, 2 * wide, 3))
    return Camera(
        scene=make_scene(place, (4 * ENLARGE * wide, int(1.3 * ENLARGE * high)), horizon),
        matrix=tuple(float(v) for row in matrix for v in (*row, 0.0)),
        gamma=(float(gamma[0]), float(gamma[1]), float(gamma[2])),
        floor=float(strong * rng.uniform(0.0, 0.25)),
        sharpness=float(1.0 - bias * rng.uniform(0.0, 0.8)),
        grain=Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)),
        yaw=float(rng.uniform(-TURN[style.kind], TURN[style.kind]) * style.difficulty),
        pitch=float(rng.uniform(0.06, 0.22) if style.kind == "person" else rng.uniform(0.12, 0.4)),
    )


@lru_cache(maxsize=64)
def _track(style: Style, identity: int, camera: int, tracklet: int) -> Track:
    rng = np.random.default_rng([style.seed, TRACKLET, identity, camera, tracklet])
    spread = style.difficulty
    turned = math.pi * (rng.random() < 0.35 * spread * TURN[style.kind] / math.pi)
    return Track(
        yaw=_camera(style, camera).yaw + turned + rng.normal(0.0, 0.1 + 0.4 * spread),
        phase=rng.uniform(0.0, 2 * math.pi),
        stride=rng.uniform(0.1, 0.25 + 0.5 * spread),
        lean=rng.uniform(-0.05, 0.2) * 2 * spread,
        elbow=rng.uniform(0.1, 1.2),
        speed=rng.uniform(0.5, 1.0),
        scene=camera if rng.random() < style.camera_bias**2 else int(rng.integers(style.cameras)),
        place=(rng.uniform(), rng.uniform()),
        light=rng.normal(0.0, 0.12 * spread),
        bystander=float(rng.choice([-1, 1]) * rng.uniform(0.35, 0.55)) if rng.random() < 0.2 * spread else 0.0,
        occluder=int(rng.integers(4)) if rng.random() < 0.3 * spread else -1,
        obstacle=rng.uniform(0.1, 0.8),
    )


@lru_cache(maxsize=64)
def _identity(style: Style, number: int) -> Person | Vehicle:
    """Who or what an identity is; those of one group look alike, and groups grow with difficulty."""
    team, member = divmod(number, 1 + round(4 * style.difficulty))
    make = make_person if style.kind == "person" else make_vehicle
    group = np.random.default_rng([style.seed, GROUP, team])
    return make(group, np.random.default_rng([style.seed, IDENTITY, number]), member, style.difficulty)
