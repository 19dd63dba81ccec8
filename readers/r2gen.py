"""The layout of R2Gen, for IU X-Ray and MIMIC-CXR: annotation.json and images/."""

from collections.abc import Callable
from pathlib import Path

from readers.study import Skip, Studies, Study, choose_views, first_file, read_json
from runtime.config import InputError, Source


def read_r2gen(
    source: Source, path: Path, split: str, skip: Skip, patient: Callable, view: Callable
) -> Studies:
    """patient(row) -> the patient's id; view(k, path) -> the view of the k-th image of a row."""
    tree = read_json(path)
    rows = tree.get(split) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list under {split!r}, the layout of R2Gen")
    studies = []
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
        images = [(view(k, image), image) for k, image in enumerate(images)]
        studies.append(Study(name, patient(row), images, where, report))
    yield from choose_views(studies, source, f"{path}, {split}")
