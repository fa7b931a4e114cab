"""Small pictures that are drawn here, each with three known attributes.

A picture is drawn at four times its size on a plane that spans [-1, 1] both ways, y upwards:
shapes are signed distances (negative inside), and colours are given by hue and luminance, so that
a subject can be told from any background whatever its hue. A subject says what is drawn, a
background what is behind it, and a style how both come onto the paper.
"""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

SIZE = 16
DETAIL = 4  # points on a side of each pixel, which is their average
FINE = DETAIL * SIZE
PIXEL = 2 / SIZE

Pictures = dict[str, np.ndarray]
"""{"image": float32 [n, 16, 16, 3] in [-1, 1]; "subject", "style", "background": int32 [n]}."""


class Plane(NamedTuple):
    """Coordinates of all points, each [FINE, FINE]."""

    x: np.ndarray
    y: np.ndarray


Part = tuple[np.ndarray, int]
"""The signed distance to a part of a subject, and which of its colours that has."""
MAIN, SECOND, ACCENT = range(3)
Subject = Callable[[Plane, Generator], list[Part]]


class Scene(NamedTuple):
    """What a style renders.

    Attributes:
      ground: colours of the background.
      paint: colours of the subject, everywhere.
      distance: signed distance to the subject's silhouette.
      edges: distance to the nearest visible edge of a part of the subject.
      rim: a colour that stands out of the background.
    """

    ground: np.ndarray
    paint: np.ndarray
    distance: np.ndarray
    edges: np.ndarray
    rim: np.ndarray


