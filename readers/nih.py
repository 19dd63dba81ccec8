"""NIH ChestX-ray14: labels, and boxes of abnormalities.

Data_Entry_2017*.csv (labels), BBox_List_2017.csv (boxes in a frame of 1024 x 1024), images*/. The
split is that of train_val_list.txt and test_list.txt (all boxes are on test images); without these,
patients are divided by hash_split.
"""

from readers.study import (
    Skip,
    Studies,
    Study,
    corners,
    find,
    first_file,
    hash_split,
    locate,
    normalize_box,
    read_csv,
    read_lines,
)
from runtime.config import Source

NAMES = {"Infiltrate": "Infiltration", "Pleural_Thickening": "Pleural thickening"}
FRAME = 1024


def read(source: Source, split: str, skip: Skip) -> Studies:
    images = source.image_root()
    path = locate(source, "BBox_List_2017.csv")
    boxes = read_boxes(path)
    labels = read_labels(find(source, "Data_Entry*.csv"), skip)
    every = {*labels, *boxes}
    patients = {image: image.split("_")[0] for image in every}
    test = read_test_list(source)
    splits = hash_split(patients.values(), test=0.2 if test is None else 0.0)

    folders = ["images", "", *sorted(p.relative_to(images) for p in images.glob("images_*/images"))]
    for image in sorted(every if "classification" in source.tasks else boxes):
        patient = patients[image]
        held_out = test is not None and image in test
        if ("test" if held_out else splits[patient]) != split:
            continue
        study = Study(image, f"nih/{patient}", [], f"{path}, image {image}")
        study.images = [first_file(images, folders, image)]
        study.findings = labels.get(image)
        study.boxes = boxes.get(image, {})
        yield study


def read_labels(path, skip):
    """image -> names of its findings"""
    labels = {}
    if path:
        for row in read_csv(path, skip, "Image Index", "Finding Labels"):
            names = row["Finding Labels"].split("|")
            labels[row["Image Index"]] = [NAMES.get(n, n) for n in names if n != "No Finding"]
    return labels


def read_test_list(source):
    """The official test images; None without the official lists."""
    if find(source, "train_val_list.txt", "test_list.txt"):
        return set(read_lines(locate(source, "test_list.txt")))
    return None


def read_boxes(path):
    """image -> (kind, name) -> boxes. The header splits into other cells than the rows."""
    boxes = {}
    _, *lines = read_lines(path)
    for line in lines:
        image, _, rest = line.partition(",")
        name, *box = rest.split(",")
        key = "abnormality", NAMES.get(name, name)
        found = boxes.setdefault(image, {}).setdefault(key, [])
        found.append(corners(*normalize_box(box, FRAME, FRAME)))
    return boxes
