"""Drawn faces: a licence-free, deterministic set to try the whole chain on. Deliberately not photographs.

What makes a person (proportions, colours, hair, brows, glasses, beard, marks) is drawn from the identity's seed; what
changes from picture to picture (pose, expression, light, background, focus, noise, framing) from the image's. Eyes,
nose and mouth lie near the five points of the ArcFace template.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from aroface.contract import ARCFACE_TEMPLATE_112
from aroface.errors import DataError
from aroface.files import new_directory
from aroface.images import encode_jpeg

__all__ = ["render_face", "write_synthetic"]

_SIZE = 112
_DRAW_SCALE = 2
_FRACTION_BITS = 4  # OpenCV draws at fixed-point coordinates
_HEAD_DEPTH_PX = 34.0  # how far the nose plane lies before the axis of the head, template pixels

_SKIN_RGB = np.array([[252, 224, 202], [236, 190, 158], [209, 154, 112], [158, 102, 66], [96, 62, 44]], float)
_HAIR_RGB = np.array(
    [[28, 22, 20], [70, 44, 28], [122, 78, 42], [196, 154, 88], [164, 72, 34], [150, 150, 152], [226, 220, 208]], float
)
_IRIS_RGB = np.array([[62, 40, 24], [96, 66, 34], [74, 110, 70], [70, 116, 170], [120, 130, 140]], float)

_Points = NDArray[np.float64]
_Colour = NDArray[np.float64]


@dataclass(frozen=True)
class _Identity:
    """What stays from image to image. Lengths in template pixels."""

    skin: _Colour
    hair: _Colour
    iris: _Colour
    lips: _Colour
    head_width: float
    jaw_width: float
    chin_y: float
    forehead_y: float
    eye_gap: float
    eye_width: float
    eye_height: float
    brow_height: float
    brow_thickness: float
    brow_arch: float
    nose_length: float
    nose_width: float
    mouth_width: float
    lip_thickness: float
    hair_style: int  # 0 bald, 1 short, 2 parted, 3 fringe, 4 long, 5 curls
    hair_volume: float
    parting: float
    beard: int  # 0 to 2 none, 3 moustache, 4 full
    glasses: int  # 0 to 3 none, 4 round, 5 square
    marks: _Points  # (M, 2) moles


@dataclass(frozen=True)
class _Shot:
    """What differs from image to image."""

    yaw_rad: float
    pitch_rad: float
    roll_rad: float
    zoom: float
    shift_px: _Points
    smile: float
    mouth_open: float
    eye_open: float
    light_rad: float
    light_strength: float
    exposure: float
    tint: _Colour
    blur_px: float
    noise: float
    backdrop: NDArray[np.uint8]


def _draw_identity(seed: int) -> _Identity:
    rng = np.random.default_rng([seed, 0xFACE])
    tone = rng.uniform(0, len(_SKIN_RGB) - 1)
    low = int(tone)
    skin = _SKIN_RGB[low] + (tone - low) * (_SKIN_RGB[min(low + 1, len(_SKIN_RGB) - 1)] - _SKIN_RGB[low])
    skin = skin + rng.normal(0, 5, 3)
    return _Identity(
        skin=skin,
        hair=_HAIR_RGB[rng.integers(len(_HAIR_RGB))] + rng.normal(0, 9, 3),
        iris=_IRIS_RGB[rng.integers(len(_IRIS_RGB))] + rng.normal(0, 8, 3),
        lips=skin * [0.86, 0.6, 0.6] + rng.normal(0, 10, 3),
        head_width=rng.uniform(35, 46),
        jaw_width=rng.uniform(0.55, 0.95),
        chin_y=rng.uniform(106, 118),
        forehead_y=rng.uniform(8, 20),
        eye_gap=rng.uniform(-3.5, 3.5),
        eye_width=rng.uniform(6, 9.5),
        eye_height=rng.uniform(2.6, 5.2),
        brow_height=rng.uniform(7.5, 13),
        brow_thickness=rng.uniform(1.2, 4.2),
        brow_arch=rng.uniform(-2.5, 4),
        nose_length=rng.uniform(-4, 4),
        nose_width=rng.uniform(4.5, 10),
        mouth_width=rng.uniform(0.75, 1.3),
        lip_thickness=rng.uniform(1.8, 5),
        hair_style=int(rng.choice(6, p=[0.08, 0.2, 0.2, 0.18, 0.2, 0.14])),
        hair_volume=rng.uniform(2, 9),
        parting=rng.uniform(-22, 22),
        beard=int(rng.integers(5)),
        glasses=int(rng.integers(6)),
        marks=np.column_stack([rng.uniform(30, 82, 2), rng.uniform(62, 100, 2)])[: rng.integers(3)],
    )


def _draw_shot(seed: int, image: int) -> _Shot:
    rng = np.random.default_rng([seed, image, 0x5407])
    return _Shot(
        yaw_rad=float(np.clip(rng.normal(0, 0.3), -0.75, 0.75)),
        pitch_rad=float(np.clip(rng.normal(0, 0.16), -0.4, 0.4)),
        roll_rad=rng.normal(0, 0.05),
        zoom=rng.normal(1, 0.025),
        shift_px=rng.normal(0, 1.2, 2),
        smile=rng.uniform(-1.5, 4),
        mouth_open=max(0.0, rng.uniform(-3, 4)),
        eye_open=rng.uniform(0.55, 1.1),
        light_rad=rng.uniform(0, 2 * np.pi),
        light_strength=rng.uniform(0, 0.6),
        exposure=float(np.exp(rng.normal(0, 0.22))),
        tint=np.exp(rng.normal(0, 0.06, 3)),
        blur_px=max(0.0, rng.normal(0.5, 0.8)),
        noise=rng.uniform(0, 9),
        backdrop=rng.integers(30, 226, (3, 3, 3), dtype=np.uint8),
    )


class _Canvas:
    """Draws template coordinates, turned by the pose, at twice the final resolution."""

    def __init__(self, shot: _Shot) -> None:
        side = _SIZE * _DRAW_SCALE
        backdrop = cv2.resize(shot.backdrop, (side, side), interpolation=cv2.INTER_CUBIC)
        self.pixels: NDArray[np.uint8] = np.asarray(backdrop, np.uint8)
        cos, sin = np.cos(shot.roll_rad), np.sin(shot.roll_rad)
        self._turn = shot.zoom * np.array([[cos, -sin], [sin, cos]])
        self._shot = shot

    def place(self, points: _Points, depth: float) -> _Points:
        """(K, 2) template points on a layer `depth` (1 face plane, 0 axis, negative behind) to canvas pixels."""
        shot, centre = self._shot, np.array([56.0, 68.0])
        relative = points - centre
        reach = depth * _HEAD_DEPTH_PX - 0.009 * relative[:, 0] ** 2  # the face is round: its sides lie further back
        x = relative[:, 0] * np.cos(shot.yaw_rad) + reach * np.sin(shot.yaw_rad)
        x = x - 0.55 * _HEAD_DEPTH_PX * np.sin(shot.yaw_rad)  # the crop is centred on the face, not on the axis
        y = relative[:, 1] * np.cos(shot.pitch_rad) + (reach - 0.55 * _HEAD_DEPTH_PX) * np.sin(shot.pitch_rad)
        placed = np.column_stack([x, y]) @ self._turn.T + centre + shot.shift_px
        return np.asarray((placed + 0.5) * _DRAW_SCALE - 0.5, np.float64)

    def fill(self, points: _Points, colour: _Colour, depth: float = 1.0) -> None:
        """Fill a polygon."""
        cv2.fillPoly(self.pixels, [_fixed(self.place(points, depth))], _rgb(colour), cv2.LINE_AA, _FRACTION_BITS)

    def line(self, points: _Points, colour: _Colour, width: float, *, depth: float = 1.0, closed: bool = False) -> None:
        """Draw a line, `width` in template pixels."""
        thickness = max(1, round(width * _DRAW_SCALE))
        path = [_fixed(self.place(points, depth))]
        cv2.polylines(self.pixels, path, closed, _rgb(colour), thickness, cv2.LINE_AA, _FRACTION_BITS)


def _fixed(points: _Points) -> NDArray[np.int32]:
    return np.asarray(np.rint(points * (1 << _FRACTION_BITS)), np.int32)


def _rgb(colour: _Colour) -> tuple[float, float, float]:
    red, green, blue = np.clip(colour, 0, 255).tolist()
    return red, green, blue


_CIRCLE = np.column_stack([np.cos(np.linspace(0, 2 * np.pi, 24, False)), np.sin(np.linspace(0, 2 * np.pi, 24, False))])


def _xy(x: float, y: float) -> _Points:
    return np.array([x, y], np.float64)


def _ellipse(x: float, y: float, half_width: float, half_height: float) -> _Points:
    return _xy(x, y) + _CIRCLE * _xy(half_width, half_height)


def _curve(start: _Points, bend: _Points, end: _Points, steps: int = 10) -> _Points:
    """A quadratic Bezier curve."""
    t = np.linspace(0, 1, steps)[:, None]
    return np.asarray((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end)


def _head_outline(who: _Identity, margin: float = 0.0) -> _Points:
    """An ellipse above the eyes that narrows to the jaw below them."""
    middle = 58.0
    x, y = _CIRCLE[:, 0], _CIRCLE[:, 1]
    below = y > 0
    height = np.where(below, who.chin_y - middle, middle - who.forehead_y) + margin
    narrowing = np.where(below, 1 - (1 - who.jaw_width) * np.clip(y, 0, 1) ** 1.5 * 0.8, 1.0)
    wide = np.sign(x) * np.abs(x) ** np.where(below, 0.8, 1.0)
    return np.column_stack([56 + (who.head_width + margin) * wide * narrowing, middle + height * y])


def _draw_back(canvas: _Canvas, who: _Identity) -> None:
    shoulders = np.array([[-10, 130], [8, 116], [38, 108], [74, 108], [104, 116], [122, 130]], float)
    if who.hair_style == 4:
        outline = _head_outline(who, who.hair_volume)
        canvas.fill(np.where(outline[:, 1:] > 60, [1, 1.12], [1.0, 1.0]) * outline, who.hair * 0.8, depth=-0.4)
    if who.hair_style == 5:
        for x, y in _head_outline(who, 1.0)[10:]:
            canvas.fill(_ellipse(x, y, 7 + who.hair_volume, 7 + who.hair_volume), who.hair * 0.85, depth=-0.2)
    canvas.fill(np.array([[40, 92], [72, 92], [76, 130], [36, 130]], float), who.skin * 0.78, depth=0.0)
    canvas.fill(shoulders, who.iris * 0.8 + 30, depth=0.0)
    for side in (-1, 1):
        canvas.fill(_ellipse(56 + side * (who.head_width + 1), 62, 4.5, 9), who.skin * 0.85, depth=0.1)


def _draw_features(canvas: _Canvas, who: _Identity, shot: _Shot) -> None:
    left, right, nose, mouth_left, mouth_right = ARCFACE_TEMPLATE_112
    for side, (x, y) in ((-1, left), (1, right)):
        x = x + side * who.eye_gap
        openness = who.eye_height * shot.eye_open
        canvas.fill(_ellipse(x, y, who.eye_width * 1.2, who.eye_height * 1.5), who.skin * 0.87)
        canvas.fill(_ellipse(x, y, who.eye_width, openness), np.array([238.0, 236, 232]))
        gaze = x + 3 * np.sin(shot.yaw_rad)
        canvas.fill(_ellipse(gaze, y, min(3.9, openness + 0.8), openness), who.iris)
        canvas.fill(_ellipse(gaze, y, 1.6, min(1.6, openness)), np.array([12.0, 10, 10]))
        lid = _curve(
            np.array([x - who.eye_width, y]),
            np.array([x, y - 2 * openness]),
            np.array([x + who.eye_width, y]),
        )
        canvas.line(lid, who.skin * 0.4, 1.0)
        brow_y = y - who.brow_height
        brow = _curve(
            np.array([x - side * 9.5, brow_y + 1]),
            np.array([x + side * 2, brow_y - 2 * who.brow_arch]),
            np.array([x + side * 11, brow_y + 2]),
        )
        canvas.line(brow, who.hair * 0.8, who.brow_thickness)
    tip = nose + _xy(0, who.nose_length)
    canvas.line(
        np.array([[tip[0] - 2.5, 56], [tip[0] - 3, tip[1] - 6], [tip[0] - who.nose_width, tip[1] + 1]]),
        who.skin * 0.8,
        1.2,
        depth=1.2,
    )
    canvas.fill(_ellipse(tip[0], tip[1] - 1, who.nose_width * 0.75, 4.2), who.skin * 1.05, depth=1.4)
    for side in (-1, 1):
        canvas.fill(_ellipse(tip[0] + side * who.nose_width * 0.55, tip[1] + 2, 1.8, 1.2), who.skin * 0.5, depth=1.25)
    for x, y in who.marks:
        canvas.fill(_ellipse(x, y, 1.6, 1.6), who.skin * 0.45)
    _draw_beard(canvas, who)
    middle = (mouth_left + mouth_right) / 2
    half = (mouth_right[0] - mouth_left[0]) / 2 * who.mouth_width
    start, end = middle + _xy(-half, -shot.smile * 0.5), middle + _xy(half, -shot.smile * 0.5)
    upper = _curve(start, middle + _xy(0, shot.smile - who.lip_thickness * 1.4), end)
    lower = _curve(end, middle + _xy(0, shot.smile + who.lip_thickness * 1.6 + 2 * shot.mouth_open), start)
    canvas.fill(np.concatenate([upper, lower]), who.lips)
    gap = _curve(start, middle + _xy(0, shot.smile), end)
    gap_below = _curve(end, middle + _xy(0, shot.smile + 0.6 + 1.8 * shot.mouth_open), start)
    canvas.fill(np.concatenate([gap, gap_below]), np.array([66.0, 24, 26]))
    canvas.line(gap, who.lips * 0.5, 0.6)


def _draw_beard(canvas: _Canvas, who: _Identity) -> None:
    if who.beard == 4:
        outline = _head_outline(who)
        jaw = outline[(outline[:, 1] > 74)]
        inner = _curve(
            np.array([56 - who.head_width * 0.72, 76.0]),
            np.array([56.0, 88]),
            np.array([56 + who.head_width * 0.72, 76.0]),
        )
        jaw = jaw[np.argsort(-jaw[:, 0])]
        canvas.fill(np.concatenate([inner, jaw]), who.hair * 0.9 + 4, depth=0.95)
    if who.beard >= 3:
        moustache = _curve(np.array([42.0, 88]), np.array([56.0, 76]), np.array([70.0, 88]))
        canvas.line(moustache, who.hair * 0.9, 3.4, depth=1.1)


def _draw_hair(canvas: _Canvas, who: _Identity) -> None:
    if who.hair_style == 0:
        return
    outer = _head_outline(who, who.hair_volume)
    top = outer[outer[:, 1] < 56]
    top = top[np.argsort(top[:, 0])]
    line_y = who.forehead_y + 15
    half = who.head_width + 1
    start, end = np.array([56 + half, 52.0]), np.array([56 - half, 52.0])
    if who.hair_style == 2:
        peak = np.array([56 + who.parting, line_y - 13])
        hairline = np.concatenate(
            [
                _curve(start, np.array([56 + half * 0.8, line_y]), peak),
                _curve(peak, np.array([56 - half * 0.8, line_y]), end),
            ]
        )
    elif who.hair_style == 3:
        edge = np.linspace(half * 0.92, -half * 0.92, 13)
        zigzag = 2.0 * (np.arange(13) % 2)
        hairline = np.concatenate([[start], np.column_stack([56 + edge, line_y + 7 + zigzag]), [end]])
    else:
        hairline = _curve(start, np.array([56 + who.parting * 0.3, line_y - 26]), end)
    canvas.fill(np.concatenate([top, hairline]), who.hair, depth=0.6)
    if who.hair_style == 5:
        for x, y in top[::2]:
            canvas.fill(_ellipse(x, y + 3, 6, 6), who.hair * 1.08, depth=0.5)


def _draw_glasses(canvas: _Canvas, who: _Identity) -> None:
    if who.glasses < 4:
        return
    frame = who.hair * 0.3 + 12
    for side, (x, y) in ((-1, ARCFACE_TEMPLATE_112[0]), (1, ARCFACE_TEMPLATE_112[1])):
        centre = x + side * who.eye_gap
        rim = _ellipse(centre, y + 1, 12, 10.5)
        if who.glasses == 5:
            rim = np.array([centre, y + 1]) + np.array([[-13, -8], [13, -8], [12, 9], [-12, 9]], float)
        canvas.line(rim, frame, 1.7, depth=1.15, closed=True)
        canvas.line(np.array([[centre + side * 12, y - 2], [56 + side * who.head_width, y - 3]]), frame, 1.5)
    canvas.line(np.array([[49.0, 51], [63.0, 51]]), frame, 1.7, depth=1.2)


_GRID = (np.mgrid[0:_SIZE, 0:_SIZE].astype(np.float32) - (_SIZE - 1) / 2) / (_SIZE / 2)


def _expose(pixels: NDArray[np.uint8], shot: _Shot, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light from one side, exposure, colour cast, focus and sensor noise."""
    small = cv2.resize(pixels, (_SIZE, _SIZE), interpolation=cv2.INTER_AREA)
    if shot.blur_px > 0.25:
        small = cv2.GaussianBlur(small, (0, 0), shot.blur_px)
    slope = np.float32(np.sin(shot.light_rad)) * _GRID[0] + np.float32(np.cos(shot.light_rad)) * _GRID[1]
    light = np.exp(np.float32(shot.light_strength) * slope) * np.float32(shot.exposure)
    lit = small * (light[..., None] * shot.tint.astype(np.float32))
    grain = rng.standard_normal((_SIZE, _SIZE, 1), np.float32) * np.float32(shot.noise)
    return np.asarray(np.clip(lit + grain, 0, 255), np.uint8)


