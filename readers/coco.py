"""Boxes in COCO's format: SPLIT.json, instances_SPLIT*.json or *SPLIT*.json.

One file alone is divided by patients. Images without an annotation count as normal.
"""

import re
from pathlib import Path

from readers.study import (
    MALFORMED,
    Skip,
    Studies,
    Study,
    corners,
    first_file,
    normalize_box,
    of_split,
    patient_of,
    read_json,
    split_json,
)
from runtime.config import InputError, Source


def read(source: Source, split: str, skip: Skip) -> Studies:
    path, alone = split_json(source, split)
    tree = read_json(path)
    try:
        studies = read_studies(tree, path, source, split)
    except MALFORMED as error:
        raise InputError(
            f"{path}: not in COCO's format, images with id, file_name, width, height and "
            f"annotations with image_id, category_id, bbox ({error!r})"
        ) from None
    for study in of_split(studies, split) if alone else studies:
        study.findings = sorted({name for _, name in study.boxes})
        yield study


def read_studies(tree, path, source, split):
    """A study for each image of a file."""
    part = path.stem.removeprefix("instances_")
    folders = ("", "images", part, f"images/{part}", split, f"images/{split}")
    names = {category["id"]: readable(category["name"]) for category in tree["categories"]}
    studies = {}
    sizes = {}
    for row in tree["images"]:
        name, image = row["file_name"], row["id"]
        sizes[image] = row["width"], row["height"]
        file = first_file(source.image_root(), folders, name, Path(name).name)
        where = f"{path}, image {image}"
        patient = patient_of(name, source.path)
        studies[image] = Study(str(name), patient, [file], where, complete=True)

    for row in tree["annotations"]:
        image, numbers = row["image_id"], row["bbox"]
        key = "abnormality", names[row["category_id"]]
        box = corners(*normalize_box(numbers, *sizes[image]))
        studies[image].boxes.setdefault(key, []).append(box)
    return list(studies.values())


def readable(name):
    """ "PleuralEffusion", "pleural_effusion" -> "pleural effusion" """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name))
    return words.replace("_", " ").lower()
