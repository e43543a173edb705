"""A made-up frontal chest radiograph: what `datasets.phantom` puts into its studies.

The picture is a sum of line-integral-like terms (body, lungs taken out of it, heart, spine, ribs,
clavicles, vessels, lesions, noise), drawn in *chest coordinates*: x to the right of the image,
y down, in units of the shorter usable side of the film, origin in the middle. As on every frontal
film the patient's left is on the image's right, so the heart's apex, the aortic knob and the
gastric bubble lie at x > 0. Nothing here is meant to be diagnosed; it has the structures, scales
and contrasts that masks, gradients and gaze have to cope with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Anatomy is drawn at no more than this many pixels on the long side and enlarged: a film's blur is a
# few pixels at native resolution anyway. Only the noise is drawn at the full size.
MAX_DRAWN_SIDE = 1100
APEX_Y, DOME_Y = -0.385, 0.285

LESION_KINDS = ("nodule", "mass", "consolidation", "effusion", "pneumothorax", "cardiomegaly", "atelectasis")


@dataclass(frozen=True)
class Lesion:
    """One abnormality. `ellipse` = (centre x, centre y, semi-axis x, semi-axis y) in chest coordinates;
    `contrast` multiplies the kind's usual contrast."""

    kind: str
    ellipse: tuple[float, float, float, float]
    contrast: float = 1.0


