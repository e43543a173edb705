"""A made-up frontal chest radiograph: what `datasets.phantom` puts into its studies.

The picture is a sum of line-integral-like terms (body, lungs taken out of it, heart, spine, ribs,
clavicles, vessels, lesions, noise), drawn in *chest coordinates*: x to the right of the image,
y down, in units of the shorter usable side of the film, origin in the middle. As on every frontal
film the patient's left is on the image's right, so the heart's apex, the aortic knob and the
gastric bubble lie at x > 0. Nothing here is meant to be diagnosed; it has the structures, scales
and contrasts that masks, gradients and gaze have to cope with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Anatomy is drawn at no more than this many pixels on the long side and enlarged: a film's blur is a
# few pixels at native resolution anyway. Only the noise is drawn at the full size.
MAX_DRAWN_SIDE = 768
APEX_Y, DOME_Y = -0.385, 0.285
HEART = (0.052, 0.150, 0.150)  # centre x, y and longer semi-axis of the ventricles

# Ellipses are (centre x, y, semi-axes x, y) in chest coordinates.
CHEST = (0.0, (APEX_Y + 0.36) / 2, 0.375, (0.36 - APEX_Y) / 2)  # around lungs and heart
CHEST_REGIONS = (  # what a reader visits
    (-0.17, -0.27, 0.06, 0.06),
    (0.17, -0.27, 0.06, 0.06),  # apices
    (-0.21, -0.09, 0.08, 0.07),
    (0.22, -0.09, 0.07, 0.07),  # middle fields
    (-0.22, 0.11, 0.09, 0.07),
    (0.27, 0.12, 0.05, 0.07),  # bases
    (-0.32, 0.26, 0.03, 0.04),
    (0.33, 0.27, 0.03, 0.04),  # costophrenic angles
    (-0.10, -0.03, 0.04, 0.05),
    (0.11, -0.05, 0.04, 0.05),  # hila
    (0.0, -0.15, 0.04, 0.12),
    (0.07, 0.13, 0.10, 0.09),
    (0.0, 0.38, 0.25, 0.05),  # mediastinum, heart, belly
)
# kind -> usual contrast; semi-axes x and y, each from and to. Those of round lesions: y in units of x.
LESIONS = {
    "nodule": (0.20, 0.014, 0.026, 0.85, 1.15),
    "mass": (0.30, 0.038, 0.062, 0.85, 1.15),
    "consolidation": (0.33, 0.065, 0.105, 0.85, 1.15),
    "effusion": (1.0, 0.055, 0.08, 0.07, 0.11),
    "pneumothorax": (1.0, 0.075, 0.095, 0.09, 0.12),
    "cardiomegaly": (),  # the heart is drawn larger
    "atelectasis": (0.20, 0.06, 0.09, 0.012, 0.018),
}
LESION_KINDS = tuple(LESIONS)


@dataclass(frozen=True)
class Lesion:
    """One abnormality. `ellipse` = (centre x, centre y, semi-axis x, semi-axis y) in chest coordinates;
    `contrast` multiplies the kind's usual contrast."""

    kind: str
    ellipse: tuple[float, float, float, float]
    contrast: float = 1.0


def pixels_per_unit(size: tuple[int, int]) -> float:
    """Pixels per unit of chest coordinates on an image of `size` = (height, width) px."""
    return min(size[1] / 0.92, size[0] / 1.0)


def to_pixels(size: tuple[int, int], x: float | np.ndarray, y: float | np.ndarray) -> np.ndarray:
    """Chest coordinates -> px (x, y) of an image of (height, width), where a pixel's centre has whole-number
    coordinates: float64 [2, ...]."""
    unit = pixels_per_unit(size)
    return np.array([size[1] / 2 - 0.5 + unit * x, size[0] / 2 - 0.5 + unit * y])


