"""ReXGradient-160K: reports.

metadata/{train,valid,test}_metadata_view_position.json, and the images in deid_png/. The report is
the findings, else the impression.
"""

from readers.study import (
    MALFORMED,
    Skip,
    Studies,
    Study,
    choose_views,
    first_file,
    locate,
    read_json,
)
from runtime.config import InputError, Source


def read(source: Source, split: str, skip: Skip) -> Studies:
    name = "valid" if split == "val" else split
    path = locate(source, f"metadata/{name}_metadata_view_position.json")
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected an object with a study for each id")
    studies = []
    for name, row in tree.items():
        where = f"{path}, {name}"
        try:
            sections = [row[section] or "" for section in ("Findings", "Impression")]
            report = next(filter(str.strip, sections), "")
            patient = row["PatientID"]
            # Without it, a patient could be in two splits.
            if not patient:
                raise ValueError("no PatientID")
            study = Study(name, f"rexgradient/{patient}", [], where, report)
            for view, file in zip(row["ImageViewPosition"], row["ImagePath"], strict=True):
                # Relative to metadata/.
                file = file.removeprefix("../")
                names = file, file.removeprefix("deid_png/")
                study.images.append((view, first_file(source.image_root(), ("",), *names)))
        except (*MALFORMED, AttributeError) as error:
            skip(
                f"{where}: expected Findings, Impression, PatientID, and lists of equal length "
                f"ImagePath and ImageViewPosition ({error!r})"
            )
            continue
        studies.append(study)
    yield from choose_views(studies, source, f"{path}, {split}")
