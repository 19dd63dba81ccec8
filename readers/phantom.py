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
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from readers.study import LABELS, Asked, Box, Study, pick

# Indices of the splits: disjoint by construction.
SPLIT_START = {"train": 0, "val": 10_000_000, "test": 20_000_000}
CHOSEN_START = 5_000_000  # from the start of a split: studies that are chosen for their findings

# ------------------------------------------------------------------------------- tables

# Studies with anything else are looked for among the chosen ones.
COMMON = {"Cardiomegaly", "Lung Opacity", "Atelectasis", "Pleural Effusion", "Support Devices"}
# Half of the studies are normal; the others draw one clinical picture, so that findings co-occur:
# {cumulative probability: P(label)}.
PICTURES = {
    0.100: {
        "Cardiomegaly": 0.85,
        "Edema": 0.50,
        "Pleural Effusion": 0.50,
        "Support Devices": 0.25,
        "Atelectasis": 0.15,
    },
    0.185: {
        "Pneumonia": 0.55,
        "Consolidation": 0.40,
        "Lung Opacity": 0.50,
        "Pleural Effusion": 0.20,
        "Atelectasis": 0.06,
    },
    0.260: {
        "Atelectasis": 0.90,
        "Pleural Effusion": 0.30,
        "Support Devices": 0.25,
        "Lung Opacity": 0.12,
    },
    0.300: {
        "Fracture": 0.55,
        "Pneumothorax": 0.50,
        "Pleural Effusion": 0.15,
        "Support Devices": 0.30,
    },
    0.345: {
        "Lung Lesion": 0.95,
        "Enlarged Cardiomediastinum": 0.12,
        "Lung Opacity": 0.10,
        "Pleural Effusion": 0.08,
    },
    0.400: {"Cardiomegaly": 0.85, "Enlarged Cardiomediastinum": 0.15, "Support Devices": 0.15},
    0.435: {
        "Enlarged Cardiomediastinum": 0.65,
        "Support Devices": 0.30,
        "Edema": 0.12,
        "Pneumothorax": 0.06,
    },
    0.490: {"Pleural Other": 0.50, "Lung Opacity": 0.60, "Lung Lesion": 0.05},
    1.00: {"Support Devices": 0.06},
}
CERTAIN = ("there {be} {phrase}.", "{phrase} {be} present.", "{phrase} {be} seen.")
HEDGED = ("possible {bare}.", "there may be {phrase}.")
DENIED = ("no {}.", "there is no {}.", "no evidence of {}.")
# (probability, region, labels, are they denied, wordings), used when all of the labels are absent
# and none is denied yet.
NORMALS = (
    (
        0.20,
        "heart",
        "Cardiomegaly|Enlarged Cardiomediastinum",
        True,
        "the cardiomediastinal silhouette is normal.",
    ),
    (0.90, "heart", "Cardiomegaly", True, "heart size is normal.|the heart is normal in size."),
    (
        0.75,
        "mediastinum",
        "Enlarged Cardiomediastinum",
        True,
        "the mediastinal contours are normal.|mediastinal contours are unremarkable.",
    ),
    (
        0.90,
        "lungs",
        "Atelectasis|Edema|Consolidation|Pneumonia|Lung Opacity|Lung Lesion",
        False,
        "the lungs are clear.|lungs are clear bilaterally.|both lungs are clear.",
    ),
    (0.30, "lungs", "Edema|Cardiomegaly", False, "pulmonary vascularity is normal."),
    (
        0.25,
        "pleura",
        "Consolidation|Pleural Effusion|Pneumothorax",
        True,
        "focal consolidation, pleural effusion, or pneumothorax",
    ),
    (0.80, "pleura", "Pleural Effusion|Pneumothorax", True, "pleural effusion or pneumothorax"),
    (0.35, "lungs", "Consolidation", True, "focal consolidation"),
    (0.10, "lungs", "Pneumonia", True, "pneumonia"),
    (0.15, "lungs", "Edema", True, "pulmonary edema"),
    (0.70, "pleura", "Pneumothorax", True, "pneumothorax"),
    (0.60, "pleura", "Pleural Effusion", True, "pleural effusion"),
    (0.10, "bones", "Fracture", True, "rib fracture"),
    (
        0.55,
        "bones",
        "Fracture",
        False,
        "the bones are intact.|osseous structures are unremarkable.",
    ),
)
ARTICLE = re.compile("^an? ")
PLURAL = re.compile("effusions$|fractures$|^nodules")
ORDERS = ("heart mediastinum lungs pleura bones devices",) * 8 + (
    "lungs pleura heart mediastinum bones devices",
    "devices heart mediastinum lungs pleura bones",
)
SIZES, DEGREES = ("small", "moderate", "large"), ("mild", "moderate", "severe")
# Of the patient's side in the thorax frame. What has no side is drawn once.
SIGNS = {"right": (-1,), "left": (1,), "both": (-1, 1), "": (-1,)}
ZONES = {"upper lobe": -0.21, "mid lung": -0.03, "lower lobe": 0.13}  # heights of their centres
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
QUESTION_NAMES = {label: label.lower() for label in LABELS[1:]} | {
    "Enlarged Cardiomediastinum": "widened mediastinum",
    "Cardiomegaly": "enlarged heart",
    "Pleural Other": "pleural thickening",
    "Fracture": "rib fracture",
}
# How a trace reads the regions, and what it says where nothing is mentioned.
READING = {
    "Heart": "normal size",
    "Mediastinum": "normal",
    "Right lung": "clear",
    "Left lung": "clear",
    "Pleura": "normal",
    "Bones": "intact",
    "Devices": "none",
}
LUNGS = {"right": ["Right lung"], "left": ["Left lung"], "both": ["Right lung", "Left lung"]}
CLAVICLE = (0.04, -0.31), (0.2, -0.35), (0.38, -0.39)
# The four ends of a broken rib, out of line.
RIB_ENDS = (-0.06, -0.015), (-0.006, 0), (0.006, 0.035), (0.055, 0.055)

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
    chosen = (s for s in chosen if s.boxes.keys() - COMMON or (s.boxes and s.index % 3 == 0))
    for study in itertools.islice(chosen, size):
        asked = [ask_list(study, questions)]
        # Held-out reports keep the natural prevalence.
        if split == "train":
            asked.append(ask_report(study, questions))
        rng = np.random.default_rng([seed, study.index, 7])
        labels = list(study.boxes)
        if rng.random() < 0.4:
            absent = [label for label in QUESTION_NAMES if label not in study.boxes]
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
    names = [name for label, name in QUESTION_NAMES.items() if label in study.boxes]
    answer = f"{', '.join(names) or 'none'}."
    question = questions["classification"][0]
    return Asked(f"{study.index}-list", "classification", question, answer)


