"""Drawn chest X-rays: anatomy that varies, the 13 CheXpert findings with their boxes, and a report.

phantom(seed, index) is study `index` of an endless data set: texts and boxes at once, pixels on
first use of its `image`. A long tail of findings, half of all studies normal, some findings hedged
or not mentioned: what makes real reports hard to learn.

All shapes are drawn in the thorax frame. Its origin is in mid-chest and the side of the image is 1.
A point is a complex number, side_sign * distance + 1j * height: the distance from the midline, with
side_sign -1 on the patient's right and 1 on the left, and the height, which grows downwards. So
0.2 - 0.21j is in the left upper lobe, which is at the upper right of the image.

To add a finding, or to change one, write a function that yields the polygons of each box, and give
it a row in KINDS, a chance in PICTURES and, if normal reports deny it, a place in NORMALS. With
cavities, which are darker than a lung:

    def cavity(finding, side_sign, anatomy, rng):
        radius = (0.04, 0.05, 0.06)[finding.severity]
        yield [ellipse(finding.center, radius, radius)]

    "Lung Lesion": Kind("lungs", "zone", cavity, "a cavity in the {side} {zone}", 0.06),
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from readers.study import LABELS, Asked, Box, Study, pick

# ------------------------------------------------------------------------------- studies

# Indices of the splits: disjoint by construction.
SPLIT_START = {"train": 0, "val": 10_000_000, "test": 20_000_000}
CHOSEN_START = 5_000_000  # from the start of a split: studies that are chosen for their findings
# Studies with anything else are looked for among the chosen ones.
COMMON = {"Cardiomegaly", "Lung Opacity", "Atelectasis", "Pleural Effusion", "Support Devices"}
QUESTION_NAMES = {label: label.lower() for label in LABELS[1:]} | {
    "Enlarged Cardiomediastinum": "widened mediastinum",
    "Cardiomegaly": "enlarged heart",
    "Pleural Other": "pleural thickening",
    "Fracture": "rib fracture",
}
ON_SIDE = {"right": " on the right", "left": " on the left", "both": " on both sides", "": ""}


class Phantom:
    """One study, a pure function of seed and index.

    states: 14 ints in the order of LABELS, as the report says: 0 blank, 1 positive, 2 negative,
    3 uncertain. boxes: by label, of everything drawn, mentioned or not. size: width and height in
    pixels.
    """

    def __init__(self, seed: int, index: int):
        self.seed = seed
        self.index = index
        rng = np.random.default_rng([seed, index, 0])
        self.anatomy = sample_anatomy(rng)
        self.size = self.anatomy.size
        self.findings = sample_findings(rng, self.anatomy)
        self.boxes = {f.label: f.boxes for f in self.findings}

        # Texts have a stream of random numbers of their own: pixels do not depend on them.
        rng = np.random.default_rng([seed, index, 1])
        self.report, self.thinking, self.states = write_texts(rng, self.findings)

    @cached_property
    def image(self) -> Image.Image:
        """Mode "L", drawn on first use."""
        return draw(self)


# Study `index` of the data set `seed`. SFT and GRPO use the same ones, already drawn.
phantom = lru_cache(maxsize=1 << 15)(Phantom)


def read(seed: int, split: str, size: int, questions: dict) -> Iterator[Study]:
    """Two sets of `size` phantoms, as in the papers. questions: data.QUESTIONS.

    The first are studies as they come, with a report. The second are chosen because something is to
    be seen: they have the list of their findings and a question about each of them (now and then
    about one that is not there), in training a report, too.
    """
    start = SPLIT_START[split]
    for index in range(start, start + size):
        study = phantom(seed, index)
        yield as_study(study, [ask_report(study, questions)])

    indices = itertools.count(start + CHOSEN_START)
    candidates = (phantom(seed, index) for index in indices)
    for study in itertools.islice(filter(is_chosen, candidates), size):
        asked = [ask_list(study, questions)]
        # Held-out reports keep the natural prevalence.
        if split == "train":
            asked.append(ask_report(study, questions))
        yield as_study(study, asked + ask_findings(study, questions))


def is_chosen(study):
    """Everything rare, and a third of what else has findings."""
    rare = study.boxes.keys() - COMMON
    return rare or (study.boxes and study.index % 3 == 0)


def as_study(study, asked):
    index = str(study.index)
    return Study(index, index, [study], f"phantom {index}", asked=asked)


def ask_report(study, questions):
    question = questions["report"][0]
    return Asked(str(study.index), "report", question, study.report, thinking=study.thinking)


def ask_list(study, questions):
    names = [name for label, name in QUESTION_NAMES.items() if label in study.boxes]
    question = questions["classification"][0]
    answer = f"{', '.join(names) or 'none'}."
    return Asked(f"{study.index}-list", "classification", question, answer)


def ask_findings(study, questions):
    """A question about every finding, and for two studies in five about one that is absent."""
    rng = np.random.default_rng([study.seed, study.index, 7])
    labels = list(study.boxes)
    if rng.random() < 0.4:
        absent = [label for label in QUESTION_NAMES if label not in study.boxes]
        labels.append(str(rng.choice(absent)))
    return [ask_boxes(study, label, rng, questions) for label in labels]


def ask_boxes(study, label, rng, questions):
    """Where is it? The trace says on which side, if it has one."""
    where = "not there"
    for finding in study.findings:
        if finding.label == label:
            where = f"there{ON_SIDE[finding.side]}"

    boxes = np.round(study.boxes.get(label, ()), 2).tolist()
    name = QUESTION_NAMES[label]
    question = pick(rng, questions["abnormality"][:4])
    return Asked(
        f"{study.index}-{label}",
        "grounding",
        question.format(name),
        boxes=list(map(tuple, boxes)),
        label=label,
        kind="abnormality",
        thinking=f"Looking for {name}. It is {where}.",
    )


# ------------------------------------------------------------------------------- anatomy, polygons


def sample_anatomy(rng):
    """The size of the image, and the geometry in the thorax frame."""
    share = rng.random
    width = 112 + int(33 * share())
    height = int(width * (0.92 + 0.2 * share()))
    angle = math.radians(6 * share() - 3)

    anatomy = SimpleNamespace(size=(width, min(max(height, 112), 144)))
    anatomy.cos = math.cos(angle)
    anatomy.sin = math.sin(angle)
    anatomy.scale = 0.94 + 0.1 * share()
    anatomy.x = 0.48 + 0.04 * share()
    anatomy.y = 0.48 + 0.04 * share()
    anatomy.lung = 0.365 + 0.04 * share()  # half width of the chest
    anatomy.height = 0.40 + 0.04 * share()  # from the origin to the apex
    dome = 0.25 + 0.05 * share()
    anatomy.dome = {-1: dome, 1: dome + 0.01 + 0.025 * share()}  # of the diaphragm, by side_sign
    anatomy.curve = 1.2 + 0.6 * share()  # of the diaphragm
    anatomy.heart = 0.40 + 0.07 * share()  # its share of the half width of the chest
    anatomy.middle = 0.05 + 0.012 * share()  # half width of the mediastinum
    anatomy.rib = 0.085 + 0.015 * share()  # distance of two ribs

    # What a finding changes for those that are drawn later.
    anatomy.bases = {-1: 0.17, 1: 0.17}  # height down to which the lungs are visible
    anatomy.enlarged = False  # the heart
    anatomy.collapsed = 0  # side_sign of a collapsed lung
    return anatomy


def to_image(points, anatomy):
    """Thorax frame -> fractions of the image, complex (N,) -> (N, 2)."""
    cos = anatomy.scale * anatomy.cos
    sin = anatomy.scale * anatomy.sin
    matrix = (cos, sin), (-sin, cos)
    turned = points.view(float).reshape(-1, 2) @ matrix
    origin = anatomy.x, anatomy.y
    return turned + origin


def polyline(text):
    """Points, "0.30-0.24j 0.16-0.30j ..." -> (N,)."""
    return np.array(text.split(), complex)


def loop(there, back):
    """Polygon along one curve and back along another."""
    return np.append(there, back[::-1])


def strip(distance, top, bottom, side_sign):
    """Polygon between two heights at each distance from the midline."""
    u = side_sign * distance
    return loop(u + 1j * top, u + 1j * bottom)


def ellipse(center, width, tall, tilt=0.0):
    turn = np.linspace(0, 2 * np.pi, 24)
    cos, sin = np.cos(turn), np.sin(turn)
    return center + width * cos + 1j * tall * sin + 1j * tilt * cos


def stroke(path, width, side_sign=1):
    """Polyline -> one quad per segment. side_sign -1 mirrors it."""
    path = mirrored(np.array(path), side_sign)
    start, end = path[:-1], path[1:]
    step = end - start
    # 1j turns it by a right angle.
    across = 1j * step * (width / 2 / np.hypot(step.real, step.imag))
    corners = start - across, end - across, end + across, start + across
    return list(np.stack(corners, 1))


def mirrored(points, side_sign=-1):
    return side_sign * points.real + 1j * points.imag


def floor_at(distance, side_sign, anatomy):
    """Height of the diaphragm at a distance from the midline."""
    return anatomy.dome[side_sign] + anatomy.curve * (distance - 0.16) ** 2


def wall_at(height, anatomy):
    """Distance of the chest wall from the midline at a height. The upper half is round."""
    above = np.minimum(height, 0) / anatomy.height
    return 0.05 + (anatomy.lung - 0.05) * np.sqrt(1 - above**2)


def rim(top, bottom, thick, side_sign, anatomy):
    """Polygon between the chest wall and a parallel of it."""
    height = np.linspace(max(top, -anatomy.height), bottom, 20)
    wall = wall_at(height, anatomy)
    inner = wall - thick * (wall - 0.05) / (anatomy.lung - 0.05)
    inner = np.maximum(inner, anatomy.middle)
    # Below the apex.
    inner_height = np.maximum(height, height * (1 - 1.2 * thick / anatomy.height))
    shape = loop(wall + 1j * height, inner + 1j * inner_height)
    return mirrored(shape, side_sign)


def heart_shape(share, anatomy):
    """share: of the half width of the chest."""
    half = anatomy.lung * share
    distance = 0.055 + 0.3 * (half - 0.16)
    height = anatomy.dome[-1] - 0.06
    shape = ellipse(distance + 1j * height, half, 0.78 * half, 0.2 * half)
    # It lies on the diaphragm.
    shape.imag = np.minimum(shape.imag, anatomy.dome[1] + 0.03)
    return shape


# ------------------------------------------------------------------------------- findings

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
ZONES = {"upper lobe": -0.21, "mid lung": -0.03, "lower lobe": 0.13}  # heights of their centres


@dataclass
class Finding:
    label: str
    kind: "Kind"
    side: str  # of the patient: "left", "right", "both" or ""
    zone: str  # a key of ZONES, or ""
    severity: int  # 0, 1, 2
    hides: tuple  # zones where no other finding can be seen
    shapes: list  # one per box: polygons in the thorax frame
    center: complex = 0  # of its zone, on the side that is drawn
    what: str = ""  # its noun phrase, where the label alone does not tell
    certain: bool = True
    mentioned: bool = True
    boxes: list[Box] = ()

    @property
    def each_side(self):
        """Both sides, or the one that it has: "" is drawn once."""
        return ("right", "left") if self.side == "both" else (self.side,)


def sample_findings(rng, anatomy):
    """What is there, where, and how it looks. A place that is taken or hidden is not used again."""
    point = rng.random()
    picture = next(chances for cumulative, chances in PICTURES.items() if point < cumulative)
    labels = {label for label, chance in picture.items() if rng.random() < chance}
    free = list(itertools.product(("right", "left"), ZONES))
    if "Cardiomegaly" in labels:
        # A large heart hides the left lung but for its upper lobe.
        free = free[:-2]

    findings = []
    for label, kind in KINDS.items():
        places = free
        if kind.sides != "zone":
            places = [(side, "") for side in kind.sides.split("|")]
        if label in labels and places:
            finding = sample_finding(label, places, rng, anatomy)
            findings.append(finding)
            hidden = set(itertools.product(finding.each_side, finding.hides))
            free = [place for place in free if place not in hidden]
    return findings


def sample_finding(label, places, rng, anatomy):
    """A finding of this label in one of the places, (side, zone) each."""
    kind = KINDS[label]
    severity = pick(rng, range(3))
    side, zone = pick(rng, places)
    height = ZONES.get(zone, 0) + rng.uniform(-0.02, 0.02)
    distance = rng.uniform(0.17, 0.23) + 0.06 * (zone == "lower lobe")
    finding = Finding(label, kind, side, zone, severity, (zone,), [])
    for one in finding.each_side:
        side_sign = 1 if one == "left" else -1
        finding.center = side_sign * distance + 1j * height
        finding.shapes += kind.draw(finding, side_sign, anatomy, rng)
    finding.boxes = [box_of(shape, kind.blur, anatomy) for shape in finding.shapes]

    # The slighter, the less certain and the easier to pass over.
    if label != "Support Devices":
        finding.certain = rng.random() > (0.25, 0.12, 0.06)[severity]
    finding.mentioned = rng.random() < (0.6, 0.8, 0.9)[severity]
    return finding


def box_of(polygons, blur, anatomy):
    points = to_image(np.concatenate(polygons), anatomy)
    # How far a soft border is visible.
    pad = 0.004 + 0.75 * blur
    corners = points.min(0) - pad, points.max(0) + pad
    return tuple(np.clip(corners, 0, 1).ravel().tolist())


def cardiomegaly(finding, side_sign, anatomy, rng):
    anatomy.enlarged = True
    share = (0.56, 0.61, 0.66)[finding.severity]
    yield [heart_shape(share, anatomy)]


def wide_mediastinum(finding, side_sign, anatomy, rng):
    outline = np.array((0.8, 1, 1, 0.95, 0.85, 0.7))
    half = rng.uniform(0.12, 0.15) * outline
    edge = half + 1j * np.linspace(-0.36, 0.06, 6)
    yield [loop(edge, mirrored(edge))]


def effusion(finding, side_sign, anatomy, rng):
    """It raises the visible lung base."""
    finding.hides = ("lower lobe", "mid lung")[: finding.severity]
    inner = 0.06 if side_sign < 0 else 0.12
    behind = 0
    if side_sign > 0 and anatomy.enlarged:
        # To show beside and above a heart that hides the base.
        inner = 0.21
        behind = 0.05
    distance = np.linspace(inner, anatomy.lung, 30)
    floor = floor_at(distance, side_sign, anatomy)
    rise = (0.16, 0.24, 0.35)[finding.severity]
    lowest = floor_at(anatomy.lung, side_sign, anatomy)
    top = lowest - rise - behind + rng.uniform(-0.02, 0.02)
    anatomy.bases[side_sign] = top - 0.03

    # The meniscus climbs the wall.
    climb = 1 - np.exp((distance - anatomy.lung) / 0.08)
    surface = top + 0.11 * climb
    shown = surface < floor - 0.015
    yield [strip(distance[shown], surface[shown], floor[shown] + 0.01, side_sign)]


def pneumothorax(finding, side_sign, anatomy, rng):
    anatomy.collapsed = side_sign
    finding.hides = ("upper lobe",)
    bottom = (0.04, 0.11, 0.18)[finding.severity]
    thick = (0.085, 0.11, 0.14)[finding.severity]
    yield [rim(-0.5, bottom, thick, side_sign, anatomy)]


def atelectasis(finding, side_sign, anatomy, rng):
    """One band above the lung base, or two."""
    finding.hides = ("lower lobe",)
    height = anatomy.bases[side_sign] - rng.uniform(0, 0.03)
    inner_height = height + rng.uniform(-0.03, 0.05)
    inner = 0.13 if side_sign < 0 else 0.20
    start = inner + 1j * inner_height
    end = anatomy.lung + 1j * height
    bands = stroke((start, end - 0.03), 0.034, side_sign)
    if finding.severity:
        path = start + (0.03 - 0.06j), end - (0.07 + 0.05j)
        bands += stroke(path, 0.026, side_sign)
    yield bands


def edema(finding, side_sign, anatomy, rng):
    yield [ellipse(side_sign * 0.17 - 0.02j, 0.12, 0.20)]


def consolidation(finding, side_sign, anatomy, rng):
    """It reaches from the hilum to the wall."""
    height = finding.center.imag
    distance = np.array((0.07, wall_at(height - 0.09, anatomy) - 0.01))
    edge = height + rng.uniform(-0.2, 0.2) * (distance - 0.2)
    top = edge - rng.uniform(0.07, 0.10)
    bottom = edge + rng.uniform(0.07, 0.09)
    yield [strip(distance, top, bottom, side_sign)]


def pneumonia(finding, side_sign, anatomy, rng):
    # Ten spots: offsets from the centre of the zone, and radii.
    least = (-0.08, -0.08, 0.028, 0.028)
    most = (0.08, 0.08, 0.042, 0.042)
    spots = rng.uniform(least, most, (10, 4))
    yield [ellipse(finding.center + complex(x, y), *radii) for x, y, *radii in spots]


def opacity(finding, side_sign, anatomy, rng):
    radii = rng.uniform(0.09, 0.11, 2)
    yield [ellipse(finding.center, *radii)]


def lesion(finding, side_sign, anatomy, rng):
    """One nodule, two small ones, or a mass."""
    shifts = (0,)
    finding.what = "a mass" if finding.severity == 2 else "a nodule"
    if finding.severity == 0 and rng.random() < 0.5:
        shifts = (-0.05, 0.05)
        finding.what = "nodules"
    radius = (0.052, 0.062, 0.08)[finding.severity]
    for shift in shifts:
        center = finding.center + shift * (side_sign + 1j)
        yield [ellipse(center, radius, radius * rng.uniform(0.9, 1.1))]


PLEURA = {
    "apical pleural thickening": (-0.5, -0.27),
    "lateral pleural thickening": (-0.16, 0.14),
    "pleural plaque": (-0.02, 0.12),
}


def pleural_other(finding, side_sign, anatomy, rng):
    finding.what = pick(rng, tuple(PLEURA))
    yield [rim(*PLEURA[finding.what], 0.06, side_sign, anatomy)]


RIB_ENDS = polyline("-0.06-0.015j -0.006+0j 0.006+0.035j 0.055+0.055j")


def fracture(finding, side_sign, anatomy, rng):
    """The ends of a broken rib are out of line. A severe fracture breaks two."""
    place = anatomy.lung - 0.09 + 1j * rng.uniform(-0.22, 0.05)
    shifts = (0, 0.11j) if finding.severity == 2 else (0,)
    for shift in shifts:
        ends = RIB_ENDS + (place + shift)
        inner = stroke(ends[:2], 0.034, side_sign)
        yield inner + stroke(ends[2:], 0.034, side_sign)


PACEMAKER = polyline("0.26-0.25j 0.34-0.25j")
TUBES = {
    "a pacemaker": polyline("0.30-0.24j 0.16-0.30j 0.01-0.20j -0.03+0.05j 0.08+0.17j"),
    "an endotracheal tube": polyline("0-0.5j 0.005-0.35j 0-0.13j"),
    "a central venous catheter": polyline("-0.22-0.40j -0.12-0.36j -0.065-0.28j -0.05+0j"),
    "an enteric tube": polyline("0-0.5j 0.01-0.2j 0.015+0.2j 0.06+0.32j 0.13+0.36j"),
    "a chest tube": polyline("0.46+0.16j 0.33+0.08j 0.27-0.08j 0.24-0.27j"),
}


def device(finding, _, anatomy, rng):
    """A chest tube lies on the side of a pneumothorax, a pacemaker on either."""
    side_sign = anatomy.collapsed
    finding.what = "a chest tube"
    if not anatomy.collapsed:
        side_sign = 1
        finding.what = pick(rng, tuple(TUBES)[:4])
    battery = []
    if finding.what == "a pacemaker":
        side_sign = pick(rng, (-1, 1))
        battery = stroke(PACEMAKER, 0.085, side_sign)
    yield battery + stroke(TUBES[finding.what], 0.024, side_sign)


@dataclass(frozen=True)
class Kind:
    """What all findings of a label have in common."""

    region: str
    sides: str  # of the patient that it may be on, or "zone": it takes a free zone of a lung
    draw: Callable
    wordings: str  # noun phrases or whole sentences, which end in a full stop
    density: float = 0.70
    blur: float = 0
    opacity: float = 1
    worse: float = 0  # added to the opacity for each degree of severity


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
        opacity=0.58,
        worse=0.10,
    ),
    "Consolidation": Kind(
        "lungs",
        "zone",
        consolidation,
        "consolidation in the {side} {zone}|dense {side} {zone} consolidation",
        blur=0.006,
        opacity=0.92,
    ),
    "Pneumonia": Kind(
        "lungs",
        "zone",
        pneumonia,
        "patchy {side} {zone} pneumonia|findings are consistent with {side} {zone} pneumonia.",
        blur=0.011,
        opacity=0.9,
    ),
    "Lung Opacity": Kind(
        "lungs",
        "zone",
        opacity,
        "a hazy opacity in the {side} {zone}|a hazy {side} {zone} opacity",
        blur=0.035,
        opacity=0.75,
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

CLAVICLE = polyline("0.04-0.31j 0.2-0.35j 0.38-0.39j")
MEDIASTINUM = polyline("0.9-0.5j 0.9-0.3j 1-0.24j 1.25-0.18j 1.1-0.10j 1.4+0j 1.7+0.3j")


def draw(phantom: Phantom, without: str | None = None) -> Image.Image:
    """Pixels as a PIL "L" image, optionally without one finding (same anatomy, same noise)."""
    anatomy = phantom.anatomy
    rng = np.random.default_rng([phantom.seed, phantom.index, 2])
    findings = [f for f in phantom.findings if f.label != without]
    distance, height = thorax_grid(anatomy)

    # Lungs with vessels from the hilum, over soft tissue of uneven density.
    uneven = soft_tissue(rng, anatomy.size)
    belly, lungs = belly_and_lungs(anatomy)
    air = -0.33 + 0.10 * coverage(vessels(rng), anatomy)
    density = 0.60 + uneven + air * lungs
    add_findings(density, findings, ("lungs", "pleura"), anatomy, lungs)
    arcs = height + 0.9 * distance * distance - 0.55 * distance
    ribs = np.cos(arcs * (2 * math.pi / anatomy.rib))
    density += 0.08 * np.maximum(ribs - 0.1, 0) * lungs

    # Heart and mediastinum, then the belly.
    edge = anatomy.middle * MEDIASTINUM.real + 1j * MEDIASTINUM.imag
    middle = [loop(edge, mirrored(edge)), heart_shape(anatomy.heart, anatomy)]
    blend(density, 0.68, coverage(middle, anatomy))
    add_findings(density, findings, ("heart", "mediastinum"), anatomy)
    blend(density, 0.74 + uneven, belly)

    # Clavicles over everything soft; the trachea dark and the spine bright on the midline.
    clavicles = stroke(CLAVICLE, 0.024) + stroke(CLAVICLE, 0.024, -1)
    density += 0.08 * coverage(clavicles, anatomy)
    midline = np.float32(0.04) * (distance < 0.03)
    midline[(distance < 0.016) & (height < -0.13)] = -0.06
    density += midline
    add_findings(density, findings, ("bones", "devices"), anatomy)

    # Air around, then the film.
    body = 0.20 + 0.34 * np.clip((height + 0.44) / 0.1, 0, 1)
    density *= np.clip((body - distance) / 0.03, 0, 1)
    return develop(density, rng)


def thorax_grid(anatomy):
    """Distance from the midline, and height, of every pixel."""
    width, height = anatomy.size
    y, x = np.indices((height, width), dtype=np.float32) + 0.5
    x = x / width - anatomy.x
    y = y / height - anatomy.y
    cos = anatomy.cos / anatomy.scale
    sin = anatomy.sin / anatomy.scale
    distance = np.abs(x * cos + y * sin)
    return distance, y * cos - x * sin


def soft_tissue(rng, size):
    """Slow changes of density: coarse noise, interpolated."""
    width, height = size
    coarse = height // 5, width // 5
    noise = rng.standard_normal(coarse, dtype=np.float32)
    smooth = Image.fromarray(noise).resize(size, Image.BILINEAR)
    return np.float32(smooth) * 0.03


def blend(density, value, cover):
    """In place: `value` where cover is 1."""
    density += (value - density) * cover


def add_findings(density, findings, regions, anatomy, within=1):
    for finding in findings:
        kind = finding.kind
        if kind.region in regions:
            opacity = (kind.opacity + kind.worse * finding.severity) * within
            for polygons in finding.shapes:
                cover = coverage(polygons, anatomy, kind.blur)
                blend(density, kind.density, cover * opacity)


def coverage(polygons, anatomy, blur=0):
    """Coverage of the pixels, 0 to 1: drawn at twice the size for smooth borders."""
    width, height = anatomy.size
    canvas = Image.new("L", (2 * width, 2 * height))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        corners = to_image(polygon, anatomy) * canvas.size
        pen.polygon(corners.ravel().tolist(), fill=255)
    border = ImageFilter.GaussianBlur(blur * width)
    return np.float32(canvas.reduce(2).filter(border)) / 255


def belly_and_lungs(anatomy):
    """Their coverage of the pixels."""
    distance = np.linspace(0, 0.5, 20)
    rows = np.linspace(-anatomy.height, 0.36, 30)
    lung = loop(wall_at(rows, anatomy) + 1j * rows, 0.03 + 1j * rows)
    below = []
    for side_sign in (-1, 1):
        floor = floor_at(distance, side_sign, anatomy)
        below.append(strip(distance, floor, 0.7, side_sign))
    belly = coverage(below, anatomy)
    lungs = coverage([mirrored(lung), lung], anatomy)
    return belly, lungs * (1 - belly)


def vessels(rng):
    """From the hilum outwards and back."""
    turn = rng.uniform(-1.5, 1.5, 18)
    reach = rng.uniform(0.12, 0.26, 18)
    path = np.full(36, 0.07 - 0.02j)
    distance = 0.07 + reach * np.cos(turn)
    path[1::2] = distance + 1.2j * reach * np.sin(turn)
    path[:18] = mirrored(path[:18])
    return stroke(path, 0.009)


def develop(density, rng):
    """Exposure, contrast, blur and grain of a film."""
    least = (0.90, -0.02, 0.88, 2)
    most = (1.08, 0.02, 1.12, 4)
    gain, offset, gamma, grain = np.float32(rng.uniform(least, most))
    exposed = np.clip(density * gain + offset, 0, 1) ** gamma
    film = Image.fromarray(np.uint8(255 * exposed))
    film = film.filter(ImageFilter.SMOOTH)
    noise = rng.standard_normal(density.shape, dtype=np.float32)
    pixels = np.clip(film + grain * noise, 0, 255)
    return Image.fromarray(np.uint8(pixels))


# ------------------------------------------------------------------------------- texts

CERTAIN = ("there {be} {phrase}.", "{phrase} {be} present.", "{phrase} {be} seen.")
HEDGED = ("possible {bare}.", "there may be {phrase}.")
DENIED = ("no {}.", "there is no {}.", "no evidence of {}.")
# (probability, labels, are they denied, wordings), used when all of the labels are absent and none
# is denied yet. The sentence stands in the region of the first label.
NORMALS = (
    (
        0.20,
        "Cardiomegaly|Enlarged Cardiomediastinum",
        True,
        "the cardiomediastinal silhouette is normal.",
    ),
    (0.90, "Cardiomegaly", True, "heart size is normal.|the heart is normal in size."),
    (
        0.75,
        "Enlarged Cardiomediastinum",
        True,
        "the mediastinal contours are normal.|mediastinal contours are unremarkable.",
    ),
    (
        0.90,
        "Atelectasis|Edema|Consolidation|Pneumonia|Lung Opacity|Lung Lesion",
        False,
        "the lungs are clear.|lungs are clear bilaterally.|both lungs are clear.",
    ),
    (0.30, "Edema|Cardiomegaly", False, "pulmonary vascularity is normal."),
    (
        0.25,
        "Pleural Effusion|Pneumothorax|Consolidation",
        True,
        "focal consolidation, pleural effusion, or pneumothorax",
    ),
    (0.80, "Pleural Effusion|Pneumothorax", True, "pleural effusion or pneumothorax"),
    (0.35, "Consolidation", True, "focal consolidation"),
    (0.10, "Pneumonia", True, "pneumonia"),
    (0.15, "Edema", True, "pulmonary edema"),
    (0.70, "Pneumothorax", True, "pneumothorax"),
    (0.60, "Pleural Effusion", True, "pleural effusion"),
    (0.10, "Fracture", True, "rib fracture"),
    (0.55, "Fracture", False, "the bones are intact.|osseous structures are unremarkable."),
)
ORDERS = ("heart mediastinum lungs pleura bones devices",) * 8 + (
    "lungs pleura heart mediastinum bones devices",
    "devices heart mediastinum lungs pleura bones",
)
SIZES = ("small", "moderate", "large")
DEGREES = ("mild", "moderate", "severe")
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


def write_texts(rng, findings):
    """(report, thinking, states) of a reader who mentions most findings and denies some others."""
    # The usual words for a normal study.
    stock = not findings and rng.random() < 0.3

    def choose(items):
        return items[0] if stock else pick(rng, items)

    mentioned = [f for f in findings if f.mentioned]
    states = dict.fromkeys(LABELS, 0)
    said = defaultdict(list)
    for finding in mentioned:
        states[finding.label] = 1 if finding.certain else 3
        said[finding.kind.region].append(affirm(finding, rng))
    states["No Finding"] = int(said.keys() <= {"devices"})

    settled = {f.label for f in findings}
    for chance, labels, denies, phrases in NORMALS:
        labels = labels.split("|")
        if not settled.isdisjoint(labels):
            continue
        luck = 0.5 if stock else rng.random()
        if luck < chance:
            phrase = choose(phrases.split("|"))
            sentence = phrase if phrase.endswith(".") else choose(DENIED).format(phrase)
            said[KINDS[labels[0]].region].append(sentence)
            if denies:
                settled.update(labels)
                states |= dict.fromkeys(labels, 2)

    sentences = []
    for region in choose(ORDERS).split():
        sentences += said[region]
    # Two readers in five close with an impression.
    if rng.random() < 0.4 or not sentences:
        sentences.append(impression(mentioned))
    report = " ".join(sentence.capitalize() for sentence in sentences)
    return report, systematic_reading(mentioned), tuple(states.values())


def phrases_of(finding):
    """The wordings of a finding, filled in."""
    a, s = ("a ", "") if len(finding.boxes) == 1 else ("", "s")
    size = SIZES[finding.severity]
    degree = DEGREES[finding.severity]
    text = finding.kind.wordings.format(**vars(finding), a=a, s=s, size=size, degree=degree)
    return text.replace("both", "bilateral").split("|")


def without_article(phrase):
    return phrase.removeprefix("a ").removeprefix("an ")


def affirm(finding, rng):
    """A sentence that says or hedges a finding."""
    phrases = phrases_of(finding)
    if not finding.certain:
        phrase = phrases[0]
        return pick(rng, HEDGED).format(phrase=phrase, bare=without_article(phrase))
    phrase = pick(rng, phrases)
    if phrase.endswith("."):
        return phrase
    be = "are" if re.search("nodules|effusions|fractures", phrase) else "is"
    return pick(rng, CERTAIN).format(phrase=phrase, be=be)


def impression(mentioned):
    certain = {f.label: f.certain for f in mentioned}
    names = []
    for label, name in QUESTION_NAMES.items():
        if label in certain:
            names.append(name if certain[label] else f"possible {name}")
    return f"impression: {', '.join(names) or 'no acute cardiopulmonary abnormality'}."


def systematic_reading(mentioned):
    """A trace: region by region, what the report mentions."""
    seen = defaultdict(list)
    for finding in mentioned:
        titles = [finding.kind.region.title()]
        if titles == ["Lungs"]:
            titles = [f"{side.title()} lung" for side in finding.each_side]
        bare = without_article(phrases_of(finding)[0])
        for title in titles:
            seen[title].append(bare if finding.certain else f"possible {bare}")
    lines = [f"{title}: {', '.join(seen[title]) or none}." for title, none in READING.items()]
    return " ".join(lines)
