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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.config import InputError, Source, reason_of
from runtime.output import warn_once

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
# Where a question of a conversation shows an image.
IMAGE = "<image>"
HALF_A_PAIR = re.compile(r"\\ud[89a-f]", re.IGNORECASE)
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")

# Frontal views, PA before AP, as columns and codes name them; then other views, then unknown ones.
RANKS = {"FRONTAL": 0, "PA": 0, "POSTERO-ANTERIOR": 0, "AP": 1, "ANTERO-POSTERIOR": 1}
NOT_FRONTAL = 2
UNKNOWN = 3

# What PIL raises for an image that it cannot read, or not without danger.
UNREADABLE_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# What is raised for a row that has other contents than expected.
MALFORMED = (LookupError, TypeError, ValueError, ZeroDivisionError)

Box = tuple[float, ...]  # x1, y1, x2, y2 in fractions of the original image
Skip = Callable[[str], None]


@dataclass
class Asked:
    """A question that the dataset itself asks about a study, with its answer."""

    id: str
    # "report" | "grounding" | "classification"
    task: str
    # "": the usual words for its kind.
    question: str = ""
    # None: the boxes as text.
    answer: str | None = None
    boxes: Sequence[Box] = ()
    label: str = ""
    kind: str = ""
    thinking: str = ""
    # Earlier (question, answer) of the same conversation.
    history: tuple = ()


@dataclass
class Study:
    """One study as a dataset has it."""

    id: str
    # With a name space for every population of patients.
    patient: str
    # Paths, or phantoms. Before choose_views: (view, path) pairs.
    images: list
    # For messages: file and place in it. Of several files, that of the boxes.
    where: str
    # None: the dataset has none; "": it lacks here.
    report: str | None = None
    # All that is to be seen, [] if nothing is; None: not known.
    findings: list[str] | None = None
    # (kind, name) -> boxes, at least one. Kinds: abnormality, anatomy, phrase. A study with boxes
    # has one image: where there are several, yield a study with the report and all images, and one
    # for each image with its boxes, under an id of its own.
    boxes: dict[tuple[str, str], list[Box]] = field(default_factory=dict)
    # All abnormalities have their boxes, not only some: detection can be asked.
    complete: bool = False
    asked: list[Asked] = field(default_factory=list)


Studies = Iterator[Study]


def parse_boxes(text: str) -> list[Box]:
    """Every well-formed "[x1, y1, x2, y2]" of finite numbers in the text, in reading order."""
    boxes = [tuple(map(float, numbers)) for numbers in BOX.findall(text)]
    return [box for box in boxes if all(map(math.isfinite, box))]


def pick(rng, items):
    return items[int(rng.random() * len(items))]


def box_text(box: Sequence) -> str:
    """The papers' box format, "[0.12, 0.30, 0.45, 0.61]"."""
    return "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]".format(*box)


# ------------------------------------------------------------------------------- files


def find(source: Source, *names: str) -> Path | None:
    """The first of these paths that is there, below data.path or else data.images, with .gz or not.

    Of several that match a pattern, the one that sorts last.
    """
    for name in names:
        for root in (Path(source.path), source.image_root()):
            found = sorted([*root.glob(name), *root.glob(f"{name}.gz")])
            if found:
                return found[-1]
    return None


def locate(source: Source, *names: str) -> Path:
    """The same, of which one has to be there. Raises InputError."""
    found = find(source, *names)
    if not found:
        places = dict.fromkeys((source.path, str(source.image_root())))
        raise InputError(f"{' or '.join(places)}: expected {' or '.join(names)} there")
    return found


def first_file(root: Path, folders: Sequence, *names: str | Path) -> Path:
    """root/FOLDER/NAME for the first name and folder that are there; else the first of all."""
    paths = [root / folder / name for name in names for folder in folders]
    return next(filter(Path.is_file, paths), paths[0])


def parse_json(text: str) -> Any:
    """The value of JSON. Raises ValueError: also for a character that no file can hold."""
    value = json.loads(text)
    # Half of a surrogate pair, such as "\\ud800".
    if HALF_A_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path) -> Any:
    try:
        return parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_list(path: Path, what: str) -> list:
    """A JSON file that holds a list."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of {what}")
    return rows


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. JSON may hold other line separators as text."""
    return read_text(path).rstrip().split("\n")


def read_text(path: Path) -> str:
    try:
        # With or without a byte order mark.
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read ({reason_of(error)})") from None


def read_csv(path: Path, skip: Skip, *columns: str) -> Iterator[dict]:
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
                    found = ", ".join(names) or "none"
                    raise InputError(f"{path}: no column {column!r}; it has {found}")
            for row in reader:
                if None in row or None in row.values():
                    skip(f"{path}, line {reader.line_num}: expected {len(names)} cells")
                else:
                    yield row
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid CSV file ({error})") from None


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height from the file's header. Raises InputError."""
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE_IMAGE as error:
        reason = getattr(error, "strerror", None) or "not a readable image"
        raise InputError(f"{path}: {reason}") from None


# ------------------------------------------------------------------------------- views, labels


