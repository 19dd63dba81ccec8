"""NIH ChestX-ray14: labels, and boxes of abnormalities.

Data_Entry_2017*.csv (labels), BBox_List_2017.csv (boxes in a frame of 1024 x 1024), images*/. The
split is that of train_val_list.txt and test_list.txt (all boxes are on test images); without these,
patients are divided by hash_split.
"""

import csv
from pathlib import Path

from readers.study import Study, corners, first_file, hash_split, locate, normalize_box, read_csv
from runtime.config import InputError

NAMES = {"Infiltrate": "Infiltration", "Pleural_Thickening": "Pleural thickening"}
FRAME = 1024


def read(source, split, skip):
    root = Path(source.path)
    boxes = read_boxes(locate(root, "BBox_List_2017.csv"), skip)
    labels = {}
    for table in root.glob("Data_Entry*.csv"):
        for row in read_csv(table, ["Image Index", "Finding Labels"], skip):
            names = row["Finding Labels"].split("|")
            labels[row["Image Index"]] = [NAMES.get(n, n) for n in names if n != "No Finding"]

    every = {*labels, *boxes}
    lists = ("train_val_list.txt", "test_list.txt")
    official = any((root / name).is_file() for name in lists)
    test = set(locate(root, "test_list.txt").read_text().split()) if official else set()
    patients = hash_split(map(patient_of_image, every), test=0.0 if official else 0.2)
    folders = ["images", "", *sorted(p.relative_to(root) for p in root.glob("images_*/images"))]
    for image in sorted(every if "classification" in source.tasks else boxes):
        patient = patient_of_image(image)
        if ("test" if image in test else patients[patient]) != split:
            continue
        file = first_file(root, folders, image)
        yield Study(
            image,
            f"nih/{patient}",
            [file],
            f"{root}, image {image}",
            findings=labels.get(image),
            boxes=boxes.get(image, {}),
        )


def patient_of_image(image):
    return image.split("_")[0]


def read_boxes(path, skip):
    """image -> (kind, name) -> boxes. The header splits into other cells than the rows."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))[1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a valid CSV file ({error})") from None
    boxes = {}
    rows = [row for row in rows if len(row) > 1]
    for n, (image, name, *cells) in enumerate(rows, 2):
        try:
            box = corners(*cells[:4])
        except (ValueError, TypeError):
            skip(f"{path}, line {n}: expected four numbers")
            continue
        key = "abnormality", NAMES.get(name, name)
        found = boxes.setdefault(image, {}).setdefault(key, [])
        found.append(normalize_box(box, FRAME, FRAME))
    return boxes