def ask_boxes(study, label, rng, questions):
    boxes = []
    for box in study.boxes.get(label, ()):
        boxes.append(tuple(round(v, 2) for v in box))
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


# ------------------------------------------------------------------------------- anatomy, polygons


def sample_anatomy(rng):
    """The size of the image, and the geometry in the thorax frame."""
    shape = rng.random(14).tolist()
    w, h, angle, scale, x, y, lung, height, dome, higher, curve, heart, middle, rib = shape
    width, dome = 112 + int(33 * w), 0.25 + 0.05 * dome
    return SimpleNamespace(
        size=(width, min(max(int(width * (0.92 + 0.2 * h)), 112), 144)),
        angle=math.radians(6 * angle - 3),
        scale=0.94 + 0.1 * scale,
        x=0.48 + 0.04 * x,
        y=0.48 + 0.04 * y,
        lung=0.365 + 0.04 * lung,  # half width of the chest
        height=0.40 + 0.04 * height,  # from the origin to the apex
        dome={-1: dome, 1: dome + 0.01 + 0.025 * higher},  # of the diaphragm, by side
        curve=1.2 + 0.6 * curve,
        heart=0.40 + 0.07 * heart,  # its share of the half width of the chest
        middle=0.05 + 0.012 * middle,  # half width of the mediastinum
        rib=0.085 + 0.015 * rib,  # distance of two ribs
        bases={-1: 0.17, 1: 0.17},  # height down to which the lungs are visible, by side
    )


