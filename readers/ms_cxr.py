"""MS-CXR: phrases and their boxes, on images of MIMIC-CXR-JPG (MS_CXR_Local_Alignment_v1.*.csv).

The images are below data.images, or in mimic_cxr beside the folder. v1.1 has a split; v1.0 takes
that of MIMIC-CXR where it is there, else patients are divided by hash_split.
"""

import re
from pathlib import Path

from readers.study import Study, corners, locate, normalize_box, of_split, read_csv

SIZES = ("x", "y", "w", "h", "image_width", "image_height")
COLUMNS = ("dicom_id", "category_name", "label_text", "path", *SIZES)
VAL = {"validate": "val", "valid": "val"}


def read(source, split, skip):
    images = source.image_root()
    path = locate(Path(source.path), "MS_CXR_Local_Alignment_v1*.csv")
    studies, splits = {}, {}
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
        splits.setdefault(dicom, row.get("split"))
        phrase = " ".join(row["label_text"].split())
        study.boxes.setdefault(("phrase", phrase), []).append(box)
    studies = list(studies.values())
    if not all(splits.values()):
        tables = sorted(images.glob("mimic-cxr-2*-split.csv*"))
        if not tables:
            yield from of_split(studies, split)
            return
        rows = read_csv(tables[-1], ["dicom_id", "split"], skip)
        splits = {row["dicom_id"]: row["split"] for row in rows}
    for study in studies:
        name = splits.get(study.id, "train")
        if VAL.get(name, name) == split:
            yield study
