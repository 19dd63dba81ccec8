"""Chest ImaGenome: boxes of anatomical regions, on images of MIMIC-CXR-JPG.

silver_dataset/splits/*.csv and silver_dataset/scene_graph/ID_SceneGraph.json. The images, with
their metadata CSV, are below data.images or in mimic_cxr beside the folder.
"""

from pathlib import Path

from readers.mimic_cxr import mimic_image
from readers.study import (
    MALFORMED,
    Skip,
    Studies,
    Study,
    locate,
    normalize_box,
    read_csv,
    read_json,
)
from runtime.config import Source

CORNERS = ("original_x1", "original_y1", "original_x2", "original_y2")


def read(source: Source, split: str, skip: Skip) -> Studies:
    root, images = Path(source.path), source.image_root()
    name = "valid" if split == "val" else split
    table = locate(source, f"silver_dataset/splits/{name}.csv")
    metadata = locate(source, "mimic-cxr-2*-metadata.csv")
    rows = read_csv(metadata, skip, "dicom_id", "Rows", "Columns")
    sizes = {row["dicom_id"]: (row["Columns"], row["Rows"]) for row in rows}
    for row in read_csv(table, skip, "subject_id", "study_id", "dicom_id"):
        subject, dicom = row["subject_id"], row["dicom_id"]
        path = root / "silver_dataset" / "scene_graph" / f"{dicom}_SceneGraph.json"
        if not path.is_file():
            # The dataset itself lacks some.
            continue
        boxes = {}
        try:
            for region in read_json(path)["objects"]:
                box = [region.get(corner) for corner in CORNERS]
                boxes["anatomy", region["bbox_name"]] = [normalize_box(box, *sizes[dicom])]
        except MALFORMED as error:
            skip(
                f"{path}: expected objects with bbox_name and original_x1 .. original_y2, and the "
                f"image's size in the metadata ({error!r})"
            )
            continue
        image = images / mimic_image(subject, row["study_id"], dicom)
        yield Study(dicom, f"mimic/{subject}", [image], str(path), boxes=boxes)
