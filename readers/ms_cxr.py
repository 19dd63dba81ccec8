"""MS-CXR: phrases and their boxes, on images of MIMIC-CXR-JPG (MS_CXR_Local_Alignment_v1.*.csv).

The images are below data.images, or in mimic_cxr beside the folder. v1.1 has a split; v1.0 takes
that of MIMIC-CXR where it is there, else patients are divided by hash_split.
"""

import re
from pathlib import Path

from readers.study import Study, corners, hash_split, locate, normalize_box, read_csv

SIZES = ("x", "y", "w", "h", "image_width", "image_height")
COLUMNS = ("dicom_id", "category_name", "label_text", "path", *SIZES)
VAL = {"validate": "val", "valid": "val"}


def read(source, split, skip):
    images = source.image_root()
    path = locate(Path(source.path), "MS_CXR_Local_Alignment_v1*.csv")
    studies = {}
    given = {}
    for row in read_csv(path, COLUMNS, skip):
        dicom = row["dicom_id"]
        where = f"{path}, image {dicom}"
        try:
            x, y, width, height, image_width, image_height = (row[name] for name in SIZES)
            box = normalize_box(corners(x, y, width, height), image_width, image_height)
            patient = "mimic/" + re.search(r"/p(\d{8})/", f"/{row['path']}")[1]
        except (ValueError, ZeroDivisionError, TypeError):
            skip(
                f"{where}: expected numbers in x, y, w, h, image_width, image_height, and a path "
                f"with the patient, like files/p10/p10000032/..."
            )
            continue
        study = studies.setdefault(dicom, Study(dicom, patient, [images / row["path"]], where))
        given.setdefault(dicom, row.get("split"))
        phrase = " ".join(row["label_text"].split())
        study.boxes.setdefault(("phrase", phrase), []).append(box)
    splits = {dicom: VAL.get(name, name) for dicom, name in given.items()}
    if not all(splits.values()):
        splits = other_splits(studies, images, skip)
    for dicom, study in studies.items():
        if splits[dicom] == split:
            yield study


def other_splits(studies, images, skip):
    """The split of MIMIC-CXR, else one by patients."""
    tables = sorted(images.glob("mimic-cxr-2*-split.csv*"))
    if not tables:
        patients = hash_split(study.patient for study in studies.values())
        return {dicom: patients[study.patient] for dicom, study in studies.items()}
    rows = read_csv(tables[-1], ["dicom_id", "split"], skip)
    official = {row["dicom_id"]: row["split"].replace("validate", "val") for row in rows}
    return {dicom: official.get(dicom, "train") for dicom in studies}