def to_image(points, an):
    """Thorax frame -> fractions of the image, (N, 2) -> (N, 2)."""
    cos, sin = an.scale * math.cos(an.angle), an.scale * math.sin(an.angle)
    return np.asarray(points) @ ((cos, sin), (-sin, cos)) + (an.x, an.y)


def loop(u1, v1, u2, v2):
    """Polygon along one curve and back along another."""
    there, back = np.stack([u1, v1], 1), np.stack([u2, v2], 1)
    return np.concatenate([there, back[::-1]])


def ellipse(u, v, ru, rv, tilt=0.0):
    turn = np.linspace(0, 2 * np.pi, 24)
    return np.stack([u + ru * np.cos(turn), v + rv * np.sin(turn) + tilt * np.cos(turn)], 1)


def stroke(path, width, sign=1):
    """Polyline -> one quad per segment. sign -1 mirrors it."""
    path = np.asarray(path) * (sign, 1)
    a, b = path[:-1], path[1:]
    step = b - a
    side = step[:, ::-1] * (-1, 1) * (width / 2 / np.hypot(*step.T))[:, None]
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


def heart_shape(share, an):
    half = an.lung * share
    center = 0.055 + 0.3 * (half - 0.16)
    shape = ellipse(center, an.dome[-1] - 0.06, half, 0.78 * half, 0.2 * half)
    return [np.minimum(shape, (1, an.dome[1] + 0.03))]


# ------------------------------------------------------------------------------- findings


def sample_findings(rng, an):
    """What is there, where, and how it looks. A place that is taken or hidden is not used again."""
    point = rng.random()
    picture = next(chances for cumulative, chances in PICTURES.items() if point < cumulative)
    labels = {label for label, chance in picture.items() if rng.random() < chance}
    free = list(itertools.product(("right", "left"), ZONES))
    if "Cardiomegaly" in labels:
        # A large heart hides the left lung but for its upper lobe.
        free = free[:-2]
    found = {}
    for label, kind in KINDS.items():
        places = free
        if kind.sides != "zone":
            places = [(side, "") for side in kind.sides.split("|")]
        if label not in labels or not places:
            continue
        severity = int(rng.random() * 3)
        side, zone = pick(rng, places)
        # What is in a zone takes it. Some findings hide zones.
        hidden = {
            "Pleural Effusion": ("lower lobe", "mid lung")[:severity],
            "Atelectasis": ("lower lobe",),
            "Pneumothorax": ("upper lobe",),
        }.get(label, (zone,))
        free = [(s, z) for s, z in free if z not in hidden or side not in (s, "both")]

        height = ZONES.get(zone, 0) + rng.uniform(-0.02, 0.02)
        distance = rng.uniform(0.17, 0.23) + 0.06 * (zone == "lower lobe")
        sketch = Sketch(rng, an, found, severity, height, distance)
        shapes = []
        for sign in SIGNS[side]:
            sketch.sign = sign
            shapes += kind.draw(sketch)
        boxes = tuple(box_of(polygons, kind.blur, an) for polygons in shapes)
        certain = label == "Support Devices" or rng.random() > (0.25, 0.12, 0.06)[severity]
        # The slighter, the easier to pass over.
        mentioned = rng.random() < (0.6, 0.8, 0.9)[severity]
        found[label] = Finding(
            label, side, zone, severity, sketch.what, certain, mentioned, boxes, tuple(shapes)
        )
    return tuple(found.values())


