"""Drawn chest X-rays: anatomy that varies, the 13 CheXpert findings with their boxes, and a report.

phantom(seed, index) is study `index` of an endless data set: texts and boxes at once, pixels on
first use of its `image`. A long tail of findings, half of all studies normal, some findings hedged
or not mentioned: what makes real reports hard to learn.

The thorax frame has its origin in mid-chest, u to the patient's left, v down, and the side of the
image is 1. sign is -1 on the patient's right and 1 on the left.
"""

import itertools
import math
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from readers.study import LABELS, Asked, Box, Study

# Indices of the splits: disjoint by construction.
SPLIT_START = {"train": 0, "val": 10_000_000, "test": 20_000_000}
CHOSEN_START = 5_000_000  # from the start of a split: studies that are chosen for their findings

# ------------------------------------------------------------------------------- tables

PHANTOM_LABELS = LABELS[1:]
RARE = {
    "Enlarged Cardiomediastinum",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Pneumothorax",
    "Pleural Other",
    "Fracture",
}
# Half of the studies are normal; the others draw one clinical picture, so that findings co-occur:
# (cumulative probability, P(label)).
PICTURES = (
    (
        0.100,
        {
            "Cardiomegaly": 0.85,
            "Edema": 0.50,
            "Pleural Effusion": 0.50,
            "Support Devices": 0.25,
            "Atelectasis": 0.15,
        },
    ),
    (
        0.185,
        {
            "Pneumonia": 0.55,
            "Consolidation": 0.40,
            "Lung Opacity": 0.50,
            "Pleural Effusion": 0.20,
            "Atelectasis": 0.06,
        },
    ),
    (
        0.260,
        {
            "Atelectasis": 0.90,
            "Pleural Effusion": 0.30,
            "Support Devices": 0.25,
            "Lung Opacity": 0.12,
        },
    ),
    (
        0.300,
        {"Fracture": 0.55, "Pneumothorax": 0.50, "Pleural Effusion": 0.15, "Support Devices": 0.30},
    ),
    (
        0.345,
        {
            "Lung Lesion": 0.95,
            "Enlarged Cardiomediastinum": 0.12,
            "Lung Opacity": 0.10,
            "Pleural Effusion": 0.08,
        },
    ),
    (0.400, {"Cardiomegaly": 0.85, "Enlarged Cardiomediastinum": 0.15, "Support Devices": 0.15}),
    (
        0.435,
        {
            "Enlarged Cardiomediastinum": 0.65,
            "Support Devices": 0.30,
            "Edema": 0.12,
            "Pneumothorax": 0.06,
        },
    ),
    (0.490, {"Pleural Other": 0.50, "Lung Opacity": 0.60, "Lung Lesion": 0.05}),
    (1.00, {"Support Devices": 0.06}),
)
# label: (region, noun phrases or whole sentences, which end in a full stop), in order of placing.
WORDINGS = {
    "Cardiomegaly": ("heart", "{degree} cardiomegaly|the heart is {degree}ly enlarged."),
    "Enlarged Cardiomediastinum": (
        "mediastinum",
        "widening of the mediastinum|the mediastinum is widened.",
    ),
    "Pleural Effusion": ("pleura", "{a}{size} {side} pleural effusion{s}"),
    "Pneumothorax": ("pleura", "a {size} {side} pneumothorax"),
    "Atelectasis": (
        "lungs",
        "linear {side} basilar atelectasis|atelectasis at the {side} lung base{s}",
    ),
    "Edema": (
        "lungs",
        "{degree} pulmonary edema|findings are consistent with {degree} pulmonary edema.",
    ),
    "Consolidation": (
        "lungs",
        "consolidation in the {side} {zone}|dense {side} {zone} consolidation",
    ),
    "Pneumonia": (
        "lungs",
        "patchy {side} {zone} pneumonia|findings are consistent with {side} {zone} pneumonia.",
    ),
    "Lung Opacity": ("lungs", "a hazy opacity in the {side} {zone}|a hazy {side} {zone} opacity"),
    "Lung Lesion": ("lungs", "{what} in the {side} {zone}"),
    "Pleural Other": ("pleura", "{side} {what}|{what} on the {side}"),
    "Fracture": ("bones", "{a}displaced {side} rib fracture{s}|{a}{side} rib fracture{s}"),
    "Support Devices": ("devices", "{what}|{what} is in place."),
}
LUNGS = tuple(label for label, (region, _) in WORDINGS.items() if region == "lungs")
CERTAIN = ("there {be} {phrase}.", "{phrase} {be} present.", "{phrase} {be} seen.")
HEDGED = ("possible {bare}.", "there may be {phrase}.")
DENIED = ("no {}.", "there is no {}.", "no evidence of {}.")
# (probability, region, labels, are they denied, wording), used when all of the labels are absent
# and none is denied yet.
NORMALS = (
    (
        0.20,
        "heart",
        ("Cardiomegaly", "Enlarged Cardiomediastinum"),
        True,
        "the cardiomediastinal silhouette is normal.",
    ),
    (0.90, "heart", ("Cardiomegaly",), True, "heart size is normal.|the heart is normal in size."),
    (
        0.75,
        "mediastinum",
        ("Enlarged Cardiomediastinum",),
        True,
        "the mediastinal contours are normal.|mediastinal contours are unremarkable.",
    ),
    (
        0.90,
        "lungs",
        LUNGS,
        False,
        "the lungs are clear.|lungs are clear bilaterally.|both lungs are clear.",
    ),
    (0.30, "lungs", ("Edema", "Cardiomegaly"), False, "pulmonary vascularity is normal."),
    (
        0.25,
        "pleura",
        ("Consolidation", "Pleural Effusion", "Pneumothorax"),
        True,
        "focal consolidation, pleural effusion, or pneumothorax",
    ),
    (
        0.80,
        "pleura",
        ("Pleural Effusion", "Pneumothorax"),
        True,
        "pleural effusion or pneumothorax",
    ),
    (0.35, "lungs", ("Consolidation",), True, "focal consolidation"),
    (0.10, "lungs", ("Pneumonia",), True, "pneumonia"),
    (0.15, "lungs", ("Edema",), True, "pulmonary edema"),
    (0.70, "pleura", ("Pneumothorax",), True, "pneumothorax"),
    (0.60, "pleura", ("Pleural Effusion",), True, "pleural effusion"),
    (0.10, "bones", ("Fracture",), True, "rib fracture"),
    (
        0.55,
        "bones",
        ("Fracture",),
        False,
        "the bones are intact.|osseous structures are unremarkable.",
    ),
)
ARTICLE, SUMMARY = re.compile("^an? "), "no acute cardiopulmonary abnormality"
ORDERS = ("heart mediastinum lungs pleura bones devices",) * 8 + (
    "lungs pleura heart mediastinum bones devices",
    "devices heart mediastinum lungs pleura bones",
)
SIZES, DEGREES = ("small", "moderate", "large"), ("mild", "moderate", "severe")
ZONES = {"upper lobe": -0.21, "mid lung": -0.03, "lower lobe": 0.13}  # heights of their centres
SIDES = {
    "Pleural Effusion": ("right", "left", "both"),
    "Atelectasis": ("right", "left", "both"),
    "Edema": ("both",),
    "Pneumothorax": ("right", "left"),
    "Pleural Other": ("right", "left"),
    "Fracture": ("right", "left"),
}
PLEURA = {
    "apical pleural thickening": (-0.5, -0.27),
    "lateral pleural thickening": (-0.16, 0.14),
    "pleural plaque": (-0.02, 0.12),
}
TUBES = {
    "a pacemaker": ((0.30, -0.24), (0.16, -0.30), (0.01, -0.20), (-0.03, 0.05), (0.08, 0.17)),
    "an endotracheal tube": ((0, -0.5), (0.005, -0.35), (0, -0.13)),
    "a central venous catheter": ((-0.22, -0.40), (-0.12, -0.36), (-0.065, -0.28), (-0.05, 0.0)),
    "an enteric tube": ((0, -0.5), (0.01, -0.2), (0.015, 0.2), (0.06, 0.32), (0.13, 0.36)),
    "a chest tube": ((0.46, 0.16), (0.33, 0.08), (0.27, -0.08), (0.24, -0.27)),
}
QUESTION_NAMES = {label: label.lower() for label in PHANTOM_LABELS} | {
    "Enlarged Cardiomediastinum": "widened mediastinum",
    "Cardiomegaly": "enlarged heart",
    "Pleural Other": "pleural thickening",
    "Fracture": "rib fracture",
}