def pixel_box(size: tuple[int, int], ellipse: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """The (xmin, ymin, xmax, ymax) in px of an ellipse, cut to the image of (height, width)."""
    cx, cy, rx, ry = ellipse
    low, high = to_pixels(size, cx - rx, cy - ry), to_pixels(size, cx + rx, cy + ry)
    return tuple(np.clip([*low, *high], 0, [size[1] - 1, size[0] - 1] * 2).tolist())


def draw_lesion(kind: str, rng: np.random.Generator, size: float = 1.0, contrast: float = 1.0) -> Lesion:
    """A lesion of `kind` at a plausible place; `size` multiplies its usual linear extent."""
    side = rng.choice((-1.0, 1.0))
    if kind == "cardiomegaly":
        growth = 1.0 + 0.28 * size
        ellipse = (0.052, 0.145, HEART[2] * growth, 0.115 * growth**0.8 + 0.01)
    else:
        _, low_x, high_x, low_y, high_y = LESIONS[kind]
        rx = size * rng.uniform(low_x, high_x)
        ry = (rx if low_y > 0.5 else size) * rng.uniform(low_y, high_y)
        if kind == "effusion":
            cx, cy = 0.36 - rx, 0.31 - ry
        elif kind == "pneumothorax":
            cx, cy = 0.265 - rx, APEX_Y + 0.015 + ry
        elif kind == "atelectasis":
            cx, cy = rng.uniform(0.22, 0.25), rng.uniform(0.10, 0.20)
        else:
            cy = rng.uniform(-0.25, 0.16)
            inner = 0.10 if side < 0 or cy < 0.02 else 0.235  # the heart takes the left lung's inner part
            low, high = inner + min(rx, 0.04), _lung_wall(np.array([cy]))[0] - 0.02 - min(rx, 0.05)
            cx = rng.uniform(low, max(low, high))
        ellipse = (side * cx, cy, rx, ry)
    return Lesion(kind, tuple(round(float(value), 5) for value in ellipse), contrast)


def render_chest(size: tuple[int, int], rng: np.random.Generator, lesions: tuple[Lesion, ...] = ()) -> np.ndarray:
    """Draw a chest: uint8 [height, width], air black and bone bright, for `size` = (height, width) px.

    The anatomy depends only on `rng` and `lesions`; the noise also on the size.
    """
    shrink = min(1.0, MAX_DRAWN_SIDE / max(size))
    film = _draw(tuple(max(2, round(side * shrink)) for side in size), rng, lesions)
    film = np.asarray(Image.fromarray(film).resize(size[::-1], Image.Resampling.BICUBIC))
    # Quantum noise is relatively stronger where few quanta pass: in the bright parts of the film.
    film = film + rng.standard_normal(size, dtype=np.float32) * (0.008 + 0.008 * film)
    return (film.clip(0, 1) * 255.0 + 0.5).astype(np.uint8)


def _dome(depth: np.ndarray, radius: float | np.ndarray = 1.0) -> np.ndarray:
    """Thickness of a round body at a depth (0 at its edge, `radius` in its middle): 0..1."""
    t = np.clip(depth / radius, 0.0, 1.0)
    return np.sqrt(t * (2.0 - t))


def _smooth(distance: np.ndarray, width: float = 1.0) -> np.ndarray:
    """Smooth step from 0 (distance <= 0) to 1 (distance >= width)."""
    t = np.clip(distance / width, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _bump(x: np.ndarray, width: float, y: np.ndarray | float = 0.0, height: float = 1.0) -> np.ndarray:
    """A Gaussian of one or two coordinates: 1 at 0, 1/e at `width` or `height`."""
    return np.exp(-((x / width) ** 2) - (y / height) ** 2)


def _ellipsoid(x: np.ndarray, y: np.ndarray, rx: float, ry: float, edge: float) -> np.ndarray:
    """Thickness 0..1 of a body around x = y = 0 with semi-axes rx and ry, round in the outer share `edge` of it."""
    return _dome(1 - np.sqrt((x / rx) ** 2 + (y / ry) ** 2), edge)


def _curve(at: np.ndarray, position: tuple[float, ...], value: tuple[float, ...]) -> np.ndarray:
    """A smooth curve through (position, value): cubic Hermite with finite-difference slopes."""
    position, value = np.float32(position), np.float32(value)
    i = np.clip(np.searchsorted(position, at) - 1, 0, len(position) - 2)
    step = position[i + 1] - position[i]
    slope = np.gradient(value, position)
    t = np.clip((at - position[i]) / step, 0.0, 1.0)
    return (
        (1 + 2 * t) * (1 - t) ** 2 * value[i]
        + t * (1 - t) ** 2 * step * slope[i]
        + t * t * (3 - 2 * t) * value[i + 1]
        + t * t * (t - 1) * step * slope[i + 1]
    )


def _lung_wall(y: np.ndarray) -> np.ndarray:
    """Half-width of the rib cage's inside at height y; 0 above the apex."""
    t = np.clip((y - APEX_Y) / (0.36 - APEX_Y), 0.0, 1.0)
    return 0.215 * _dome(t, 0.20) + 0.15 * (1 - (1 - t) ** 1.7)


def _draw(size: tuple[int, int], rng: np.random.Generator, lesions: tuple[Lesion, ...]) -> np.ndarray:
    unit = pixels_per_unit(size)
    y, x = (((np.arange(side) - side / 2 + 0.5) / unit).astype(np.float32) for side in size)
    y = y[:, None]  # [H, 1]
    vary = rng.uniform(-1.0, 1.0, 16).tolist()  # one patient's build
    growth = next((lesion.ellipse[2] / HEART[2] for lesion in lesions if lesion.kind == "cardiomegaly"), 1.0)
    inspiration = 0.016 * vary[1]

    x = x / (1.0 + 0.03 * vary[2]) - 0.008 * vary[3] - 0.02 * vary[4] * y  # [H, W]: build, centring, tilt
    ax = np.abs(x)
    left = _smooth(0.5 + x / 0.05)  # 0 on the patient's right, 1 on the left

    # --- body -------------------------------------------------------------------------------------
    slope = 0.02 * vary[8]
    trunk = _curve(
        y,
        (-0.60, -0.52, -0.47, -0.43, -0.39, -0.34, -0.28, -0.20, -0.08, 0.10, 0.30, 0.55),
        (0.095, 0.10, 0.12, 0.19 - slope, 0.33 - 2 * slope, 0.46 - slope, 0.54, 0.57, 0.48, 0.437, 0.43, 0.44),
    )
    film = 0.84 * _dome(trunk - ax, 0.62 * trunk) ** 0.6
    arm_axis = np.abs((ax - 0.52) * 0.97 - (y + 0.30) * 0.24)
    np.maximum(film, 0.60 * _dome(0.085 - arm_axis, 0.085) * _smooth(y + 0.32, 0.05), out=film)
    inside = _smooth(trunk - ax, 0.02)

    # --- lungs ------------------------------------------------------------------------------------
    wall = _lung_wall(y)
    d_wall = wall - ax
    lateral = ax * (1 / 0.36)
    dome = DOME_Y - 0.018 + 0.030 * left + inspiration - 0.06 * (1 - ((lateral - 0.50) / 0.5) ** 2)
    dome += 0.045 * _smooth(lateral - 0.72, 0.32) ** 1.5
    d_dome = dome - y
    across = _dome(d_wall, 0.14)
    lung = across**0.85 * _dome(d_dome, 0.035)
    lung *= 0.70 + 0.30 * _smooth(y - APEX_Y, 0.20)
    # Lung goes on behind and below the dome: the upper abdomen is a little darker.
    film -= inside * (0.53 * lung + 0.06 * (across * _smooth(d_dome + 0.13, 0.13) - lung).clip(0))

    # --- mediastinum, heart, great vessels ----------------------------------------------------------
    pedicle = _curve(y, (-0.50, -0.34, -0.22, -0.08, 0.05, 0.4), (0.040, 0.050, 0.060, 0.064, 0.068, 0.07))
    soft = 0.88 * _smooth(pedicle - ax + 0.008, 0.024)
    cos, sin = math.cos(0.45), math.sin(0.45)
    hx, hy = x - (HEART[0] + 0.02 * (growth - 1)), y - HEART[1] - inspiration
    for body in (
        (hx * cos + hy * sin, hy * cos - hx * sin, HEART[2] * growth, 0.114 * growth**0.8, 0.55),  # ventricles, tilted
        (x + 0.022, y - (0.125 + inspiration), 0.072 * growth, 0.120, 0.5),  # right atrium
        (x - 0.038, y - 0.025, 0.068, 0.115, 0.45),  # pulmonary trunk, left auricle
        (x - 0.040, y + 0.160, 0.040, 0.046, 0.5),  # aortic knob
        (x + 0.034, y + 0.12, 0.035, 0.12, 0.5),  # superior vena cava, ascending aorta
    ):
        np.maximum(soft, 0.88 * _ellipsoid(*body), out=soft)
    film += inside * (0.50 * lung * soft + 0.08 * _smooth(pedicle - ax + 0.01, 0.04))
    film += 0.03 * _smooth(0.018 - np.abs(x - 0.040), 0.02) * _smooth(y + 0.16, 0.02) * lung  # descending aorta
    film -= 0.085 * _smooth(0.017 - np.abs(x + 0.003), 0.012) * _smooth(-0.115 - y, 0.03)  # trachea
    bronchus = np.minimum(np.abs(x + 0.003 + (y + 0.125) / 0.95), np.abs(x + 0.003 - (y + 0.125) / 0.68))
    film -= 0.045 * _smooth(0.017 - bronchus, 0.015) * _smooth(y + 0.14, 0.03) * _smooth(-0.045 - y, 0.03)

    # --- spine ------------------------------------------------------------------------------------
    level = (y + 0.6) / (0.056 + 0.018 * (y + 0.6))  # [H, 1]: vertebra's number
    phase = level - np.floor(level)
    breadth = 0.033 + 0.012 * (y + 0.5)
    seen = inside * (0.28 + 0.72 * _smooth(-0.16 - y, 0.22))
    column = _smooth(breadth + 0.004 * np.cos(2 * np.pi * phase) - ax, 0.010)
    from_middle = np.abs(phase - 0.5)
    plates = _bump(from_middle - 0.36, 0.05) - 1.2 * _smooth(from_middle - 0.40, 0.07)
    film += seen * column * (0.035 + 0.045 * plates)
    film += 0.05 * seen * _bump(ax - 0.66 * breadth, 0.006, phase - 0.36, 0.13)  # pedicles
    film += 0.05 * seen * _bump(x, 0.005, phase - 0.62, 0.15)  # spinous processes

    # --- ribs -------------------------------------------------------------------------------------
    reach = ax / np.maximum(wall, 0.06)
    cage = inside * _smooth(1.10 - reach, 0.06) * _smooth(y - APEX_Y + 0.03, 0.03)
    cage *= 0.25 + 0.75 * _smooth(d_dome / 0.02 + 0.5)
    # Posterior: from the spine outward, nearly level, then down along the wall, more so lower down.
    drop = 0.055 + 0.11 * _smooth(y + 0.35, 0.5)
    posterior = y + 0.50 + 0.02 * _smooth(0.16 - ax, 0.16) - drop * reach**2.6
    shade = (0.125 - 0.075 * soft) * _smooth(ax - 0.035, 0.03) * (0.75 + 0.25 * reach)
    film += cage * shade * _ribs(posterior / (0.064 + 0.026 * (y + 0.4)), 0.27)
    # Anterior: from the wall down and inward, ending in cartilage that does not show.
    anterior = y + 0.55 - 0.20 * (1 - reach) + 0.06 * (reach - 0.6) ** 2
    cartilage = _smooth(reach - 0.42, 0.22) * _smooth(y + 0.30, 0.10)
    film += cage * cartilage * 0.06 * _ribs(anterior / 0.096 + 0.1, 0.24)
    # The wall itself, where the ribs are seen along their edge.
    rim = _bump(d_wall + 0.010, 0.009) + 0.6 * _bump(d_wall + 0.027, 0.007)
    film += 0.07 * inside * rim * _smooth(y - APEX_Y, 0.05)

    # --- clavicles, scapulae, humeral heads -----------------------------------------------------------
    along = ax - 0.03
    clavicle = -0.272 + 0.012 * vary[5] - 0.40 * along + 0.52 * along**2 + 0.008 * np.sin(along * 18.0)
    d = np.abs(y - clavicle) / (0.0125 + 0.008 * np.exp((0.03 - ax) / 0.03))
    bone = 0.6 * _dome(1 - d) + 0.45 * _bump(d - 0.84, 0.17)
    film += 0.10 * bone * (_smooth(ax - 0.030, 0.008) * _smooth(0.40 - ax, 0.04)) * (d < 1.4)
    edge = ax - (0.315 + 0.13 * (y + 0.28) ** 2 + 0.18 * (y + 0.28))
    blade = _smooth(edge, 0.012) * _smooth(y + 0.33, 0.06) * _smooth(0.03 - y, 0.10)
    film += inside * blade * (0.035 + 0.04 * _bump(edge, 0.010)) * _smooth(0.47 - ax, 0.08)
    film += inside * 0.07 * _ellipsoid(ax - 0.475, y + 0.285, 0.055, 0.055, 0.8)

    # --- abdomen, breasts ---------------------------------------------------------------------------
    film += 0.04 * inside * _smooth(y - dome, 0.05) * (1.0 - 0.5 * left)
    bubble = _ellipsoid(x - 0.16 - 0.02 * vary[6], y - dome - 0.052, 0.085, 0.042, 0.6)
    film -= (0.14 + 0.05 * vary[7]) * bubble
    if vary[0] > 0:
        breast = _ellipsoid(ax - 0.235, y - 0.12, 0.180, 0.215, 0.8)
        film += 0.08 * breast * _smooth(y + 0.12, 0.24) * _smooth(ax - 0.04, 0.14)

    # --- vessels and texture --------------------------------------------------------------------------
    air = lung * (1 - soft / 0.88).clip(0, 1)
    lines = 0.15 * air * _vessels(size, rng)
    for sign in (-1.0, 1.0):  # hila
        film += 0.12 * lung * _bump(x - sign * 0.080, 0.030, y + 0.028 + 0.012 * sign, 0.058)
    lines += 0.020 * air * _texture(size, rng, unit * 0.010)
    film += lines + 0.010 * inside * _texture(size, rng, unit * 0.09)

    for lesion in lesions:
        if lesion.kind != "cardiomegaly":
            _add_lesion(lesion, (film, y, x, lung, air, d_wall, lines), unit, rng)

    _add_marker(film)
    film = np.clip(1.12 * film - 0.04, 0, None)
    film /= 1 + 0.10 * film**4  # a film's shoulder: the brightest parts flatten
    return (0.02 + 0.97 * film).clip(0, 1)


def _ribs(coordinate: np.ndarray, half_width: float) -> np.ndarray:
    """Profile 0..1 of ribs, one per unit of `coordinate`: a tube with brighter cortical edges."""
    d = np.abs(coordinate - np.floor(coordinate) - 0.5) / half_width
    return 0.6 * _dome(1.05 - d) + 0.4 * _bump(d - 0.86, 0.17)


def _texture(size: tuple[int, int], rng: np.random.Generator, grain: float) -> np.ndarray:
    """Smooth noise with about unit deviation and features of `grain` px: float32 [H, W]."""
    coarse = [max(2, int(side / max(grain, 1.0)) + 1) for side in size]
    noise = Image.fromarray(rng.standard_normal(coarse, dtype=np.float32))
    return np.asarray(noise.resize(size[::-1], Image.Resampling.BICUBIC)) * 1.2


def _vessels(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Branching pulmonary vessels, 0..1, [H, W]: from each hilum outward, thinner at every branch."""
    picture, unit = Image.new("L", size[::-1]), pixels_per_unit(size)
    pen = ImageDraw.Draw(picture)
    branches = [
        (sign * 0.075, -0.025 + 0.03 * direction, sign, direction, 0.010, 0)
        for sign in (-1.0, 1.0)
        for direction in (np.linspace(-1.35, 1.35, 11) + rng.uniform(-0.1, 0.1, 11)).tolist()
    ]
    while branches:
        x, y, sign, direction, thick, depth = branches.pop()
        line = [(x, y)]
        for bend in rng.uniform(-0.16, 0.16, 5 if depth < 4 else 3).tolist():
            direction += bend
            x, y = x + sign * 0.013 * math.cos(direction), y + 0.013 * math.sin(direction)
            line.append((x, y))
        points = to_pixels(size, *np.transpose(line)).T.ravel().tolist()
        shade = int(255 * min(1.0, 0.10 + 75 * thick))
        pen.line(points, fill=shade, width=max(1, round(thick * unit)), joint="curve")
        if depth < 5 and abs(x) < 0.34:
            up, down = rng.uniform(0.2, 0.55, 2).tolist()
            branches.append((x, y, sign, direction - up, thick * 0.74, depth + 1))
            if depth < 4:
                branches.append((x, y, sign, direction + down, thick * 0.66, depth + 1))
    blurred = picture.filter(ImageFilter.GaussianBlur(max(0.5, 0.0018 * unit)))
    return np.asarray(blurred, dtype=np.float32) / 255.0


def _add_lesion(lesion: Lesion, maps: tuple[np.ndarray, ...], unit: float, rng: np.random.Generator) -> None:
    """Draw a lesion into the film, the first of the `maps` of `_draw`, in the rows that it reaches."""
    cx, cy, rx, ry = lesion.ellipse
    rows = slice(*np.searchsorted(maps[1][:, 0], (cy - 2 * ry, cy + 2 * ry)))
    film, y, x, lung, air, d_wall, lines = (plane[rows] for plane in maps)
    u, v = (x - cx) / rx, (y - cy) / ry
    radius = np.sqrt(u * u + v * v)
    same_side = x * cx > 0

    def texture(grain: float) -> np.ndarray:
        return _texture(x.shape, rng, grain * rx * unit)

    if lesion.kind == "nodule":
        factors = _dome(1 - radius, 0.7), np.sqrt(lung)
    elif lesion.kind == "mass":
        factors = _dome(1 - radius + 0.10 * texture(0.45), 0.75), np.sqrt(lung)
    elif lesion.kind == "consolidation":
        cloud = _smooth(1.20 - radius + 0.22 * texture(0.5), 0.95)
        factors = cloud, 0.92 + 0.10 * texture(0.16), np.sqrt(air)
    elif lesion.kind == "atelectasis":  # a plate
        factors = _bump(v + 0.4 * u, 0.5) * _smooth(1.1 - np.abs(u), 0.5), np.sqrt(air)
    elif lesion.kind == "effusion":  # fluid in the angle, its meniscus climbing towards the wall
        inward = (abs(cx) + rx - np.abs(x)) / (2 * rx)
        level = cy + ry - 2 * ry * np.exp(-1.3 * inward.clip(0))
        fluid = _smooth((y - level) / (0.35 * ry) + 0.5) * same_side * _smooth(1.4 - inward, 0.5)
        factors = fluid, (0.85 - film).clip(0), _smooth(lung, 0.05)
    else:  # pneumothorax, lung fallen off the wall: nothing but black beyond a thin line
        gap = 1.5 * rx * _smooth(cy + 1.1 * ry - y, 1.6 * ry)
        d_pleura = gap - d_wall
        here = same_side * _smooth(np.abs(x) - 0.055, 0.03)
        line = _bump(d_pleura, 0.0035) * here * (gap > 0.002)
        air_only = 0.085 * np.sqrt(lung) + lines
        factors = (0.11 * line * lung - _smooth(d_pleura, 0.006) * here * air_only,)
    film += math.prod(factors, start=lesion.contrast * LESIONS[lesion.kind][0])


def _add_marker(film: np.ndarray) -> None:
    """The lead letter L beside the patient's left shoulder, so that a flipped picture shows."""
    length = 0.045 * pixels_per_unit(film.shape)
    x, y = to_pixels(film.shape, 0.385, -0.455).clip(0).astype(int)
    side, bar = max(3, round(length)), max(1, round(length / 5))
    film[y : y + side, x : x + bar] = 0.95
    film[y + side - bar : y + side, x : x + round(side * 0.65)] = 0.95