def box_of(polygons, blur, an):
    points = to_image(np.concatenate(polygons), an)
    # How far a soft border is visible.
    pad = 0.004 + 0.75 * blur
    return tuple(np.clip([*points.min(0) - pad, *points.max(0) + pad], 0, 1).tolist())


@dataclass
class Sketch:
    """Where one finding goes. Its drawing function returns a list of polygons for each box."""

    rng: np.random.Generator
    an: SimpleNamespace
    found: dict[str, Finding]  # by label: what is there already
    severity: int
    height: float  # of the centre of its zone
    distance: float  # of it from the midline
    sign: int = 0  # of the side that is drawn
    what: str = ""


def cardiomegaly(s):
    return [heart_shape((0.56, 0.61, 0.66)[s.severity], s.an)]


def wide_mediastinum(s):
    half = np.array((0.8, 1, 1, 0.95, 0.85, 0.7)) * s.rng.uniform(0.12, 0.15)
    rows = np.linspace(-0.36, 0.06, 6)
    return [[loop(half, rows, -half, rows)]]


def effusion(s):
    """It raises the visible lung base."""
    sign, an = s.sign, s.an
    inner, behind = 0.06 if sign < 0 else 0.12, 0
    if sign > 0 and "Cardiomegaly" in s.found:
        # To show beside and above a heart that hides the base.
        inner, behind = 0.21, 0.05
    d = np.linspace(inner, an.lung, 30)
    floor = floor_at(d, sign, an)
    rise = (0.16, 0.24, 0.35)[s.severity]
    top = floor_at(an.lung, sign, an) - rise - behind + s.rng.uniform(-0.02, 0.02)
    an.bases[sign] = top - 0.03
    # The meniscus climbs the wall.
    surface = top + 0.11 * (1 - np.exp((d - an.lung) / 0.08))
    shown = surface < floor - 0.015
    u = sign * d[shown]
    return [[loop(u, surface[shown], u, floor[shown] + 0.01)]]


def pneumothorax(s):
    bottom = (0.04, 0.11, 0.18)[s.severity]
    thick = (0.085, 0.11, 0.14)[s.severity]
    return [[rim(s.sign, -0.5, bottom, thick, s.an)]]


def atelectasis(s):
    v = s.an.bases[s.sign] - s.rng.uniform(0, 0.03)
    tilt = s.rng.uniform(-0.03, 0.05)
    inner, outer = 0.13 if s.sign < 0 else 0.20, s.an.lung
    shape = stroke(((inner, v + tilt), (outer - 0.03, v)), 0.034, s.sign)
    if s.severity:
        start, end = (inner + 0.03, v + tilt - 0.06), (outer - 0.07, v - 0.05)
        shape += stroke((start, end), 0.026, s.sign)
    return [shape]


def edema(s):
    return [[ellipse(s.sign * 0.17, -0.02, 0.12, 0.20)]]


def consolidation(s):
    d = np.array((0.07, wall_at(s.height - 0.09, s.an) - 0.01))
    edge = s.height + s.rng.uniform(-0.2, 0.2) * (d - 0.2)
    top = edge - s.rng.uniform(0.07, 0.10)
    bottom = edge + s.rng.uniform(0.07, 0.09)
    return [[loop(s.sign * d, top, s.sign * d, bottom)]]


def pneumonia(s):
    spots = s.rng.uniform((-0.08, -0.08, 0.028, 0.028), (0.08, 0.08, 0.042, 0.042), (10, 4))
    u = s.sign * s.distance
    return [[ellipse(u + x, s.height + y, *radii) for x, y, *radii in spots]]


def opacity(s):
    radii = s.rng.uniform(0.09, 0.11, 2)
    return [[ellipse(s.sign * s.distance, s.height, *radii)]]