# ------------------------------------------------------------------------------- studies


@dataclass(frozen=True)
class Finding:
    label: str
    side: str  # of the patient: "left", "right", "both" or ""
    zone: str  # a key of ZONES, or ""
    severity: int  # 0, 1, 2
    what: str  # its noun phrase, where the label alone does not tell
    certain: bool
    mentioned: bool
    boxes: tuple[Box, ...]
    shapes: tuple = field(repr=False)  # one per box: polygons in the thorax frame
    look: tuple = field(repr=False)  # blur, density, opacity


@dataclass(frozen=True, eq=False)
class Phantom:
    seed: int
    index: int
    findings: tuple[Finding, ...]
    report: str
    thinking: str
    # 14 ints in the order of LABELS, as the report says: 0 blank, 1 positive, 2 negative,
    # 3 uncertain.
    states: tuple[int, ...]
    boxes: dict[str, list[Box]]  # by label, of everything drawn, mentioned or not
    anatomy: SimpleNamespace = field(repr=False)

    @property
    def size(self):
        """Width and height in pixels."""
        return self.anatomy.size

    @cached_property
    def image(self):
        """PIL image, mode "L", drawn on first use."""
        return draw(self)


@lru_cache(maxsize=1 << 15)
def phantom(seed, index):
    """Study `index` of the data set `seed`. SFT and GRPO use the same ones, already drawn."""
    rng = np.random.default_rng([seed, index, 0])
    anatomy = sample_anatomy(rng)
    findings = sample_findings(rng, anatomy)
    # Texts have a stream of random numbers of their own: pixels do not depend on them.
    texts = write_texts(np.random.default_rng([seed, index, 1]), findings)
    boxes = {f.label: list(f.boxes) for f in findings}
    return Phantom(seed, index, findings, *texts, boxes, anatomy)


