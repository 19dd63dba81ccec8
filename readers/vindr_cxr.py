"""VinDr-CXR: boxes of abnormalities by several radiologists, which are fused.

From PhysioNet (annotations/annotations_{train,test}.csv) or Kaggle (train.csv), with the images as
train/ID.png or .jpg. Boxes are pixels of the original, whose size is in train_meta.csv and
test_meta.csv if the images were resized. PhysioNet's validation images, and Kaggle's splits, are
chosen by hash_split.
"""

from itertools import chain
from pathlib import Path

import numpy as np

from readers.study import (
    Skip,
    Studies,
    Study,
    first_file,
    hash_split,
    image_size,
    locate,
    normalize_box,
    read_csv,
)
from runtime.config import Source

CORNERS = ("x_min", "y_min", "x_max", "y_max")


def read(source: Source, split: str, skip: Skip) -> Studies:
    root = Path(source.path)
    path = locate(root, "annotations/annotations_train.csv", "annotations_train.csv", "train.csv")
    official = path.name.startswith("annotations")
    part = "train"
    if official and split == "test":
        part = "test"
        path = locate(root, "annotations/annotations_test.csv", "annotations_test.csv")
    images = read_boxes(path, skip)
    splits = hash_split(images, test=0.0 if official else 0.2)
    meta = root / f"{part}_meta.csv"
    sizes = read_sizes(meta, skip)

    places = (part, f"{part}_png", "images", "")
    for image, findings in images.items():
        if part == "train" and splits[image] != split:
            continue
        where = f"{path}, image {image}"
        file = first_file(source.image_root(), places, f"{image}.png", f"{image}.jpg")
        if not file.is_file():
            skip(f"{where}: {file} does not exist (DICOM files have to be converted to PNG first)")
            continue
        study = Study(image, f"vindr/{image}", [file], where, complete=True)
        study.findings = sorted(findings)
        width, height = sizes.get(image) or image_size(file)
        outside = []
        for name, readings in findings.items():
            boxes = fuse_boxes(readings.values())
            study.boxes["abnormality", name] = [normalize_box(box, width, height) for box in boxes]
            outside += [max(box) > 1.01 for box in study.boxes["abnormality", name]]
        if 2 * sum(outside) > len(outside):
            skip(
                f"{where}: boxes lie outside {file}, {width:.0f} x {height:.0f} pixels: were the "
                f"images resized? Then {meta} must give the original sizes, in the columns "
                f"image_id, dim0 (height), dim1 (width)"
            )
            continue
        yield study


def read_boxes(path, skip):
    """image -> finding -> radiologist -> boxes"""
    images = {}
    for row in read_csv(path, skip, "image_id", "class_name", *CORNERS):
        findings = images.setdefault(row["image_id"], {})
        name = row["class_name"]
        if name.lower() == "no finding":
            continue
        try:
            box = tuple(float(row[corner]) for corner in CORNERS)
        except ValueError:
            skip(f"{path}, image {row['image_id']}: {name} without a box")
            continue
        radiologist = row.get("rad_id") or row.get("rad_ID")
        findings.setdefault(name, {}).setdefault(radiologist, []).append(box)
    return images


def read_sizes(path, skip):
    """image -> width and height of the original, where the file is there."""
    sizes = {}
    if not path.is_file():
        return sizes
    for row in read_csv(path, skip, "image_id", "dim0", "dim1"):
        try:
            sizes[row["image_id"]] = float(row["dim1"]), float(row["dim0"])
        except ValueError:
            skip(f"{path}, image {row['image_id']}: expected numbers in dim0 and dim1")
    return sizes


def fuse_boxes(readings, threshold=0.55):
    """Boxes of one finding by several radiologists as one list: weighted box fusion.

    Solovyev et al. 2021, with equal weights. Each box joins the fused box that it overlaps most, if
    their IoU is above the threshold; a fused box is the mean of its members.
    """
    clusters = []
    fused = np.zeros((0, 4))
    for box in map(np.array, chain.from_iterable(readings)):
        overlaps = ious(fused, box)
        if len(overlaps) and overlaps.max() > threshold:
            clusters[overlaps.argmax()].append(box)
        else:
            clusters.append([box])
        fused = np.stack([np.mean(cluster, axis=0) for cluster in clusters])
    return [tuple(box) for box in fused.tolist()]


def ious(boxes, box):
    """(N,) intersection over union of boxes (N, 4) and one box (4,)."""
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, 2:], box[2:])
    shared = (high - low).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shared / (areas + (box[2:] - box[:2]).prod() - shared)