def lesion(s):
    radius = (0.052, 0.062, 0.08)[s.severity]
    s.what, shifts = "a mass" if s.severity == 2 else "a nodule", (0,)
    if s.severity == 0 and s.rng.random() < 0.5:
        s.what, shifts = "nodules", (-0.05, 0.05)
    shapes = []
    for shift in shifts:
        radii = radius, radius * s.rng.uniform(0.9, 1.1)
        shapes.append([ellipse(s.sign * (s.distance + shift), s.height + shift, *radii)])
    return shapes


def pleural_other(s):
    s.what = pick(s.rng, tuple(PLEURA))
    return [[rim(s.sign, *PLEURA[s.what], 0.06, s.an)]]


def fracture(s):
    v, d = s.rng.uniform(-0.22, 0.05), s.an.lung - 0.09
    shapes = []
    for shift in (0, 0.11) if s.severity == 2 else (0,):
        ends = np.add(RIB_ENDS, (d, v + shift))
        shapes.append(stroke(ends[:2], 0.034, s.sign) + stroke(ends[2:], 0.034, s.sign))
    return shapes


def device(s):
    """A chest tube lies on the side of a pneumothorax, a pacemaker on either."""
    shape = []
    if "Pneumothorax" in s.found:
        s.what, (sign,) = "a chest tube", SIGNS[s.found["Pneumothorax"].side]
    else:
        s.what, sign = pick(s.rng, tuple(TUBES)[:4]), 1
    if s.what == "a pacemaker":
        sign = pick(s.rng, (-1, 1))
        shape = stroke(((0.26, -0.25), (0.34, -0.25)), 0.085, sign)
    return [shape + stroke(TUBES[s.what], 0.024, sign)]


@dataclass(frozen=True)
class Kind:
    """What all findings of a label have in common."""

    region: str
    sides: str  # of the patient that it may be on, or "zone": it takes a free zone of a lung
    draw: Callable
    wordings: str  # noun phrases or whole sentences, which end in a full stop
    density: float = 0.70
    blur: float = 0
    opacity: tuple = (1, 1, 1)  # by severity


# In order of placing.
KINDS = {
    "Cardiomegaly": Kind(
        "heart", "", cardiomegaly, "{degree} cardiomegaly|the heart is {degree}ly enlarged."
    ),
    "Enlarged Cardiomediastinum": Kind(
        "mediastinum",
        "",
        wide_mediastinum,
        "widening of the mediastinum|the mediastinum is widened.",
    ),
    "Pleural Effusion": Kind(
        "pleura", "right|left|both", effusion, "{a}{size} {side} pleural effusion{s}"
    ),
    "Pneumothorax": Kind(
        "pleura", "right|left", pneumothorax, "a {size} {side} pneumothorax", 0.06
    ),
    "Atelectasis": Kind(
        "lungs",
        "right|left|both",
        atelectasis,
        "linear {side} basilar atelectasis|atelectasis at the {side} lung base{s}",
    ),
    "Edema": Kind(
        "lungs",
        "both",
        edema,
        "{degree} pulmonary edema|findings are consistent with {degree} pulmonary edema.",
        blur=0.045,
        opacity=(0.58, 0.68, 0.78),
    ),
    "Consolidation": Kind(
        "lungs",
        "zone",
        consolidation,
        "consolidation in the {side} {zone}|dense {side} {zone} consolidation",
        blur=0.006,
        opacity=(0.92, 0.92, 0.92),
    ),
    "Pneumonia": Kind(
        "lungs",
        "zone",
        pneumonia,
        "patchy {side} {zone} pneumonia|findings are consistent with {side} {zone} pneumonia.",
        blur=0.011,
        opacity=(0.9, 0.9, 0.9),
    ),
    "Lung Opacity": Kind(
        "lungs",
        "zone",
        opacity,
        "a hazy opacity in the {side} {zone}|a hazy {side} {zone} opacity",
        blur=0.035,
        opacity=(0.75, 0.75, 0.75),
    ),
    "Lung Lesion": Kind("lungs", "zone", lesion, "{what} in the {side} {zone}", 0.78),
    "Pleural Other": Kind(
        "pleura", "right|left", pleural_other, "{side} {what}|{what} on the {side}", 0.94
    ),
    "Fracture": Kind(
        "bones",
        "right|left",
        fracture,
        "{a}displaced {side} rib fracture{s}|{a}{side} rib fracture{s}",
        0.95,
    ),
    "Support Devices": Kind("devices", "", device, "{what}|{what} is in place.", 0.97),
}