def draw(count: int, seed: int) -> Pictures:
    """Draws pictures whose attributes are spread evenly over all combinations.

    Each picture is a function of the seed and its position: more pictures begin with the same ones.

    Args:
      count: number of pictures.
      seed: of the attributes' order, and of everything that varies within an attribute.

    Returns:
      The pictures with their attributes, as positions in SUBJECTS, STYLES and BACKGROUNDS.
    """
    names = (SUBJECTS, STYLES, BACKGROUNDS)
    combinations = np.array(list(product(*(range(len(each)) for each in names))), np.int32)
    rounds = range(-(-count // len(combinations)))
    orders = [np.random.default_rng([seed, 0, each]).permutation(combinations) for each in rounds]
    chosen = np.concatenate([combinations[:0], *orders])[:count]
    images = np.empty((count, SIZE, SIZE, 3), np.float32)
    for position, (subject, style, background) in enumerate(chosen):
        rng = np.random.default_rng([seed, 1, position])
        images[position] = draw_one(subject, style, background, rng)
    subjects, styles, backgrounds = chosen.T
    return {"image": images, "subject": subjects, "style": styles, "background": backgrounds}


def draw_one(subject: int, style: int, background: int, rng: Generator) -> np.ndarray:
    """Draws one picture.

    Args:
      subject: position in SUBJECTS.
      style: position in STYLES.
      background: position in BACKGROUNDS.
      rng: what everything that varies is drawn from.

    Returns:
      The picture, float32 [16, 16, 3] in [-1, 1].
    """
    ground = _BACKGROUNDS[background](_plane(), rng)
    scene = _scene(_SUBJECTS[subject], ground, rng)
    fine = _STYLES[style](scene, rng).clip(0, 1)
    image = fine.reshape(SIZE, DETAIL, SIZE, DETAIL, 3).mean(axis=(1, 3))
    return (2 * image - 1).astype(np.float32)


def _scene(subject: Subject, ground: np.ndarray, rng: Generator) -> Scene:
    """Places a subject on a background, in colours that stand out of it."""
    scale, angle = rng.uniform(0.78, 0.9), np.deg2rad(rng.uniform(-8, 8))
    plane = _plane()
    x, y = (each - rng.uniform(-0.5, 0.5) * (1 - scale) for each in plane)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    parts = [(scale * d, kind) for d, kind in subject(Plane(u / scale, v / scale), rng)]

    distance = _union(*(part for part, _ in parts))
    is_dark = _luminance(ground)[distance < 2 * PIXEL].mean() < 0.45
    main, second, accent, rim = (0.72, 0.9, 0.08, 1.0) if is_dark else (0.25, 0.4, 0.95, 0.02)
    hue = rng.random()
    colours = (
        _colour(hue, main + rng.uniform(-0.08, 0.08)),
        _colour(hue + rng.uniform(0.2, 0.8), second),
        _colour(hue, accent),
    )
    paint, edges = np.broadcast_to(colours[MAIN], ground.shape), np.full_like(distance, 9.0)
    for part, kind in parts:
        paint = _mix(paint, colours[kind], _cover(part))
        edges = np.where(part < 0, -part, np.minimum(edges, part))
    return Scene(ground, paint, distance, edges, _colour(hue, rim))


# Tools.


@cache
def _plane() -> Plane:
    ticks = (np.arange(FINE) + 0.5) / FINE * 2 - 1
    return Plane(*np.meshgrid(ticks, -ticks))


@cache
def _stretching(cells: int) -> np.ndarray:
    """Weights [FINE, cells] that interpolate between cells."""
    ticks = np.linspace(0, cells - 1, FINE)[:, None]
    return np.maximum(0, 1 - np.abs(ticks - np.arange(cells)))


@cache
def _smoothing(width: float) -> np.ndarray:
    """Weights [FINE, FINE] that blur over a width in pixels."""
    ticks = np.arange(FINE) * SIZE / FINE
    weights = np.exp(-((ticks[:, None] - ticks) ** 2) / (2 * width**2))
    return weights / weights.sum(axis=1, keepdims=True)


def _noise(rng: Generator, columns: int, rows: int | None = None) -> np.ndarray:
    """Smooth noise of about [-1, 1] with so many cells."""
    rows = rows or columns
    cells = rng.uniform(-1, 1, (rows, columns))
    return _stretching(rows) @ cells @ _stretching(columns).T


def _blur(values: np.ndarray, width: float) -> np.ndarray:
    """Blurs [FINE, FINE] or colours [FINE, FINE, 3]."""
    weights = _smoothing(width)
    return (weights @ (weights @ values.T).swapaxes(-1, -2)).swapaxes(-1, -2).T


def _colour(hue: float | np.ndarray, luminance: float | np.ndarray) -> np.ndarray:
    """The colour of a hue (a full turn is 1) that has a given luminance, as vivid as it can be."""
    phases = (np.asarray(hue)[..., None] * 6 + np.array([0.0, 4.0, 2.0])) % 6
    vivid = 0.06 + 0.9 * np.clip(np.abs(phases - 3) - 1, 0, 1)
    own, wanted = _luminance(vivid)[..., None], np.asarray(luminance)[..., None]
    lighter = _mix(vivid, np.ones(3), np.maximum(0, (wanted - own) / (1 - own))[..., 0])
    return np.where(wanted < own, vivid * wanted / own, lighter)


def _luminance(colours: np.ndarray) -> np.ndarray:
    return colours @ np.array([0.3, 0.55, 0.15])


def _mix(one: np.ndarray, other: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    return one + (other - one) * np.asarray(share)[..., None]


def _cover(distance: np.ndarray, softness: float = PIXEL / 2) -> np.ndarray:
    """How much of each point is inside, with an edge of a given softness."""
    return np.clip(0.5 - distance / softness, 0, 1)


def _wave(values: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 between 0, at whole numbers, and 1."""
    return 1 - np.abs(2 * (values % 1) - 1)


# Shapes: signed distances.


def _ellipse(at: Plane, x: float, y: float, width: float, height: float) -> np.ndarray:
    """An ellipse of half a width and half a height; a distance to first order only."""
    u, v = (at.x - x) / width, (at.y - y) / height
    radius = np.hypot(u, v)
    return radius * (radius - 1) / (np.hypot(u / width, v / height) + 1e-6)


def _line(at: Plane, x0: float, y0: float, x1: float, y1: float, width: float) -> np.ndarray:
    """A line with round ends, of half a width."""
    u, v, dx, dy = at.x - x0, at.y - y0, x1 - x0, y1 - y0
    along = np.clip((u * dx + v * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(u - along * dx, v - along * dy) - width


def _polygon(at: Plane, *corners: tuple[float, float]) -> np.ndarray:
    nearest, inside = np.full_like(at.x, 9.0), np.zeros(at.x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        nearest = np.minimum(nearest, _line(at, x0, y0, x1, y1, 0))
        if y0 != y1:
            crosses = (at.y < y0) != (at.y < y1)
            inside ^= crosses & (at.x < x0 + (at.y - y0) * (x1 - x0) / (y1 - y0))
    return np.where(inside, -nearest, nearest)


def _box(at: Plane, x: float, y: float, width: float, height: float) -> np.ndarray:
    """A box of half a width and half a height."""
    u, v = np.abs(at.x - x) - width, np.abs(at.y - y) - height
    return np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0)


def _union(*shapes: np.ndarray) -> np.ndarray:
    return np.minimum.reduce(shapes)


# Subjects: parts within about [-1, 1], from the rearmost to the foremost.


def _cat(at: Plane, rng: Generator) -> list[Part]:
    wide, top, eye = rng.uniform(0.75, 0.92), rng.uniform(0.85, 1.0), rng.uniform(0.28, 0.36)
    head, face = [_ellipse(at, 0, -0.15, wide, 0.68)], []
    for side in (-1, 1):
        ear = (side * wide, top), (side * wide * 0.92, 0.0), (side * 0.12, 0.4)
        head.append(_polygon(at, *ear))
        face.append(_ellipse(at, side * eye, 0, 0.12, 0.17))
        face.extend(_line(at, side * 0.35, -0.35, side, y, 0.02) for y in (-0.25, -0.5))
    nose = _polygon(at, (-0.13, -0.28), (0.13, -0.28), (0, -0.45))
    return [(_union(*head), MAIN), (_union(nose, *face), ACCENT)]


def _fish(at: Plane, rng: Generator) -> list[Part]:
    height, tail = rng.uniform(0.42, 0.6), rng.uniform(0.4, 0.6)
    fin = _polygon(at, (-0.25, height * 0.7), (0.2, height + 0.3), (0.35, height * 0.7))
    fork = _polygon(at, (0.35, 0), (1, tail), (0.85, 0), (1, -tail))
    body, eye = _ellipse(at, -0.2, 0, 0.8, height), _ellipse(at, -0.65, 0.1, 0.11, 0.11)
    gill = np.maximum(np.abs(_ellipse(at, -0.85, 0, 0.55, 0.6)) - 0.035, body + 0.06)
    return [(_union(fin, fork), SECOND), (body, MAIN), (_union(eye, gill), ACCENT)]


def _tree(at: Plane, rng: Generator) -> list[Part]:
    width = rng.uniform(0.55, 0.75)
    trunk = _box(at, 0, -0.75, rng.uniform(0.1, 0.16), 0.25)
    tiers = [
        (_polygon(at, (-wide, low), (0, low + 0.85), (wide, low)), MAIN)
        for wide, low in ((width, -0.6), (width * 0.8, -0.15), (width * 0.58, 0.25))
    ]
    return [(trunk, SECOND), *tiers]


def _star(at: Plane, rng: Generator) -> list[Part]:
    inner, angles = rng.uniform(0.36, 0.48), np.pi * (0.5 + np.arange(10) / 5)
    radii = np.where(np.arange(10) % 2, inner, 1.0)
    corners = zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)
    return [(_polygon(at, *corners), MAIN)]


def _mushroom(at: Plane, rng: Generator) -> list[Part]:
    wide, height, low = rng.uniform(0.8, 1.0), rng.uniform(0.75, 0.95), rng.uniform(-0.1, 0.1)
    stem = _polygon(at, (-0.2, low), (0.2, low), (0.32, -0.95), (-0.32, -0.95))
    cap = np.maximum(_ellipse(at, 0, low, wide, height), low - at.y)
    places = ((-0.5, 0.3), (0.05, 0.62), (0.5, 0.25))
    spots = [_ellipse(at, x * wide, low + y * height, 0.14, 0.14) for x, y in places]
    return [(stem, SECOND), (cap, MAIN), (_union(*spots), ACCENT)]


def _key(at: Plane, rng: Generator) -> list[Part]:
    size, first = rng.uniform(0.3, 0.36), rng.uniform(0.4, 0.5)
    ring = np.abs(_ellipse(at, -0.55, 0, size, size)) - 0.14
    shaft = _line(at, -0.25, 0, 0.92, 0, 0.13)
    teeth = [_box(at, x, -0.3, 0.12, long) for x, long in ((first, 0.24), (0.92, 0.32))]
    return [(_union(ring, shaft, *teeth), MAIN)]


# Backgrounds: colours [FINE, FINE, 3].


def _sky(at: Plane, rng: Generator) -> np.ndarray:
    air = _colour(rng.normal(0.57, 0.04), 0.52 - 0.1 * at.y)
    clouds = np.full_like(at.x, 9.0)
    for height in rng.permutation([-0.75, -0.1, 0.45, 0.8]):
        left = rng.uniform(-1, 0.8)
        for step, size in enumerate((0.15, 0.24, 0.17)):
            puff = _ellipse(at, left + 0.25 * step, height + size / 3, size * 1.2, size)
            clouds = np.minimum(clouds, np.maximum(puff, height - at.y))
    return _mix(air, np.full(3, 0.97), _cover(clouds, PIXEL))


def _forest(at: Plane, rng: Generator) -> np.ndarray:
    hue = rng.normal(0.3, 0.04)
    picture = _colour(hue, 0.35 + 0.08 * at.y + 0.1 * _noise(rng, 16))
    for left in np.arange(-1.1, 1.2, 0.42) + rng.uniform(-0.1, 0.1, 6):
        trunk = np.abs(at.x - left - 0.05 * rng.normal() * at.y) - rng.uniform(0.06, 0.11)
        picture = _mix(picture, _colour(rng.normal(0.08, 0.02), 0.09), _cover(trunk))
    return _mix(picture, _colour(hue, 0.2), _cover(at.y + 0.75 + 0.2 * _noise(rng, 20, 2)))


def _bricks(at: Plane, rng: Generator) -> np.ndarray:
    high, long = 0.3, rng.uniform(0.55, 0.7)
    row = at.y / high + rng.random()
    column = at.x / long + np.floor(row) / 2 + rng.random()
    joint = np.minimum(_wave(row) * high, _wave(column) * long) / 2 - 0.035
    shade = np.sin(78.2 * np.floor(column) + 37.7 * np.floor(row) + rng.uniform(0, 6))
    wall = _colour(rng.normal(0.02, 0.04), 0.26 + 0.06 * shade)
    return _mix(wall, np.full(3, 0.6), _cover(joint))


def _checkers(at: Plane, rng: Generator) -> np.ndarray:
    size, hue = rng.uniform(0.32, 0.42), rng.random()
    columns, rows = ((each / size + rng.random()) for each in at)
    odd = (np.floor(columns) + np.floor(rows)) % 2
    dark = rng.uniform(0.06, 0.16) + rng.choice([0, 0.42])  # few are between dark and light
    return _mix(_colour(hue, dark), _colour(hue + rng.normal(0, 0.1), dark + 0.32), odd)


def _sunset(at: Plane, rng: Generator) -> np.ndarray:
    hue, horizon = rng.normal(0.0, 0.03), rng.uniform(-0.6, -0.4)
    side = rng.uniform(-0.6, 0.6)
    height = np.clip((at.y - horizon) / (1 - horizon), 0, 1)
    rays = _wave(np.arctan2(at.y - horizon, at.x - side) * 9 / np.pi) > 0.5
    air = _colour(hue + 0.1 - 0.25 * height, 0.4 - 0.24 * height + 0.13 * rays)
    sun = _ellipse(at, side, horizon, 0.4, 0.4)
    air = _mix(air, _colour(0.14, 0.8), _cover(sun))
    return _mix(air, _colour(hue - 0.2, 0.07), _cover(at.y - horizon))


# Styles: how a scene comes onto paper.


def _flat(scene: Scene, rng: Generator) -> np.ndarray:
    # A faint shadow, or light, around the rim: a rim alone is lost in a busy background.
    halo = 0.45 * np.exp(-np.maximum(scene.distance, 0) / (2 * PIXEL))
    ground = _mix(scene.ground, 1 - scene.rim, halo)
    ground = _mix(ground, scene.rim, _cover(scene.distance - PIXEL))
    return _mix(ground, scene.paint, _cover(scene.distance))


def _contours(scene: Scene, width: float) -> tuple[np.ndarray, np.ndarray]:
    """How much there is of an edge: in the subject, and in the background around it."""
    down, right = np.gradient(_luminance(scene.ground))
    behind = np.clip(6 * np.hypot(down, right), 0, 1) * (scene.distance > 1.5 * PIXEL)
    return _cover(scene.edges - width, PIXEL), behind


def _outline(scene: Scene, rng: Generator) -> np.ndarray:
    near, behind = _contours(scene, 0.6 * PIXEL)
    paper = _mix(scene.ground, np.ones(3), 0.6)
    paper = _mix(paper, np.ones(3), _cover(scene.distance - PIXEL))
    return _mix(_mix(paper, np.full(3, 0.35), 0.8 * behind), np.zeros(3), near)


def _watercolour(scene: Scene, rng: Generator) -> np.ndarray:
    bleeding = scene.distance + 0.065 * _noise(rng, 14)
    ground = _mix(_blur(scene.ground, 0.8), np.ones(3), 0.2 + 0.2 * _noise(rng, 9))
    ground = _mix(ground, np.ones(3), 0.8 * _cover(bleeding - 1.5 * PIXEL, 3 * PIXEL))
    picture = _mix(ground, _blur(scene.paint, 0.6), 0.9 * _cover(bleeding, 2 * PIXEL))
    return _mix(picture, np.ones(3), np.clip(0.15 + 0.25 * _noise(rng, 12), 0, 1))


def _neon(scene: Scene, rng: Generator) -> np.ndarray:
    near, behind = _contours(scene, 0.4 * PIXEL)
    tube = _colour(rng.random(), 0.75)
    glow = 0.9 * np.exp(-scene.edges / (2 * PIXEL))
    dark = 0.22 * scene.ground * (1 - _cover(scene.distance, 4 * PIXEL))[..., None]
    light = np.maximum(_blur(behind, 0.5), 0)[..., None] * (0.1 + 0.7 * scene.ground)
    return _mix(dark + light + glow[..., None] * tube * 0.8, np.ones(3), 0.85 * near)


def _charcoal(scene: Scene, rng: Generator) -> np.ndarray:
    near, _ = _contours(scene, 0.4 * PIXEL)
    bold = scene._replace(paint=_mix(scene.paint, scene.rim, 0.3))
    tone = 0.12 + 0.88 * _luminance(_flat(bold, rng))
    grain = np.kron(rng.uniform(-1, 1, (SIZE, SIZE)), np.ones((DETAIL, DETAIL)))
    tone = (tone + 0.13 * grain) * (1 - 0.9 * near)
    return np.repeat(tone[..., None], 3, axis=-1)


# In the order in which attributes are numbered.
_SUBJECTS = (_cat, _fish, _tree, _star, _mushroom, _key)
_STYLES = (_flat, _outline, _watercolour, _neon, _charcoal)
_BACKGROUNDS = (_sky, _forest, _bricks, _checkers, _sunset)


def _names(functions: Iterable[Callable[..., object]]) -> tuple[str, ...]:
    return tuple(each.__name__.strip("_") for each in functions)


SUBJECTS: tuple[str, ...] = _names(_SUBJECTS)
STYLES: tuple[str, ...] = _names(_STYLES)
BACKGROUNDS: tuple[str, ...] = _names(_BACKGROUNDS)
