"""What a reader makes of a dataset: studies with their reports, labels and boxes.

A reader is a function read(source, split, skip) that yields Study objects. It calls skip(message)
for what cannot be used, which stops the run or counts it (data.on_error).
"""

import csv
import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from runtime.config import InputError

LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")

# What PIL raises for an image that it cannot read, or not without danger.
UNREADABLE_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

Box = tuple[float, ...]  # x1, y1, x2, y2 in fractions of the original image
Skip = Callable[[str], None]


def parse_boxes(text):
    """Every well-formed "[x1, y1, x2, y2]" of finite numbers in the text, in reading order."""
    boxes = [tuple(map(float, numbers)) for numbers in BOX.findall(text)]
    return [box for box in boxes if all(map(math.isfinite, box))]


def pick(rng, items):
    return items[int(rng.random() * len(items))]


@dataclass
class Asked:
    """A question that the dataset itself asks about a study, with its answer."""

    id: str
    task: str  # "report" | "grounding" | "classification"
    question: str = ""  # "": the usual words for its kind
    answer: str | None = None  # None: the boxes as text
    boxes: Sequence[Box] = ()
    label: str = ""
    kind: str = ""
    thinking: str = ""
    history: tuple = ()  # earlier (question, answer) of the same conversation


@dataclass
class Study:
    """One study as a dataset has it."""

    id: str
    patient: str  # with a name space for every population of patients
    images: list  # paths, or phantoms
    where: str  # for messages: file and place in it
    report: str | None = None  # None: the dataset has none; "": it lacks here
    findings: list[str] | None = None  # all that is to be seen; None: not known
    # (kind, name) -> boxes. Kinds: abnormality, anatomy, phrase.
    boxes: dict[tuple[str, str], list[Box]] = field(default_factory=dict)
    complete: bool = False  # all abnormalities have their boxes: detection can be asked
    asked: list[Asked] = field(default_factory=list)


# ------------------------------------------------------------------------------- files


def locate(root, *names):
    """The first of these paths below root that exists, as it is or with .gz.

    Of several that match a pattern, the one that sorts last.
    """
    for name in names:
        for pattern in (name, f"{name}.gz"):
            found = sorted(root.glob(pattern))
            if found:
                return found[-1]
    raise InputError(f"{root}: expected {' or '.join(names)} there")


def first_file(root, folders, *names):
    """root/FOLDER/NAME for the first name and folder that are there; else the first of all."""
    paths = [root / folder / name for name in names for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_lines(path):
    """The lines of a text file. JSON may hold other line separators as text."""
    try:
        return path.read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot read ({reason})") from None


def read_csv(path, columns, skip):
    """The rows of a CSV file, or CSV.gz, as dicts.

    A missing column is an error, a row with too few or too many cells is skipped.
    """
    csv.field_size_limit(1 << 24)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            for column in columns:
                if column not in names:
                    found = ", ".join(names or ["none"])
                    raise InputError(f"{path}: no column {column!r}; it has {found}")
            for row in reader:
                if None in row or None in row.values():
                    skip(f"{path}, line {reader.line_num}: expected {len(names)} cells")
                else:
                    yield row
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid CSV file ({error})") from None


def image_size(path):
    """Width and height from the file's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE_IMAGE as error:
        reason = getattr(error, "strerror", None) or "not a readable image"
        raise InputError(f"{path}: {reason}") from None


# ------------------------------------------------------------------------------- splits, boxes


def hash_split(ids, val=0.1, test=0.2):
    """id -> split by a hash of the id, for what is published without a split.

    val and test are shares, with at least one id each if they are not 0. Give patients where they
    are known.
    """
    ranked = sorted(set(ids), key=lambda i: hashlib.sha1(f"0:{i}".encode()).hexdigest())
    names = []
    for name, share in (("val", val), ("test", test)):
        if share:
            names += [name] * max(1, round(share * len(ranked)))
    names += ["train"] * len(ranked)
    return dict(zip(ranked, names))


def of_split(studies, split):
    """The studies of a split, by patients, for what is published without one."""
    splits = hash_split(study.patient for study in studies)
    return [study for study in studies if splits[study.patient] == split]


def normalize_box(box, width, height):
    """A box in pixels -> fractions of the image. Rounding may have put it a pixel outside."""
    fractions = []
    for value, size in zip(box, (width, height) * 2):
        fraction = float(value) / float(size)
        if -0.01 < fraction < 1.01:
            fraction = min(max(fraction, 0.0), 1.0)
        fractions.append(fraction)
    return tuple(fractions)


def corners(x, y, width, height):
    """(x, y, width, height) -> (x1, y1, x2, y2)"""
    x, y, width, height = map(float, (x, y, width, height))
    return x, y, x + width, y + height


def patient_of(path, root):
    """The patient of an image, by the names of MIMIC-CXR's folders or NIH's files.

    Else the image counts as a patient.
    """
    mimic = re.search(r"(?:^|/)p(\d{8})/", str(path))
    if mimic:
        return f"mimic/{mimic[1]}"
    nih = re.search(r"(?:^|/)(\d{8})_\d{3}\.png$", str(path))
    return f"nih/{nih[1]}" if nih else f"{root}/{path}"
