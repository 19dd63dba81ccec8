"""The layout of R2Gen, for IU X-Ray and MIMIC-CXR: annotation.json and images/."""

from collections.abc import Callable
from pathlib import Path

from readers.study import Skip, Studies, Study, first_file, read_json
from runtime.config import InputError, Source


def read_r2gen(source: Source, path: Path, split: str, skip: Skip, patient: Callable) -> Studies:
    """patient(row) -> the patient's id."""
    tree = read_json(path)
    rows = tree.get(split) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list under {split!r}, the layout of R2Gen")
    for n, row in enumerate(rows):
        where = f"{path}, {split}[{n}]"
        try:
            name = str(row["id"])
            files = row["image_path"]
            images = [first_file(source.image_root(), ("images", ""), file) for file in files]
        except (LookupError, TypeError):
            skip(f"{where}: expected an object with id, report and image_path")
            continue
        report = row.get("report")
        if not isinstance(report, str):
            report = ""
        yield Study(name, patient(row), images, where, report)