def read(seed, split, size, questions):
    """Two sets of `size` phantoms, as in the papers. questions: data.QUESTIONS.

    The first are studies as they come, with a report. The second are chosen because something is to
    be seen: they have the list of their findings and a question about each of them (now and then
    about one that is not there), in training a report, too.
    """
    start = SPLIT_START[split]
    for index in range(start, start + size):
        study = phantom(seed, index)
        yield as_study(study, [ask_report(study, questions)])

    chosen = (phantom(seed, index) for index in itertools.count(start + CHOSEN_START))
    chosen = (s for s in chosen if s.boxes.keys() & RARE or (s.boxes and s.index % 3 == 0))
    for study in itertools.islice(chosen, size):
        asked = [ask_list(study, questions)]
        # Held-out reports keep the natural prevalence.
        if split == "train":
            asked.append(ask_report(study, questions))
        rng = np.random.default_rng([seed, study.index, 7])
        labels = list(study.boxes)
        if rng.random() < 0.4:
            absent = [label for label in PHANTOM_LABELS if label not in study.boxes]
            labels.append(str(rng.choice(absent)))
        asked += [ask_boxes(study, label, rng, questions) for label in labels]
        yield as_study(study, asked)


def as_study(study, asked):
    index = str(study.index)
    return Study(index, index, [study], f"phantom {index}", asked=asked)


def ask_report(study, questions):
    question = questions["report"][0]
    return Asked(str(study.index), "report", question, study.report, thinking=study.thinking)


def ask_list(study, questions):
    names = [QUESTION_NAMES[label] for label in PHANTOM_LABELS if label in study.boxes]
    answer = f"{', '.join(names) or 'none'}."
    question = questions["classification"][0]
    return Asked(f"{study.index}-list", "classification", question, answer)


def ask_boxes(study, label, rng, questions):
    boxes = [tuple(round(v, 2) for v in box) for box in study.boxes.get(label, ())]
    return Asked(
        f"{study.index}-{label}",
        "grounding",
        pick(rng, questions["abnormality"][:4]).format(QUESTION_NAMES[label]),
        boxes=boxes,
        label=label,
        kind="abnormality",
        thinking=looking_for(study, label),
    )


def looking_for(study, label):
    """A one-line trace for a grounding question."""
    where = "It is not there"
    for f in study.findings:
        if f.label == label:
            side = {"": "", "both": " on both sides"}.get(f.side, f" on the {f.side}")
            where = f"It is there{side}"
    return f"Looking for {QUESTION_NAMES[label]}. {where}."


def pick(rng, items):
    return items[int(rng.random() * len(items))]


# ------------------------------------------------------------------------------- anatomy, polygons


