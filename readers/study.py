"""What a reader makes of a dataset: studies, their labels and boxes."""

import math
import re

LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)

NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


def parse_boxes(text):
    """Every well-formed "[x1, y1, x2, y2]" of finite numbers in the text, as tuples of floats in reading order."""
    boxes = [tuple(map(float, numbers)) for numbers in BOX.findall(text)]
    return [box for box in boxes if all(map(math.isfinite, box))]