def render_face(identity_seed: int, image_index: int) -> NDArray[np.uint8]:
    """Draw one picture of one person: (112, 112, 3) uint8 RGB, a pure function of its arguments."""
    who, shot = _draw_identity(identity_seed), _draw_shot(identity_seed, image_index)
    canvas = _Canvas(shot)
    _draw_back(canvas, who)
    canvas.fill(_head_outline(who), who.skin, depth=0.75)
    _draw_features(canvas, who, shot)
    _draw_hair(canvas, who)
    _draw_glasses(canvas, who)
    return _expose(canvas.pixels, shot, np.random.default_rng([identity_seed, image_index, 0x6A11]))


def write_synthetic(out: Path, *, identities: int, images_per_identity: int, seed: int) -> None:
    """Write `id_00000/000.jpg` and so on into a new directory.

    Sets of different seeds share no identity.

    Raises:
        DataError: a count is below 1, or `out` holds something already.
    """
    for name, value in (("--identities", identities), ("--images", images_per_identity)):
        if not 1 <= value <= 10**6:
            raise DataError(f"{name} is {value}; choose from 1 to 1000000.")
    if seed < 0:
        raise DataError(f"--seed is {seed}; it must be 0 or more.")
    new_directory(out, what="Output")
    for identity in range(identities):
        folder = out / f"id_{identity:05d}"
        folder.mkdir()
        for image in range(images_per_identity):
            pixels = render_face(seed * 10**6 + identity, image)
            (folder / f"{image:03d}.jpg").write_bytes(encode_jpeg(pixels, quality=92))
