"""The layout of R2Gen, for IU X-Ray and MIMIC-CXR: annotation.json and images/."""

from collections.abc import Callable
from pathlib import Path

from readers.study import Skip, Studies, Study, read_json
from runtime.config import InputError, Source


def read_r2gen(source: Source, split: str, skip: Skip, patient: Callable) -> Studies:
    """The first image of a row is its frontal view. patient(row) -> the patient's id."""
    root = Path(source.path)
    path = root / "annotation.json"
    tree = read_json(path)
    rows = tree.get(split) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list under {split!r}, the layout of R2Gen")
    for n, row in enumerate(rows):
        where = f"{path}, {split}[{n}]"
        try:
            name = str(row["id"])
            images = [root / "images" / image for image in row["image_path"]]
        except (LookupError, TypeError):
            skip(f"{where}: expected an object with id, report and image_path")
            continue
        if source.views == "frontal":
            images = images[:1]
        report = row.get("report")
        if not isinstance(report, str):
            report = ""
        yield Study(name, patient(row), images, where, report)