def choose_views(studies: Iterable[Study], source: Source, where: str) -> Studies:
    """Studies, whose images are (view, path) pairs, with paths in the order of RANKS.

    With data.views=frontal, the first frontal one. Studies without one are left out, and their
    number is printed once.
    """
    without = unknown = 0
    try:
        for study in studies:
            ranked = sorted((view_rank(view), path) for view, path in study.images)
            if source.views == "frontal":
                unknown += sum(rank == UNKNOWN for rank, _ in ranked)
                ranked = [pair for pair in ranked if pair[0] < NOT_FRONTAL][:1]
            if ranked or source.views != "frontal":
                study.images = [path for _, path in ranked]
                yield study
            else:
                without += 1
    finally:
        # Also where no more studies are asked for, because of a limit.
        if without or unknown:
            warn_once(
                where,
                f"{where}: data.views=frontal leaves out studies without a known frontal image: "
                f"{without}; images of unknown view: {unknown}",
            )


def view_rank(view):
    name = str(view or "").strip().upper().replace("_", "-")
    return RANKS.get(name, UNKNOWN if name in ("", "UNKNOWN") else NOT_FRONTAL)


def findings_of(labels: Mapping, *values: Any) -> list[str] | None:
    """The observations that have one of these values; None if not even No Finding has one."""
    found = [label for label in LABELS if labels[label] in values]
    return [label for label in found if label != "No Finding"] if found else None


# ------------------------------------------------------------------------------- splits, boxes


def split_name(text: str) -> str:
    """Datasets say val, valid, validate or validation."""
    return "val" if text in ("valid", "validate", "validation") else text


def hash_split(ids: Iterable[str], test: float = 0.2) -> dict[str, str]:
    """id -> split by a hash of the id, for what is published without a split.

    A tenth is val; test is a share. Both have at least one id, if the share is not 0. Give patients
    where they are known.
    """
    ranked = sorted(set(ids), key=lambda i: hashlib.sha1(f"0:{i}".encode()).hexdigest())
    names = ["val"] * max(1, round(0.1 * len(ranked)))
    if test:
        names += ["test"] * max(1, round(test * len(ranked)))
    names += ["train"] * len(ranked)
    return dict(zip(ranked, names))


def split_json(source: Source, split: str) -> tuple[Path, bool]:
    """The JSON file of a split, and whether it is the only one, which has to be divided."""
    root = Path(source.path)
    files = [*root.glob("*.json"), *root.glob("annotations/*.json")]
    if len(files) == 1:
        return files[0], True
    names = []
    for name in (f"{split}.json", f"instances_{split}*.json", f"*{split}*.json"):
        names += [name, f"annotations/{name}"]
    return locate(source, *names), False


def of_split(studies: Sequence[Study], split: str) -> list[Study]:
    """The studies of a split, by patients, for what is published without one."""
    splits = hash_split(study.patient for study in studies)
    return [study for study in studies if splits[study.patient] == split]


def normalize_box(box: Sequence, width, height) -> Box:
    """Four numbers in pixels -> fractions of the image; nan for what is no number."""
    fractions = []
    for k, size in enumerate((width, height) * 2):
        try:
            fractions.append(float(box[k]) / float(size))
        except MALFORMED:
            fractions.append(math.nan)
    return tuple(fractions)


def corners(x: float, y: float, width: float, height: float) -> Box:
    """(x, y, width, height) -> (x1, y1, x2, y2)"""
    return x, y, x + width, y + height


def has_area(box: Sequence) -> bool:
    """Is it x1 < x2, y1 < y2?"""
    return len(box) == 4 and box[0] < box[2] and box[1] < box[3]


def clean_boxes(boxes: Iterable[Sequence], where: str, skip: Skip) -> list[Box]:
    """Those of the boxes that are in the image, clipped to it.

    Each change is counted, unless rounding put a box just outside.
    """
    kept = []
    for box in boxes:
        clipped = tuple(min(max(value, 0), 1) for value in box)
        if not has_area(clipped):
            fate = "left out"
        else:
            kept.append(clipped)
            fate = "clipped" if min(box) < -0.01 or max(box) > 1.01 else ""
        if fate:
            skip(
                f"{where}: box {list(box)} is not x1 < x2, y1 < y2 inside the image (fractions "
                f"from 0 to 1); it is {fate}"
            )
    return kept


def patient_of(path: str | Path, root: str, name: str = "") -> str:
    """The patient of an image, by the names of MIMIC-CXR's and CheXpert's folders or NIH's files.

    Else the patient of this name in the data at `root`, or the image itself.
    """
    chexpert = re.search(r"(?:^|/)(patient\d{5})/", str(path))
    if chexpert:
        return f"chexpert/{chexpert[1]}"
    mimic = re.search(r"(?:^|/)p(1\d{7})/", str(path))
    if mimic:
        return f"mimic/{mimic[1]}"
    nih = re.search(r"(?:^|/)(000\d{5})_\d{3}\.png$", str(path))
    return f"nih/{nih[1]}" if nih else f"{Path(root)}/{name or path}"
