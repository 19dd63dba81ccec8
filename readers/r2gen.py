"""The layout of R2Gen, for IU X-Ray and MIMIC-CXR: annotation.json and images/."""

from collections.abc import Callable
from pathlib import Path

from readers.study import Skip, Studies, Study, first_file, read_json
from runtime.config import InputError, Source
from runtime.output import warn0


def read_r2gen(
    source: Source,
    split: str,
    skip: Skip,
    patient: Callable,
    frontal: Callable = lambda images: images[:1],
) -> Studies:
    """patient(row) -> the patient's id; frontal(images of a row) -> at most one.

    Of IU X-Ray's two images the first is frontal. A row without a frontal image is left out.
    """
    root = Path(source.path)
    path = root / "annotation.json"
    tree = read_json(path)
    rows = tree.get(split) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list under {split!r}, the layout of R2Gen")
    without = 0
    for n, row in enumerate(rows):
        where = f"{path}, {split}[{n}]"
        try:
            name = str(row["id"])
            paths = row["image_path"]
            images = [first_file(source.image_root(), ("images", ""), path) for path in paths]
        except (LookupError, TypeError):
            skip(f"{where}: expected an object with id, report and image_path")
            continue
        if source.views == "frontal":
            images = frontal(images)
            if not images:
                without += 1
                continue
        report = row.get("report")
        if not isinstance(report, str):
            report = ""
        yield Study(name, patient(row), images, where, report)
    if without:
        warn0(
            f"{path}: {without} rows of {split} without an image that is known to be frontal are "
            f"left out (data.views=frontal)"
        )