# ------------------------------------------------------------------------------- pixels


def draw(phantom, without=None):
    """Pixels as a PIL "L" image, optionally without one finding (same anatomy, same noise)."""
    an, (w, h) = phantom.anatomy, phantom.size
    rng = np.random.default_rng([phantom.seed, phantom.index, 2])

    def add_findings(*regions, within=1):
        for f in phantom.findings:
            kind = KINDS[f.label]
            if f.label == without or kind.region not in regions:
                continue
            for polygons in f.shapes:
                cover = coverage(polygons, an, kind.blur) * (kind.opacity[f.severity] * within)
                density[:] += (kind.density - density) * cover

    # Every pixel in the thorax frame: distance from the midline, and height.
    cos, sin = math.cos(an.angle) / an.scale, math.sin(an.angle) / an.scale
    y, x = np.indices((h, w), dtype=np.float32) + 0.5
    x, y = x / w - an.x, y / h - an.y
    distance, height = np.abs(x * cos + y * sin), y * cos - x * sin

    # Lungs with vessels from the hilum, over soft tissue of uneven density.
    low = Image.fromarray(rng.standard_normal((h // 5, w // 5), dtype=np.float32))
    low = np.asarray(low.resize((w, h), Image.Resampling.BILINEAR)) * 0.03
    belly, lungs = belly_and_lungs(an)
    density = 0.60 + low + (-0.33 + 0.10 * coverage(vessels(rng), an)) * lungs
    add_findings("lungs", "pleura", within=lungs)
    ribs = np.cos((height + 0.9 * distance * distance - 0.55 * distance) * (2 * math.pi / an.rib))
    density += 0.08 * np.maximum(ribs - 0.1, 0) * lungs

    # Heart and mediastinum, then the belly.
    half = an.middle * np.array((0.9, 0.9, 1, 1.25, 1.1, 1.4, 1.7))
    rows = (-0.5, -0.3, -0.24, -0.18, -0.10, 0, 0.3)
    middle = [loop(half, rows, -half, rows), *heart_shape(an.heart, an)]
    density += (0.68 - density) * coverage(middle, an)
    add_findings("heart", "mediastinum")
    density += (0.74 + low - density) * belly

    # Clavicles over everything soft; the trachea dark and the spine bright on the midline.
    clavicles = stroke(CLAVICLE, 0.024) + stroke(CLAVICLE, 0.024, -1)
    density += 0.08 * coverage(clavicles, an)
    midline = np.float32(0.04) * (distance < 0.03)
    midline[(distance < 0.016) & (height < -0.13)] = -0.06
    density += midline
    add_findings("bones", "devices")

    # Air around, then the film.
    body = 0.20 + 0.34 * np.clip((height + 0.44) / 0.1, 0, 1)
    density *= np.clip((body - distance) / 0.03, 0, 1)
    return develop(density, rng)


def coverage(polygons, an, blur=0):
    """Coverage of the pixels, 0 to 1: drawn at twice the size for smooth borders."""
    w, h = an.size
    canvas = Image.new("L", (2 * w, 2 * h))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        corners = to_image(polygon, an) * canvas.size
        pen.polygon(corners.ravel().tolist(), fill=255)
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
    turn, reach = rng.uniform(-1.5, 1.5, 18), rng.uniform(0.12, 0.26, 18)
    sign = np.repeat((-1, 1), 9)
    u = sign * (0.07 + reach * np.cos(turn))
    # From the hilum and back.
    ends = np.stack([sign * 0.07, np.full(18, -0.02), u, 1.2 * reach * np.sin(turn)], 1)
    return stroke(ends.reshape(-1, 2), 0.009)


def develop(density, rng):
    """Exposure, contrast, blur and grain of a film."""
    settings = rng.uniform((0.90, -0.02, 0.88, 2), (1.08, 0.02, 1.12, 4))
    gain, offset, gamma, grain = settings.astype(np.float32)
    film = Image.fromarray((255 * np.clip(density * gain + offset, 0, 1) ** gamma).astype(np.uint8))
    noise = rng.standard_normal(density.shape, dtype=np.float32)
    pixels = np.asarray(film.filter(ImageFilter.SMOOTH)) + grain * noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------- texts


def phrases_of(f):
    """The wordings of a finding, filled in."""
    article, ending = ("", "s") if len(f.boxes) > 1 else ("a ", "")
    size, degree = SIZES[f.severity], DEGREES[f.severity]
    wordings = KINDS[f.label].wordings
    text = wordings.format(**vars(f), a=article, s=ending, size=size, degree=degree)
    return text.replace("both", "bilateral").split("|")


def write_texts(rng, findings):
    """(report, thinking, states) of a reader who mentions most findings and denies some others."""
    # The usual words for a normal study.
    stock = not findings and rng.random() < 0.3

    def choose(items):
        return items[0] if stock else pick(rng, items)

    mentioned = [f for f in findings if f.mentioned]
    states = dict.fromkeys(LABELS, 0)
    states["No Finding"] = int({f.label for f in mentioned} <= {"Support Devices"})
    said = defaultdict(list)
    for f in mentioned:
        states[f.label] = 1 if f.certain else 3
        said[KINDS[f.label].region].append(affirm(f, choose))

    settled = {f.label for f in findings}
    for chance, region, labels, denies, phrases in NORMALS:
        labels = labels.split("|")
        if settled.isdisjoint(labels) and (0.5 if stock else rng.random()) < chance:
            phrase = choose(phrases.split("|"))
            sentence = phrase if phrase.endswith(".") else choose(DENIED).format(phrase)
            said[region].append(sentence)
            if denies:
                settled.update(labels)
                states |= dict.fromkeys(labels, 2)

    sentences = [sentence for region in choose(ORDERS).split() for sentence in said[region]]
    # Two readers in five close with an impression.
    if rng.random() < 0.4 or not sentences:
        sentences.append(impression(mentioned))
    report = " ".join(s[0].upper() + s[1:] for s in sentences)
    return report, systematic_reading(mentioned), tuple(states.values())


def affirm(f, choose):
    """A sentence that says or hedges a finding."""
    phrase = choose(phrases_of(f)) if f.certain else phrases_of(f)[0]
    if phrase.endswith("."):
        return phrase
    form = choose(CERTAIN if f.certain else HEDGED)
    be = "are" if PLURAL.search(phrase) else "is"
    return form.format(phrase=phrase, bare=ARTICLE.sub("", phrase), be=be)


def impression(mentioned):
    certain = {f.label: f.certain for f in mentioned}
    names = []
    for label, name in QUESTION_NAMES.items():
        if label in certain:
            names.append(name if certain[label] else f"possible {name}")
    return f"impression: {', '.join(names) or 'no acute cardiopulmonary abnormality'}."


def systematic_reading(mentioned):
    """A trace: region by region, what the report mentions."""
    seen = {title: [] for title in READING}
    for f in mentioned:
        region = KINDS[f.label].region
        titles = LUNGS[f.side] if region == "lungs" else [region.title()]
        bare = ARTICLE.sub("", phrases_of(f)[0])
        for title in titles:
            seen[title].append(bare if f.certain else f"possible {bare}")
    return " ".join(
        f"{title}: {', '.join(seen[title]) or none}." for title, none in READING.items()
    )
