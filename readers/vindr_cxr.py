"""VinDr-CXR: boxes of abnormalities by several radiologists, which are fused.

From PhysioNet (annotations/annotations_{train,test}.csv) or Kaggle (train.csv), with the images as
train/ID.png or .jpg. Boxes are pixels of the original, whose size is in train_meta.csv and
test_meta.csv if the images were resized. PhysioNet's validation images, and Kaggle's splits, are
chosen by hash_split.
"""

import numpy as np

from readers.study import (
    Skip,
    Studies,
    Study,
    find,
    first_file,
    has_area,
    hash_split,
    image_size,
    locate,
    normalize_box,
    read_csv,
)
from runtime.config import InputError, Source

CORNERS = ("x_min", "y_min", "x_max", "y_max")


def read(source: Source, split: str, skip: Skip) -> Studies:
    names = "annotations/annotations_train.csv", "annotations_train.csv", "train.csv"
    path = locate(source, *names)
    official = path.name.startswith("annotations")
    part = "train"
    if official and split == "test":
        part = "test"
        path = locate(source, "annotations/annotations_test.csv", "annotations_test.csv")
    images = read_boxes(path, skip)
    splits = hash_split(images, test=0.0 if official else 0.2)
    meta = f"{part}_meta.csv"
    sizes = read_sizes(find(source, meta), skip)

    places = (part, f"{part}_png", "images", "")
    studies = []
    inside = []
    for image, findings in images.items():
        if part == "train" and splits[image] != split:
            continue
        where = f"{path}, image {image}"
        file = first_file(source.image_root(), places, f"{image}.png", f"{image}.jpg")
        if not file.is_file():
            skip(f"{where}: {file} does not exist (DICOM files have to be converted to PNG first)")
            continue
        try:
            size = sizes.get(image) or image_size(file)
        except InputError as error:
            skip(str(error))
            continue
        study = Study(image, f"vindr/{image}", [file], where, complete=True)
        study.findings = sorted(findings)
        for name, boxes in findings.items():
            boxes = [normalize_box(box, *size) for box in boxes]
            inside += [not max(box) > 1.01 for box in boxes]
            study.boxes["abnormality", name] = fuse_boxes(boxes)
        studies.append(study)
    if sum(inside) < len(inside) / 2:
        raise InputError(
            f"{path}: most boxes lie outside of their images: were the images resized? Then "
            f"{meta} in {source.path} must give the original sizes, in the columns image_id, dim0 "
            f"(height), dim1 (width)"
        )
    yield from studies


def read_boxes(path, skip):
    """image -> finding -> boxes of all radiologists"""
    images = {}
    for row in read_csv(path, skip, "image_id", "class_name", *CORNERS):
        findings = images.setdefault(row["image_id"], {})
        name = row["class_name"]
        if name.lower() == "no finding":
            continue
        findings.setdefault(name, []).append([row[corner] for corner in CORNERS])
    return images


def read_sizes(path, skip):
    """image -> width and height of the original, where the file is there."""
    sizes = {}
    rows = read_csv(path, skip, "image_id", "dim0", "dim1") if path else ()
    for row in rows:
        try:
            sizes[row["image_id"]] = float(row["dim1"]), float(row["dim0"])
        except ValueError:
            skip(f"{path}, image {row['image_id']}: expected numbers in dim0 and dim1")
    return sizes


def fuse_boxes(boxes, threshold=0.55):
    """Boxes of one finding by several radiologists: weighted box fusion.

    Solovyev et al. 2021, with equal weights. Each box joins the fused box that it overlaps most, if
    their IoU is above the threshold; a fused box is the mean of its members. What is no box stays.
    """
    strange = [box for box in boxes if not has_area(box)]
    clusters = []
    fused = np.zeros((0, 4))
    for box in map(np.array, filter(has_area, boxes)):
        overlaps = ious(fused, box)
        if len(overlaps) and overlaps.max() > threshold:
            clusters[overlaps.argmax()].append(box)
        else:
            clusters.append([box])
        fused = np.stack([np.mean(cluster, axis=0) for cluster in clusters])
    return [tuple(box) for box in fused.tolist()] + strange


def ious(boxes, box):
    """(N,) intersection over union of boxes (N, 4) and one box (4,)."""
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, 2:], box[2:])
    shared = (high - low).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shared / (areas + (box[2:] - box[:2]).prod() - shared)