def sample_anatomy(rng):
    """The size of the image, and the geometry in the thorax frame."""
    w, h, angle, scale, x, y, lung, height, dome, higher, curve, heart, middle, rib = rng.random(
        14
    ).tolist()
    width, lung, dome = 112 + int(33 * w), 0.365 + 0.04 * lung, 0.25 + 0.05 * dome
    return SimpleNamespace(
        size=(width, min(max(int(width * (0.92 + 0.2 * h)), 112), 144)),
        angle=math.radians(6 * angle - 3),
        scale=0.94 + 0.1 * scale,
        x=0.48 + 0.04 * x,
        y=0.48 + 0.04 * y,
        lung=lung,  # half width of the chest
        height=0.40 + 0.04 * height,  # from the origin to the apex
        dome={-1: dome, 1: dome + 0.01 + 0.025 * higher},  # of the diaphragm, by side
        curve=1.2 + 0.6 * curve,
        heart=lung * (0.40 + 0.07 * heart),
        middle=0.05 + 0.012 * middle,  # half width of the mediastinum
        rib=0.085 + 0.015 * rib,  # distance of two ribs
    )


def to_image(points, an):
    """Thorax frame -> fractions of the image, (N, 2) -> (N, 2)."""
    cos, sin = an.scale * math.cos(an.angle), an.scale * math.sin(an.angle)
    return np.asarray(points) @ ((cos, sin), (-sin, cos)) + (an.x, an.y)


def loop(u1, v1, u2, v2):
    """Polygon along one curve and back along another."""
    return np.stack([np.concatenate([u1, u2[::-1]]), np.concatenate([v1, v2[::-1]])], 1)


def ellipse(u, v, ru, rv, tilt=0.0):
    turn = np.linspace(0, 2 * np.pi, 24)
    return np.stack([u + ru * np.cos(turn), v + rv * np.sin(turn) + tilt * np.cos(turn)], 1)


def stroke(path, width):
    """Polyline -> one quad per segment."""
    path = np.asarray(path)
    step = np.diff(path, axis=0)
    side = step[:, ::-1] * (-1, 1) * (width / 2 / np.hypot(*step.T))[:, None]
    a, b = path[:-1], path[1:]
    return list(np.stack([a - side, b - side, b + side, a + side], 1))


def floor_at(distance, sign, an):
    """Height of the diaphragm at a distance from the midline."""
    return an.dome[sign] + an.curve * (distance - 0.16) ** 2


def wall_at(height, an):
    """Distance of the chest wall from the midline at a height."""
    rounding = np.sqrt(np.maximum(1 - (np.minimum(height, 0) / an.height) ** 2, 0))
    return 0.05 + (an.lung - 0.05) * rounding


def rim(sign, top, bottom, thick, an):
    """Polygon between the chest wall and a parallel of it."""
    v = np.linspace(max(top, -an.height), bottom, 20)
    wall = wall_at(v, an)
    inner = np.maximum(wall - thick * (wall - 0.05) / (an.lung - 0.05), an.middle)
    inner_v = np.where(v < 0, v * (1 - 1.2 * thick / an.height), v)
    return loop(sign * wall, v, sign * inner, inner_v)


def heart_shape(half, an):
    center = 0.055 + 0.3 * (half - 0.16)
    shape = ellipse(center, an.dome[-1] - 0.06, half, 0.78 * half, 0.2 * half)
    return [np.minimum(shape, (1, an.dome[1] + 0.03))]


# ------------------------------------------------------------------------------- findings


