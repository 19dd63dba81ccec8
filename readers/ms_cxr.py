"""MS-CXR: phrases and their boxes, on images of MIMIC-CXR-JPG (MS_CXR_Local_Alignment_v1.*.csv).

The images are below data.images, or in mimic_cxr beside the folder. v1.1 has a split; v1.0 takes
that of MIMIC-CXR where it is there, else patients are divided by hash_split.
"""

from readers.study import (
    Skip,
    Studies,
    Study,
    corners,
    find,
    locate,
    normalize_box,
    of_split,
    patient_of,
    read_csv,
    split_name,
)
from runtime.config import Source

BOX = ("x", "y", "w", "h")
COLUMNS = ("dicom_id", "category_name", "label_text", "path", "image_width", "image_height")


def read(source: Source, split: str, skip: Skip) -> Studies:
    images = source.image_root()
    path = locate(source, "MS_CXR_Local_Alignment_v1*.csv")
    studies = {}
    splits = {}
    for row in read_csv(path, skip, *COLUMNS, *BOX):
        dicom = row["dicom_id"]
        where = f"{path}, image {dicom}"
        box = [row[name] for name in BOX]
        box = corners(*normalize_box(box, row["image_width"], row["image_height"]))
        patient = patient_of(row["path"], source.path)
        study = Study(dicom, patient, [images / row["path"]], where)
        study = studies.setdefault(dicom, study)
        splits.setdefault(dicom, row.get("split"))
        phrase = " ".join(row["label_text"].split())
        study.boxes.setdefault(("phrase", phrase), []).append(box)

    studies = list(studies.values())
    if not all(splits.values()):
        table = find(source, "mimic-cxr-2*-split.csv")
        if not table:
            yield from of_split(studies, split)
            return
        rows = read_csv(table, skip, "dicom_id", "split")
        splits = {row["dicom_id"]: row["split"] for row in rows}
    for study in studies:
        if split_name(splits.get(study.id, "train")) == split:
            yield study