@dataclass(frozen=True)
class Frame:
    """Where chest coordinates lie on an image of `size` = (width, height) px."""

    size: tuple[int, int]

    @property
    def unit(self) -> float:
        """Pixels per unit of chest coordinates."""
        return min(self.size[0] / 0.92, self.size[1] / 1.0)

    def to_pixels(self, x: float | np.ndarray, y: float | np.ndarray) -> tuple:
        """Chest coordinates -> px, where a pixel's centre has whole-number coordinates."""
        return (self.size[0] / 2 - 0.5 + self.unit * np.asarray(x),
                self.size[1] / 2 - 0.5 + self.unit * np.asarray(y))

    def box(self, ellipse: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """The (xmin, ymin, xmax, ymax) in px of an ellipse, cut to the image."""
        cx, cy, rx, ry = ellipse
        x, y = self.to_pixels([cx - rx, cx + rx], [cy - ry, cy + ry])
        x, y = np.clip(x, 0, self.size[0] - 1), np.clip(y, 0, self.size[1] - 1)
        return float(x[0]), float(y[0]), float(x[1]), float(y[1])


def chest_ellipses() -> dict[str, tuple[float, float, float, float]]:
    """Regions that a reader visits, as ellipses in chest coordinates."""
    return {
        "right apex": (-0.17, -0.27, 0.06, 0.06), "left apex": (0.17, -0.27, 0.06, 0.06),
        "right mid": (-0.21, -0.09, 0.08, 0.07), "left mid": (0.22, -0.09, 0.07, 0.07),
        "right base": (-0.22, 0.11, 0.09, 0.07), "left base": (0.27, 0.12, 0.05, 0.07),
        "right angle": (-0.32, 0.26, 0.03, 0.04), "left angle": (0.33, 0.27, 0.03, 0.04),
        "right hilum": (-0.10, -0.03, 0.04, 0.05), "left hilum": (0.11, -0.05, 0.04, 0.05),
        "mediastinum": (0.0, -0.15, 0.04, 0.12), "heart": (0.07, 0.13, 0.10, 0.09),
        "abdomen": (0.0, 0.38, 0.25, 0.05),
    }


def chest_box(frame: Frame) -> tuple[float, float, float, float]:
    """The box around the lungs and heart, px (xmin, ymin, xmax, ymax)."""
    return frame.box((0.0, (APEX_Y + 0.36) / 2, 0.375, (0.36 - APEX_Y) / 2))


def draw_lesion(kind: str, rng: np.random.Generator, size: float = 1.0, contrast: float = 1.0) -> Lesion:
    """A lesion of `kind` at a plausible place; `size` multiplies its usual linear extent."""
    side = rng.choice((-1.0, 1.0))

    def within(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    if kind in ("nodule", "mass", "consolidation"):
        radius = {"nodule": (0.014, 0.026), "mass": (0.038, 0.062), "consolidation": (0.065, 0.105)}[kind]
        rx = size * within(*radius)
        ry = rx * within(0.85, 1.15)
        cy = within(-0.25, 0.16)
        wall = _lung_wall(np.array([cy]))[0]
        inner = 0.10 if side < 0 or cy < 0.02 else 0.235  # the heart takes the left lung's inner part
        low, high = inner + min(rx, 0.04), wall - 0.02 - min(rx, 0.05)
        ellipse = (side * within(low, max(low, high)), cy, rx, ry)
    elif kind == "effusion":
        rx, ry = size * within(0.075, 0.10), size * within(0.07, 0.12)
        ellipse = (side * (0.36 - rx), 0.33 - ry, rx, ry)
    elif kind == "pneumothorax":
        rx, ry = size * within(0.075, 0.10), size * within(0.10, 0.14)
        ellipse = (side * (0.31 - rx), APEX_Y + 0.02 + ry, rx, ry)
    elif kind == "cardiomegaly":
        growth = 1.0 + 0.28 * size
        ellipse = (0.055, 0.14, 0.155 * growth, 0.125 * growth ** 0.6)
    elif kind == "atelectasis":
        rx, ry = size * within(0.06, 0.09), size * within(0.012, 0.018)
        ellipse = (side * within(0.22, 0.25), within(0.10, 0.20), rx, ry)
    else:
        raise ValueError(f"unknown lesion kind {kind!r}: one of {', '.join(LESION_KINDS)}")
    return Lesion(kind, tuple(round(float(value), 5) for value in ellipse), contrast)


def render_chest(size: tuple[int, int], rng: np.random.Generator, lesions: tuple[Lesion, ...] = ()) -> np.ndarray:
    """Draw a chest: uint8 [height, width], air black and bone bright, for `size` = (width, height) px.

    The anatomy depends only on `rng` and `lesions`; the noise also on the size.
    """
    width, height = size
    shrink = min(1.0, MAX_DRAWN_SIDE / max(size))
    drawn = (max(2, round(width * shrink)), max(2, round(height * shrink)))
    film = _draw(drawn, rng, lesions)
    if drawn != size:
        film = np.asarray(Image.fromarray(film).resize(size, Image.Resampling.BICUBIC))
    # Quantum noise is relatively stronger where few quanta pass: in the bright parts of the film.
    noise = rng.standard_normal((height, width), dtype=np.float32)
    noise *= 0.006 + 0.008 * film
    film = film + noise
    np.clip(film, 0.0, 1.0, out=film)
    return (film * 255.0 + 0.5).astype(np.uint8)


def _dome_profile(t: np.ndarray) -> np.ndarray:
    """Thickness of a round body at depth t (0 at its edge, 1 in its middle): 0..1."""
    t = np.clip(t, 0.0, 1.0)
    return np.sqrt(t * (2.0 - t))


def _smooth(t: np.ndarray) -> np.ndarray:
    """Smooth step from 0 (t <= 0) to 1 (t >= 1)."""
    t = np.clip(t, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _curve(at: np.ndarray, points: list[tuple[float, float]]) -> np.ndarray:
    """A smooth curve through `points` (position, value): cubic Hermite with finite-difference slopes."""
    position, value = (np.array(column) for column in zip(*points))
    slope = np.gradient(value, position)
    i = np.clip(np.searchsorted(position, at) - 1, 0, len(position) - 2)
    step = position[i + 1] - position[i]
    t = np.clip((at - position[i]) / step, 0.0, 1.0)
    return ((1 + 2 * t) * (1 - t) ** 2 * value[i] + t * (1 - t) ** 2 * step * slope[i]
            + t * t * (3 - 2 * t) * value[i + 1] + t * t * (t - 1) * step * slope[i + 1])


def _lung_wall(y: np.ndarray) -> np.ndarray:
    """Half-width of the rib cage's inside at height y; 0 above the apex."""
    t = np.clip((y - APEX_Y) / (0.36 - APEX_Y), 0.0, 1.0)
    return 0.15 * np.sqrt(np.clip(t / 0.12, 0, 1) * (2 - np.clip(t / 0.12, 0, 1))) + 0.205 * (1 - (1 - t) ** 2.2)


def _draw(size: tuple[int, int], rng: np.random.Generator, lesions: tuple[Lesion, ...]) -> np.ndarray:
    frame = Frame(size)
    width, height = size
    x = ((np.arange(width) - width / 2 + 0.5) / frame.unit).astype(np.float32)[None, :]  # [1, W]
    y = ((np.arange(height) - height / 2 + 0.5) / frame.unit).astype(np.float32)[:, None]  # [H, 1]
    pixel = 1.0 / frame.unit
    vary = rng.uniform(-1.0, 1.0, 16)  # one patient's build
    enlarged = [lesion for lesion in lesions if lesion.kind == "cardiomegaly"]
    female, inspiration = vary[0] > 0.0, 0.018 * vary[1]
    build = 1.0 + 0.04 * vary[2]

    x = x / build - 0.012 * vary[3] - 0.02 * vary[4] * y  # [H, W]: build, centring and a slight tilt
    ax = np.abs(x)
    right = x < 0  # the patient's right

    # --- body -------------------------------------------------------------------------------------
    trunk = _curve(y, [(-0.60, 0.085), (-0.50, 0.088), (-0.44, 0.125), (-0.40, 0.24), (-0.35, 0.40), (-0.29, 0.52),
                       (-0.20, 0.56), (-0.08, 0.47), (0.10, 0.435), (0.30, 0.43), (0.55, 0.44)])
    film = 0.86 * _dome_profile((trunk - ax) / (0.75 * trunk)) ** 0.55
    along = (y + 0.30) * 0.97 - (ax - 0.50) * -0.24
    across = np.abs((ax - 0.505) * 0.97 - (y + 0.30) * 0.24)
    arm = np.where(along > 0, 0.62 * _dome_profile((0.085 - across) / 0.085) ** 0.7, 0)
    np.maximum(film, arm.astype(np.float32), out=film)
    inside = _smooth((trunk - ax) / 0.02)

    # --- lungs ------------------------------------------------------------------------------------
    wall = _lung_wall(y)
    d_wall = wall - ax
    lateral = np.clip(ax / 0.35, 0, 1.1)
    dome = np.where(right, DOME_Y - 0.015, DOME_Y + 0.012) + inspiration
    dome = dome - 0.055 * (1 - ((lateral - 0.52) / 0.52) ** 2) + 0.11 * _smooth((lateral - 0.72) / 0.33)
    d_dome = dome - y
    lung = _dome_profile(d_wall / 0.13) ** 0.8 * _dome_profile(d_dome / 0.05)
    lung *= 0.62 + 0.38 * _smooth((y - APEX_Y) / 0.22)
    # Lung goes on behind and below the dome: the upper abdomen is a little darker.
    below = _dome_profile(d_wall / 0.13) * _smooth((d_dome + 0.10) / 0.10)
    film -= inside * (0.56 * lung + 0.045 * (below - lung).clip(0))

    # --- mediastinum, heart, great vessels ----------------------------------------------------------
    growth = 1.0
    if enlarged:
        growth = enlarged[0].ellipse[2] / 0.155
    soft = np.zeros_like(film)
    pedicle = _curve(y, [(-0.50, 0.050), (-0.30, 0.060), (-0.20, 0.066), (-0.10, 0.066), (0.0, 0.07), (0.35, 0.06)])
    soft = 0.80 * _smooth((pedicle - ax) / 0.022)
    tilt = 0.42
    hx, hy = x - (0.060 + 0.02 * (growth - 1)), y - 0.150
    u, v = hx * np.cos(tilt) + hy * np.sin(tilt), -hx * np.sin(tilt) + hy * np.cos(tilt)
    heart = 1 - np.sqrt((u / (0.158 * growth)) ** 2 + (v / (0.118 * growth ** 0.7)) ** 2)
    atrium = 1 - np.sqrt(((x + 0.030) / (0.066 * growth)) ** 2 + ((y - 0.125) / 0.115) ** 2)
    base = 1 - np.sqrt(((x - 0.045) / 0.075) ** 2 + ((y - 0.03) / 0.12) ** 2)
    knob = 1 - np.sqrt(((x - 0.045) / 0.042) ** 2 + ((y + 0.155) / 0.043) ** 2)
    for term, amplitude, edge in ((heart, 0.86, 0.55), (atrium, 0.80, 0.5), (base, 0.76, 0.6), (knob, 0.72, 0.5)):
        np.maximum(soft, amplitude * _dome_profile(term / edge) ** 0.7, out=soft)
    soft = np.minimum(soft, 0.86)
    film += inside * 0.60 * lung * soft
    film -= 0.10 * _smooth((0.013 - np.abs(x + 0.004)) / 0.008) * _smooth((-0.105 - y) / 0.02)  # trachea
    for sign, slope, length in ((-1, 0.75, 0.075), (1, 0.55, 0.085)):  # main bronchi
        centre = sign * (y + 0.115) / slope
        film -= 0.06 * _smooth((0.011 - np.abs(x - centre)) / 0.008) * ((y > -0.115) & (np.abs(centre) < length))

    # --- spine ------------------------------------------------------------------------------------
    level = (y + 0.6) / (0.058 + 0.02 * (y + 0.6))
    phase = level - np.floor(level)
    body_width = 0.034 + 0.012 * (y + 0.5)
    column = _smooth((body_width + 0.004 * np.cos(2 * np.pi * phase) - ax) / 0.012)
    disc = _smooth((np.abs(phase - 0.5) - 0.36) / 0.08)
    seen = 0.25 + 0.75 * _smooth((-0.12 - y) / 0.25)
    film += inside * column * seen * (0.075 - 0.075 * disc)
    pedicles = ((ax - 0.62 * body_width) / 0.006) ** 2 + ((phase - 0.42) / 0.13) ** 2
    film += 0.05 * seen * inside * np.exp(-pedicles)
    film += 0.05 * seen * inside * np.exp(-(x / 0.006) ** 2 - ((phase - 0.68) / 0.16) ** 2)  # spinous processes

    # --- ribs -------------------------------------------------------------------------------------
    reach = ax / np.maximum(wall, 0.05)
    cage = _smooth((1.06 - reach) / 0.05) * _smooth((y - APEX_Y + 0.03) / 0.03)
    posterior = (y + 0.46 + 0.035 * ax / 0.1 * np.exp(-ax / 0.1) - 0.10 * reach ** 2.4 * (0.45 + 0.9 * (y + 0.4)).clip(0.2, 1.0))
    spacing = 0.070 + 0.012 * (y + 0.4)
    fade = 0.55 + 0.45 * _smooth((ax - 0.05) / 0.05)
    film += inside * cage * fade * _ribs(posterior / spacing, 0.24) * np.where(d_dome > 0, 0.085, 0.022)
    anterior = y + 0.40 - 0.17 * (1 - reach) - 0.02
    cartilage = _smooth((reach - 0.42 - 0.25 * (y + 0.2)) / 0.18)
    film += inside * cage * cartilage * _ribs(anterior / 0.088 + 0.3, 0.22) * np.where(d_dome > 0, 0.055, 0.012)
    rim = np.exp(-((d_wall + 0.012) / 0.011) ** 2) + 0.7 * np.exp(-((d_wall + 0.030) / 0.008) ** 2)
    film += 0.075 * inside * rim * _smooth((y - APEX_Y) / 0.05)

    # --- clavicles, scapulae ------------------------------------------------------------------------
    clavicle = -0.262 + 0.012 * vary[5] - 0.26 * (ax - 0.03) + 0.055 * np.sin((ax - 0.03) / 0.33 * 2 * np.pi) * 0.35
    thick = 0.0135 + 0.006 * np.exp(-(ax - 0.03) / 0.03)
    d = np.abs(y - clavicle) / thick
    bone = 0.65 * _dome_profile(1 - d) + 0.45 * np.exp(-((d - 0.82) / 0.16) ** 2)
    film += 0.105 * bone * (d < 1.3) * _smooth((ax - 0.028) / 0.008) * _smooth((0.40 - ax) / 0.03)
    blade = _smooth((ax - (0.30 + 0.16 * (y + 0.28))) / 0.02) * _smooth((y + 0.32) / 0.06) * _smooth((0.02 - y) / 0.14)
    film += 0.05 * blade * _smooth((0.44 - ax) / 0.05)
    head = 1 - np.sqrt(((ax - 0.47) / 0.05) ** 2 + ((y + 0.285) / 0.055) ** 2)
    film += 0.12 * _dome_profile(head / 0.5)

    # --- abdomen, breasts ---------------------------------------------------------------------------
    film += 0.05 * inside * _smooth((y - dome) / 0.06) * (0.4 + 0.6 * right)
    bubble = 1 - np.sqrt(((x - 0.17 - 0.02 * vary[6]) / 0.075) ** 2 + ((y - 0.345) / 0.045) ** 2)
    film -= (0.16 + 0.06 * vary[7]) * _dome_profile(bubble / 0.5) ** 0.8 * (d_dome < -0.008)
    if female:
        breast = 1 - np.sqrt(((ax - 0.245) / 0.175) ** 2 + ((y - 0.10) / 0.20) ** 2)
        film += 0.085 * _dome_profile(breast) * _smooth((y + 0.10) / 0.20)

    # --- vessels and texture --------------------------------------------------------------------------
    air = np.clip(lung * (1 - soft / 0.86), 0, 1)
    film += 0.17 * air * _vessels(frame, rng)
    for sign in (-1.0, 1.0):
        hilum = ((x - sign * 0.082) / 0.030) ** 2 + ((y + 0.025 + 0.012 * sign) / 0.058) ** 2
        film += 0.14 * lung * np.exp(-hilum)
    film += 0.034 * air * _texture(size, rng, frame.unit * 0.012) + 0.016 * inside * _texture(size, rng, frame.unit * 0.09)

    for lesion in lesions:
        _add_lesion(film, lesion, x, y, lung, air, d_dome, d_wall, rng, pixel)

    _marker(film, frame)
    film = np.clip(film, 0, None)
    film = film / (1 + 0.10 * film ** 4)  # a film's shoulder: the brightest parts flatten
    return (0.025 + 0.965 * film).astype(np.float32).clip(0, 1)


def _ribs(coordinate: np.ndarray, half_width: float) -> np.ndarray:
    """Profile 0..1 of ribs, one per unit of `coordinate`: a tube with brighter cortical edges."""
    d = np.abs(coordinate - np.floor(coordinate) - 0.5) / half_width
    return 0.6 * _dome_profile(1.05 - d) + 0.4 * np.exp(-((d - 0.86) / 0.17) ** 2)


def _texture(size: tuple[int, int], rng: np.random.Generator, grain: float) -> np.ndarray:
    """Smooth noise with about unit deviation and features of `grain` px: float32 [H, W]."""
    grain = max(grain, 1.0)
    coarse = (max(2, int(size[0] / grain) + 1), max(2, int(size[1] / grain) + 1))
    noise = rng.standard_normal((coarse[1], coarse[0]), dtype=np.float32)
    return np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)) * 1.2


def _vessels(frame: Frame, rng: np.random.Generator) -> np.ndarray:
    """Branching pulmonary vessels, 0..1, [H, W]: from each hilum outward, thinner at every branch."""
    picture = Image.new("L", frame.size, 0)
    pen = ImageDraw.Draw(picture)
    branches = []
    for sign in (-1.0, 1.0):
        for direction in np.linspace(-1.35, 1.35, 11) + rng.uniform(-0.1, 0.1, 11):
            branches.append((sign * 0.075, -0.025 + 0.01 * direction, sign, direction, 0.0115, 0))
    while branches:
        x, y, sign, direction, thick, depth = branches.pop()
        steps = 5 if depth < 4 else 3
        bends = rng.uniform(-0.16, 0.16, steps)
        points = [(x, y)]
        for bend in bends:
            direction += bend
            x, y = x + sign * 0.013 * np.cos(direction), y + 0.013 * np.sin(direction)
            points.append((x, y))
        px, py = frame.to_pixels(*np.array(points).T)
        shade = int(255 * min(1.0, 0.35 + 45 * thick))
        pen.line(list(zip(px.tolist(), py.tolist())), fill=shade, width=max(1, round(thick * frame.unit)), joint="curve")
        if depth < 5 and abs(x) < 0.34:
            fork = rng.uniform(0.2, 0.55, 2)
            branches.append((x, y, sign, direction - fork[0], thick * 0.74, depth + 1))
            if depth < 4:
                branches.append((x, y, sign, direction + fork[1], thick * 0.66, depth + 1))
    blurred = picture.filter(ImageFilter.GaussianBlur(max(0.5, 0.0018 * frame.unit)))
    return np.asarray(blurred, dtype=np.float32) / 255.0


def _add_lesion(film: np.ndarray, lesion: Lesion, x: np.ndarray, y: np.ndarray, lung: np.ndarray, air: np.ndarray,
                d_dome: np.ndarray, d_wall: np.ndarray, rng: np.random.Generator, pixel: float) -> None:
    cx, cy, rx, ry = lesion.ellipse
    if lesion.kind == "cardiomegaly":
        return  # the heart is drawn larger
    rows = slice(*np.searchsorted(y[:, 0], (cy - 2 * ry, cy + 2 * ry)))
    u, v = (x[rows] - cx) / rx, (y[rows] - cy) / ry
    radius = np.hypot(u, v)
    shape = radius.shape[::-1]
    if 0 in shape:
        return
    amplitude = {"nodule": 0.20, "mass": 0.30, "consolidation": 0.34, "effusion": 0.55, "pneumothorax": 0.09,
                 "atelectasis": 0.20}[lesion.kind] * lesion.contrast
    if lesion.kind == "nodule":
        film[rows] += amplitude * _dome_profile((1 - radius) / 0.7) * np.sqrt(lung[rows])
    elif lesion.kind == "mass":
        edge = radius + 0.10 * _texture(shape, rng, rx / pixel * 0.45)
        film[rows] += amplitude * _dome_profile((1 - edge) / 0.75) * np.sqrt(lung[rows])
    elif lesion.kind == "consolidation":
        cloud = 1.15 - radius + 0.28 * _texture(shape, rng, rx / pixel * 0.35)
        patchy = 0.85 + 0.15 * _texture(shape, rng, rx / pixel * 0.12)
        film[rows] += amplitude * _smooth(cloud / 0.65) * patchy * np.sqrt(air[rows])
    elif lesion.kind == "effusion":
        # Fluid in the angle: a meniscus that climbs towards the wall.
        level = cy + ry - 2 * ry * _smooth((np.abs(x[rows]) - (abs(cx) - rx)) / (2.2 * rx)) ** 1.3
        fluid = _smooth((y[rows] - level) / (0.25 * ry)) * (np.sign(x[rows]) == np.sign(cx))
        film[rows] += amplitude * fluid * lung[rows] * (radius < 2)
    elif lesion.kind == "pneumothorax":
        outside = _smooth((np.hypot((np.abs(x[rows]) - 0.10) / (abs(cx) + 0.2 * rx - 0.10),
                                    (y[rows] - 0.10) / (cy - 0.35 * ry - 0.10)) - 1) / 0.02)
        here = outside * (np.sign(x[rows]) == np.sign(cx)) * (y[rows] < cy + ry)
        line = np.exp(-((outside - 0.5) / 0.3) ** 2) * (here > 0)
        film[rows] += 0.9 * amplitude * line * np.sqrt(lung[rows]) - amplitude * here * lung[rows]
    else:  # atelectasis: a plate
        tilted = v + 0.5 * u
        film[rows] += amplitude * np.exp(-(tilted / 0.45) ** 2) * _smooth((1 - np.abs(u)) / 0.3) * np.sqrt(air[rows])


def _marker(film: np.ndarray, frame: Frame) -> None:
    """The lead letter L beside the patient's left shoulder, so that a flipped picture shows."""
    size = 0.045
    x, y = frame.to_pixels(0.385, -0.455)
    side, bar = max(3, round(size * frame.unit)), max(1, round(size * frame.unit / 5))
    x, y = int(x), max(0, int(y))
    film[y:y + side, x:x + bar] = 0.95
    film[y + side - bar:y + side, x:x + round(side * 0.65)] = 0.95