def sample_findings(rng, an):
    """What is there, where, and how it looks. A place that is taken or hidden is not used again."""
    point = rng.random()
    picture = next(chances for cumulative, chances in PICTURES if point < cumulative)
    labels = {label for label, chance in picture.items() if rng.random() < chance}
    free = [(side, zone) for side in ("right", "left") for zone in ZONES]
    if "Cardiomegaly" in labels:
        # A large heart hides the left lung but for its upper lobe.
        free = [(s, z) for s, z in free if s == "right" or z == "upper lobe"]
    # Height down to which the lung bases are visible, by side.
    bases = {-1: 0.17, 1: 0.17}
    found = []
    for label in WORDINGS:
        in_zone = label in LUNGS[2:]
        if label not in labels or (in_zone and not free):
            continue
        severity = int(rng.random() * 3)
        if in_zone:
            side, zone = free.pop(int(rng.random() * len(free)))
        else:
            side, zone = pick(rng, SIDES.get(label, ("",))), ""
        hidden = {
            "Pleural Effusion": ("lower lobe", "mid lung")[:severity],
            "Atelectasis": ("lower lobe",),
            "Pneumothorax": ("upper lobe",),
        }.get(label, ())
        free = [(s, z) for s, z in free if z not in hidden or side not in (s, "both")]

        sketch = Sketch(rng, an, side, zone, severity, bases, found)
        shapes = DRAWN[label](sketch)
        certain = label == "Support Devices" or rng.random() > (0.25, 0.12, 0.06)[severity]
        # The slighter, the easier to pass over.
        mentioned = rng.random() < (0.6, 0.8, 0.9)[severity]
        look = LOOKS[label] if label != "Edema" else (0.045, 0.70, (0.58, 0.68, 0.78)[severity])
        boxes = tuple(box_of(polygons, look[0], an) for polygons in shapes)
        found.append(
            Finding(
                label,
                side,
                zone,
                severity,
                sketch.what,
                certain,
                mentioned,
                boxes,
                tuple(shapes),
                look,
            )
        )
    return tuple(found)


def box_of(polygons, blur, an):
    points = to_image(np.concatenate(polygons), an)
    # How far a soft border is visible.
    pad = 0.004 + 0.75 * blur
    return tuple(np.clip([*points.min(0) - pad, *points.max(0) + pad], 0, 1).tolist())


class Sketch:
    """Where one finding goes. Its drawing function returns a list of polygons for each box."""

    def __init__(self, rng, an, side, zone, severity, bases, found):
        self.rng, self.an, self.severity = rng, an, severity
        self.bases, self.found, self.what = bases, found, ""
        self.signs = {"left": (1,), "both": (-1, 1)}.get(side, (-1,))
        self.sign = self.signs[0]
        self.height = ZONES.get(zone, 0) + rng.uniform(-0.02, 0.02)
        self.distance = rng.uniform(0.17, 0.23) + 0.06 * (zone == "lower lobe")


def cardiomegaly(s):
    return [heart_shape(s.an.lung * (0.56, 0.61, 0.66)[s.severity], s.an)]


def wide_mediastinum(s):
    half = np.array((0.8, 1, 1, 0.95, 0.85, 0.7)) * s.rng.uniform(0.12, 0.15)
    rows = np.linspace(-0.36, 0.06, 6)
    return [[loop(half, rows, -half, rows)]]


def effusion(s):
    """It raises the visible lung base."""
    lung = s.an.lung
    large_heart = any(f.label == "Cardiomegaly" for f in s.found)
    shapes = []
    for sign in s.signs:
        hides = large_heart and sign > 0
        inner = 0.06 if sign < 0 else 0.21 if large_heart else 0.12
        d = np.linspace(inner, lung, 30)
        floor = floor_at(d, sign, s.an)
        # To show above a heart that hides the base.
        behind = 0.05 * hides
        rise = (0.16, 0.24, 0.35)[s.severity]
        top = floor_at(lung, sign, s.an) - rise - behind + s.rng.uniform(-0.02, 0.02)
        # The meniscus climbs the wall.
        surface = top + 0.11 * (1 - np.exp((d - lung) / 0.08))
        shown = surface < floor - 0.015
        d, surface, floor = d[shown], surface[shown], floor[shown]
        shapes.append([loop(sign * d, surface, sign * d, floor + 0.01)])
        s.bases[sign] = top - 0.03
    return shapes


def pneumothorax(s):
    bottom = (0.04, 0.11, 0.18)[s.severity]
    thick = (0.085, 0.11, 0.14)[s.severity]
    return [[rim(s.sign, -0.5, bottom, thick, s.an)]]


def atelectasis(s):
    lung, shapes = s.an.lung, []
    for sign in s.signs:
        v = s.bases[sign] - s.rng.uniform(0, 0.03)
        tilt = s.rng.uniform(-0.03, 0.05)
        inner = 0.13 if sign < 0 else 0.20
        shape = stroke(((sign * inner, v + tilt), (sign * (lung - 0.03), v)), 0.034)
        if s.severity:
            start = sign * (inner + 0.03), v + tilt - 0.06
            shape += stroke((start, (sign * (lung - 0.07), v - 0.05)), 0.026)
        shapes.append(shape)
    return shapes


