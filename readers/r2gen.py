"""The layout of R2Gen, for IU X-Ray and MIMIC-CXR: annotation.json and images/."""

from readers.study import Study, read_json
from runtime.config import InputError


def is_r2gen(root):
    return (root / "annotation.json").is_file()


def read_r2gen(root, split, views, skip, patient):
    """The first image of a row is its frontal view. patient(row) -> the patient's id."""
    path = root / "annotation.json"
    tree = read_json(path)
    rows = tree.get(split) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list under {split!r}, the layout of R2Gen")
    for n, row in enumerate(rows):
        where = f"{path}, {split}[{n}]"
        paths = row.get("image_path") if isinstance(row, dict) and "id" in row else None
        if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
            skip(f"{where}: expected an object with id, report and image_path")
            continue
        images = [root / "images" / p for p in paths]
        if views == "frontal":
            images = images[:1]
        report = row.get("report")
        text = report if isinstance(report, str) else ""
        yield Study(str(row["id"]), patient(row), images, where, text)