def edema(s):
    return [[ellipse(sign * 0.17, -0.02, 0.12, 0.20)] for sign in s.signs]


def consolidation(s):
    v = s.height
    d = np.array((0.07, wall_at(v - 0.09, s.an) - 0.01))
    edge = v + s.rng.uniform(-0.2, 0.2) * (d - 0.2)
    top = edge - s.rng.uniform(0.07, 0.10)
    bottom = edge + s.rng.uniform(0.07, 0.09)
    return [[loop(s.sign * d, top, s.sign * d, bottom)]]


def pneumonia(s):
    low, high = (-0.08, -0.08, 0.028, 0.028), (0.08, 0.08, 0.042, 0.042)
    spots = s.rng.uniform(low, high, (10, 4)).tolist()
    u = s.sign * s.distance
    return [[ellipse(u + x, s.height + y, *radii) for x, y, *radii in spots]]


def opacity(s):
    radii = s.rng.uniform(0.09, 0.11, 2)
    return [[ellipse(s.sign * s.distance, s.height, *radii)]]


def lesion(s):
    radius = (0.052, 0.062, 0.08)[s.severity]
    d, v = s.distance, s.height
    s.what, spots = "a mass" if s.severity == 2 else "a nodule", ((d, v),)
    if s.severity == 0 and s.rng.random() < 0.5:
        s.what, spots = "nodules", ((d - 0.05, v - 0.05), (d + 0.05, v + 0.05))
    return [[ellipse(s.sign * x, y, radius, radius * s.rng.uniform(0.9, 1.1))] for x, y in spots]


def pleural_other(s):
    s.what = pick(s.rng, tuple(PLEURA))
    return [[rim(s.sign, *PLEURA[s.what], 0.06, s.an)]]


def fracture(s):
    """Two ends of a rib, out of line."""
    v, d = s.rng.uniform(-0.22, 0.05), s.an.lung - 0.09
    shapes = []
    heights = (v, v + 0.11) if s.severity == 2 else (v,)
    for v in heights:
        inner = (s.sign * (d - 0.06), v - 0.015), (s.sign * (d - 0.006), v)
        outer = (s.sign * (d + 0.006), v + 0.035), (s.sign * (d + 0.055), v + 0.055)
        shapes.append(stroke(inner, 0.034) + stroke(outer, 0.034))
    return shapes


def device(s):
    air = [1 if f.side == "left" else -1 for f in s.found if f.label == "Pneumothorax"]
    sign = 1
    if air:
        s.what, sign = "a chest tube", air[0]
    else:
        s.what = pick(s.rng, tuple(TUBES)[:4])
    pacemaker = s.what == "a pacemaker"
    if pacemaker:
        sign = pick(s.rng, (-1, 1))
    shape = stroke([(sign * u, v) for u, v in TUBES[s.what]], 0.024)
    if pacemaker:
        shape += stroke(((sign * 0.26, -0.25), (sign * 0.34, -0.25)), 0.085)
    return [shape]


DRAWN = {
    "Cardiomegaly": cardiomegaly,
    "Enlarged Cardiomediastinum": wide_mediastinum,
    "Pleural Effusion": effusion,
    "Pneumothorax": pneumothorax,
    "Atelectasis": atelectasis,
    "Edema": edema,
    "Consolidation": consolidation,
    "Pneumonia": pneumonia,
    "Lung Opacity": opacity,
    "Lung Lesion": lesion,
    "Pleural Other": pleural_other,
    "Fracture": fracture,
    "Support Devices": device,
}
PLAIN = (0, 0.70, 1.0)
LOOKS = dict.fromkeys(DRAWN, PLAIN) | {  # blur, density, opacity
    "Pneumothorax": (0, 0.06, 1.0),
    "Consolidation": (0.006, 0.70, 0.92),
    "Pneumonia": (0.011, 0.70, 0.9),
    "Lung Opacity": (0.035, 0.70, 0.75),
    "Lung Lesion": (0, 0.78, 1.0),
    "Pleural Other": (0, 0.94, 1.0),
    "Fracture": (0, 0.95, 1.0),
    "Support Devices": (0, 0.97, 1.0),
}


# ------------------------------------------------------------------------------- pixels


def draw(phantom, without=None):
    """Pixels as a PIL "L" image, optionally without one finding (same anatomy, same noise)."""
    an, (w, h) = phantom.anatomy, phantom.size
    rng = np.random.default_rng([phantom.seed, phantom.index, 2])

    def findings(density, *regions, within=1):
        for f in phantom.findings:
            if f.label == without or WORDINGS[f.label][0] not in regions:
                continue
            blur, value, opacity = f.look
            for polygons in f.shapes:
                cover = coverage(polygons, an, blur) * (opacity * within)
                density = density + (value - density) * cover
        return density

    # Every pixel in the thorax frame: distance from the midline, and height.
    cos, sin = math.cos(an.angle) / an.scale, math.sin(an.angle) / an.scale
    x = (np.arange(w, dtype=np.float32) + 0.5) / w - an.x
    y = ((np.arange(h, dtype=np.float32) + 0.5) / h - an.y)[:, None]
    distance, height = np.abs(x * cos + y * sin), y * cos - x * sin

    # Lungs with vessels from the hilum, over soft tissue of uneven density.
    low = Image.fromarray(rng.standard_normal((h // 5, w // 5), dtype=np.float32))
    low = np.asarray(low.resize((w, h), Image.Resampling.BILINEAR)) * np.float32(0.03)
    belly, lungs = belly_and_lungs(an)
    density = 0.60 + low + (-0.33 + 0.10 * coverage(vessels(rng), an)) * lungs
    density = findings(density, "lungs", "pleura", within=lungs)
    ribs = np.cos((height + 0.9 * distance * distance - 0.55 * distance) * (2 * math.pi / an.rib))
    density += 0.08 * np.maximum(ribs - 0.1, 0) * lungs

    # Heart and mediastinum, then the belly.
    half = an.middle * np.array((0.9, 0.9, 1, 1.25, 1.1, 1.4, 1.7))
    rows = (-0.5, -0.3, -0.24, -0.18, -0.10, 0, 0.3)
    middle = [loop(half, rows, -half, rows), *heart_shape(an.heart, an)]
    density += (0.68 - density) * coverage(middle, an)
    density = findings(density, "heart", "mediastinum")
    density += (0.74 + low - density) * belly

    # Clavicles over everything soft; the trachea dark and the spine bright on the midline.
    clavicles = []
    for s in (-1, 1):
        clavicles += stroke(((s * 0.04, -0.31), (s * 0.2, -0.35), (s * 0.38, -0.39)), 0.024)
    density += 0.08 * coverage(clavicles, an)
    trachea = np.where(height < -0.13, np.float32(-0.06), np.float32(0.04))
    density += np.where(distance < 0.016, trachea, np.float32(0.04) * (distance < 0.03))
    density = findings(density, "bones", "devices")

    # Air around, then the film.
    body = 0.20 + 0.34 * np.clip((height + 0.44) / 0.1, 0, 1)
    density *= np.clip((body - distance) / 0.03, 0, 1)
    return develop(density, rng)


def coverage(polygons, an, blur=0):
    """Coverage of the pixels, 0 to 1: drawn at twice the size for smooth borders."""
    w, h = an.size
    canvas = Image.new("L", (2 * w, 2 * h))
    pen = ImageDraw.Draw(canvas)
    points = to_image(np.concatenate(polygons), an) * (2 * w, 2 * h)
    for part in np.split(points, np.cumsum([len(p) for p in polygons[:-1]])):
        pen.polygon(part.ravel().tolist(), fill=255)
    canvas = canvas.reduce(2)
    if blur:
        canvas = canvas.filter(ImageFilter.GaussianBlur(blur * w))
    return np.asarray(canvas, dtype=np.float32) / 255


def belly_and_lungs(an):
    d, rows = np.linspace(0, 0.5, 20), np.linspace(-an.height, 0.36, 30)
    below, chest = [], []
    for s in (-1, 1):
        below.append(loop(s * d, floor_at(d, s, an), s * d, d * 0 + 0.7))
        chest.append(loop(s * wall_at(rows, an), rows, np.full(30, s * 0.03), rows))
    belly = coverage(below, an)
    return belly, coverage(chest, an) * (1 - belly)


def vessels(rng):
    turn, reach, sign = (
        rng.uniform(-1.5, 1.5, 18),
        rng.uniform(0.12, 0.26, 18),
        np.repeat((-1, 1), 9),
    )
    u = sign * (0.07 + reach * np.cos(turn))
    # From the hilum and back.
    ends = np.stack([sign * 0.07, np.full(18, -0.02), u, 1.2 * reach * np.sin(turn)], 1)
    return stroke(ends.reshape(-1, 2), 0.009)


def develop(density, rng):
    """Exposure, contrast, blur and grain of a film."""
    low, high = (0.90, -0.02, 0.88, 2), (1.08, 0.02, 1.12, 4)
    gain, offset, gamma, grain = rng.uniform(low, high).astype(np.float32)
    film = Image.fromarray((255 * np.clip(density * gain + offset, 0, 1) ** gamma).astype(np.uint8))
    noise = rng.standard_normal(density.shape, dtype=np.float32)
    pixels = np.asarray(film.filter(ImageFilter.SMOOTH)) + grain * noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------- texts


def phrases_of(f):
    """The wordings of a finding, filled in."""
    plural = f.side == "both" or len(f.boxes) > 1
    wording = WORDINGS[f.label][1].format(
        what=f.what,
        a="" if plural else "a ",
        s="s" if plural else "",
        side="bilateral" if f.side == "both" else f.side,
        zone=f.zone,
        size=SIZES[f.severity],
        degree=DEGREES[f.severity],
    )
    return wording.split("|")


def write_texts(rng, findings):
    """(report, thinking, states) of a reader who mentions most findings and denies some others."""
    # The usual words for a normal study.
    stock = not findings and rng.random() < 0.3

    def choose(items):
        return items[0] if stock else pick(rng, items)

    states = [0] * len(LABELS)
    said = {region: [] for region in ORDERS[0].split()}
    for f in findings:
        if f.mentioned:
            states[LABELS.index(f.label)] = 1 if f.certain else 3
            said[WORDINGS[f.label][0]].append(affirm(f, choose))

    drawn, denied = {f.label for f in findings}, set()
    for chance, region, labels, denies, phrases in NORMALS:
        open_ = drawn.isdisjoint(labels) and denied.isdisjoint(labels)
        if open_ and (0.5 if stock else rng.random()) < chance:
            phrase = choose(phrases.split("|"))
            sentence = phrase if phrase.endswith(".") else choose(DENIED).format(phrase)
            said[region].append(sentence)
            denied.update(labels if denies else ())
    for label in denied:
        states[LABELS.index(label)] = 2
    states[0] = int(not {1, 3} & set(states[1:13]))

    sentences = [sentence for region in choose(ORDERS).split() for sentence in said[region]]
    # Two readers in five close with an impression.
    if rng.random() < 0.4 or not sentences:
        sentences.append(impression(findings))
    report = " ".join(s[0].upper() + s[1:] for s in sentences)
    return report, systematic_reading(findings), tuple(states)


def affirm(f, choose):
    """A sentence that says or hedges a finding."""
    phrase = choose(phrases_of(f)) if f.certain else phrases_of(f)[0]
    if phrase.endswith("."):
        return phrase
    plural = phrase.endswith(("effusions", "fractures")) or phrase.startswith("nodules")
    form = choose(CERTAIN if f.certain else HEDGED)
    bare = ARTICLE.sub("", phrase)
    return form.format(phrase=phrase, bare=bare, be="are" if plural else "is")


def impression(findings):
    mentioned = [f for f in findings if f.mentioned]
    mentioned.sort(key=lambda f: LABELS.index(f.label))
    names = [("" if f.certain else "possible ") + QUESTION_NAMES[f.label] for f in mentioned]
    return f"impression: {', '.join(names) or SUMMARY}."


def systematic_reading(findings):
    """A trace: region by region, what the report mentions."""

    def read_region(region, default, side=""):
        seen = []
        for f in findings:
            here = WORDINGS[f.label][0] == region and f.side in (side or f.side, "both")
            if f.mentioned and here:
                bare = ARTICLE.sub("", phrases_of(f)[0])
                seen.append(bare if f.certain else f"possible {bare}")
        return ", ".join(seen) or default

    parts = {
        "Heart": read_region("heart", "normal size"),
        "Mediastinum": read_region("mediastinum", "normal"),
        "Right lung": read_region("lungs", "clear", "right"),
        "Left lung": read_region("lungs", "clear", "left"),
        "Pleura": read_region("pleura", "normal"),
        "Bones": read_region("bones", "intact"),
        "Devices": read_region("devices", "none"),
    }
    return " ".join(f"{name}: {text}." for name, text in parts.items())
