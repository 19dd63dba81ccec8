"""Everything that is read: the configuration, datasets, prompts and answer formats, and the built-in phantoms.

In order of appearance
  Config, load_config           one YAML file plus key=value overrides, checked key by key
  Example, open_images          one question about one study; its images are opened only when needed
  prompt_text, target_text      what the model is asked and what it should say, in the three output formats
  Study, READERS                datasets, each from its files as they are distributed
  study_examples, load_split    the questions about a study; a split of all sources, without leaks
  systematic_reading            thinking traces for the cold start
  indices, by_study, batch      which examples make up step t: a pure function of (seed, t)
  phantom                       procedurally drawn chest X-rays with findings, boxes, reports and thinking traces
  describe                      python data.py config.yaml: what would be loaded, as tables and a picture
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import sys
import textwrap
import warnings
import zlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

# parse_boxes stands beside boxes_text as its way back.
from readers.study import LABELS, parse_boxes  # noqa: F401
from runtime.config import Config, InputError, Source, load_config
from runtime.output import format_table, rank

# ---------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """One question about one study."""

    id: str
    task: str  # how it is answered and scored: "report" | "grounding" | "classification" (SFT only)
    images: tuple  # paths, or phantoms
    question: str
    answer: str  # the reference report, or the reference boxes as text
    thinking: str = ""  # a reasoning trace, where the data has one
    boxes: tuple = ()  # grounding: (x1, y1, x2, y2), fractions of the original image; () = not there
    label: str = ""  # grounding: what is asked for
    patient: str = ""
    style: str = "plain"  # output format: plain | tags | suffix, see target_text
    kind: str = ""  # grounding: "abnormality" | "anatomy" | "phrase" | "detection"
    history: tuple = ()  # earlier (question, answer) of the same conversation
    copy: int = 0  # which copy of a study that comes up several times in an epoch


def load_image(path):
    """An image file as 8-bit RGB. 16-bit and float files are scaled from their own range; alpha is dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise InputError(f"{path}: not a readable image ({' '.join(str(error).split())})") from None
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        low, high = pixels.min(), pixels.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError(f"{path}: the image has pixels that are not finite")
        image = Image.fromarray(np.uint8(255 * (pixels - low) / max(high - low, 1e-12)))
    return image.convert("RGB")


def open_images(example):
    """The example's images as RGB, opened or drawn now."""
    return [
        load_image(i) if isinstance(i, (str, Path)) else i.image.convert("RGB")
        for i in example.images
    ]


# ---------------------------------------------------------------------------------------------- prompts and answers

ANSWER_TAG = {"report": "report", "grounding": "answer", "classification": "answer"}
NOTHING_THERE = "It is not seen."


def batched(items, size):
    """Consecutive lists of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def style_of(config):
    """The output format that a configuration asks for."""
    return config.data.think_format if config.data.thinking else "plain"


def prompt_text(example):
    """The user turn. `suffix` is RadVLM-GRPO's switch for thinking; `tags` spells out MRG-R1's format."""
    if example.style == "tags":
        tag = ANSWER_TAG[example.task]
        return f"{example.question} Think in <think></think>, then answer in <{tag}></{tag}>."
    return example.question + (" /think" if example.style == "suffix" else "")


def target_text(example):
    """What a supervised model should say (without the end-of-turn token)."""
    if example.style == "tags":
        tag = ANSWER_TAG[example.task]
        return f"<think>{example.thinking}</think>\n<{tag}>{example.answer}</{tag}>"
    return (
        f"{example.thinking}</think>\n{example.answer}"
        if example.style == "suffix"
        else example.answer
    )


TAGS = ("<think>", "</think>", "<report>", "</report>", "<answer>", "</answer>")


def parse_output(text, task, style):
    """(valid, thinking, answer) of a completion for task "report" | "grounding", style "plain" | "tags" | "suffix".

    Valid: the whole text has the format, each tag once and in order, no other tag, the answer not empty. A thinking
    style without </think> has no answer; otherwise invalid "tags" still answer if exactly one closed block follows
    </think>, and invalid "suffix" with what follows the last </think>.
    """
    text = text.strip()
    count = {tag: text.count(tag) for tag in TAGS}
    if style == "plain":
        return bool(text) and not any(count.values()), "", text
    if not count["</think>"]:
        return False, text, ""
    if style == "suffix":
        thinking, _, answer = map(str.strip, text.rpartition("</think>"))
        return sum(count.values()) == 1 and bool(answer), thinking, answer
    start, end = ("<report>", "</report>") if task == "report" else ("<answer>", "</answer>")
    thinking, _, rest = text.partition("</think>")
    between, _, block = rest.partition(start)
    answer, _, after = map(str.strip, block.partition(end))
    if not rest.count(start) == rest.count(end) == block.count(end) == 1:
        answer = ""
    once = all(count[tag] == (tag in ("<think>", "</think>", start, end)) for tag in TAGS)
    valid = (
        once
        and thinking.startswith("<think>")
        and not between.strip()
        and not after
        and bool(answer)
    )
    return valid, thinking.removeprefix("<think>").strip(), answer


def boxes_text(boxes):
    """The papers' box format: "[0.12, 0.30, 0.45, 0.61], [...] and [...]"."""
    texts = ["[" + ", ".join(f"{value:.2f}" for value in box) + "]" for box in boxes]
    return (
        " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]])) if texts else NOTHING_THERE
    )


# ---------------------------------------------------------------------------------------------- datasets


@dataclass
class Study:
    """One study as a dataset has it; study_examples asks the questions."""

    id: str
    patient: str  # with a name space of its own for every population of patients
    images: list  # paths
    where: str  # for messages: file and place in it
    report: str | None = None  # None: the dataset has none; "": it lacks here
    findings: list | None = None  # names of all that is to be seen; None: not known
    boxes: dict = field(
        default_factory=dict
    )  # (kind, name) -> [(x1, y1, x2, y2)], fractions of the image
    complete: bool = False  # all abnormalities have their boxes: detection can be asked
    thinking: str = ""


def locate(root, *names):
    """The first of these paths below `root` that exists, as it is or with .gz. A pattern takes what sorts last."""
    for name in names:
        for path in (
            *sorted(root.glob(name), reverse=True),
            *sorted(root.glob(name + ".gz"), reverse=True),
        ):
            return path
    raise InputError(f"{root}: expected {' or '.join(names)} there")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_csv(path, columns, skip):
    """Rows of a CSV file (or CSV.gz) as dicts; a missing column is an error, a row with too few or too many cells is bad."""
    csv.field_size_limit(1 << 24)
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(
            path, "rt", newline="", encoding="utf-8-sig"
        ) as file:
            reader = csv.DictReader(file, strict=True)
            missing = [c for c in columns if c not in (reader.fieldnames or [])]
            if missing:
                raise InputError(
                    f"{path}: no column {missing[0]!r}; it has {', '.join(reader.fieldnames or ['none'])}"
                )
            for row in reader:
                if None in row or None in row.values():
                    skip(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames)} cells")
                    continue
                yield row
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid CSV file ({error})") from None


def assigned(ids, shares=(0.1, 0.2)):
    """id -> split by a hash of the id, val and test with these shares (at least one id each, if any is asked for), for
    datasets or parts of them that are published without a split. Give patients where they are known."""
    ranked = sorted(set(ids), key=lambda i: hashlib.sha1(f"0:{i}".encode()).hexdigest())
    n_val, n_test = (max(1, round(share * len(ranked))) if share else 0 for share in shares)
    names = ["val"] * n_val + ["test"] * n_test + ["train"] * len(ranked)
    return dict(zip(ranked, names))


def fractions(boxes, width, height):
    """Boxes in pixels -> fractions of the image; rounding may have put them a pixel outside."""

    def fraction(value, size):
        value = float(value) / float(size)
        return min(max(value, 0.0), 1.0) if -0.01 < value < 1.01 else value

    return [tuple(fraction(v, s) for v, s in zip(box, (width, height) * 2)) for box in boxes]


def image_size(path):
    """(width, height) from the file's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path}: {getattr(error, 'strerror', None) or 'not a readable image'}"
        ) from None


def first_file(root, name, folders):
    """root/FOLDER/name for the first folder that has it; the first of all when none does."""
    paths = [root / folder / name for folder in folders]
    return next((p for p in paths if p.is_file()), paths[0])


def patient_of(path, root):
    """The patient of an image by the names of MIMIC-CXR's folders or NIH's files; else the image counts as one."""
    mimic, nih_ = (
        re.search(r"(?:^|/)p(\d{8})/", str(path)),
        re.search(r"(?:^|/)(\d{8})_\d{3}\.png$", str(path)),
    )
    return f"mimic/{mimic[1]}" if mimic else f"nih/{nih_[1]}" if nih_ else f"{root}/{path}"


def r2gen(root, split, views, skip, patient):
    """annotation.json and images/ as R2Gen distributes them; the first image is the frontal view. patient(row) -> its id."""
    path = root / "annotation.json"
    tree = read_json(path)
    rows = tree.get(split) if isinstance(tree, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list under {split!r}, the layout of R2Gen")
    for n, row in enumerate(rows):
        where = f"{path}, {split}[{n}]"
        if not (
            isinstance(row, dict)
            and "id" in row
            and isinstance(row.get("image_path"), list)
            and all(isinstance(p, str) for p in row["image_path"])
        ):
            skip(f"{where}: expected an object with id, report and image_path")
            continue
        images = [root / "images" / p for p in row["image_path"]]
        report = row.get("report")
        yield Study(
            str(row["id"]),
            patient(row),
            images[:1] if views == "frontal" else images,
            where,
            report if isinstance(report, str) else "",
        )


def read_iu_xray(source, split, skip):
    """IU X-Ray as R2Gen distributes it (annotation.json, images/), as Kaggle does (two CSV files, images_normalized/), or as
    OpenI does (ecgen-radiology/*.xml, NLMCXR_png/). The latter two have no split (see `assigned`) and keep the original
    sections: the report is the findings, else the impression. OpenI does not say which view an image is: the first by name
    counts as frontal, which is wrong for one study in ten."""
    root = Path(source.path)
    if (root / "annotation.json").is_file():
        yield from r2gen(
            root,
            split,
            source.views,
            skip,
            lambda row: "iu/" + str(row["id"]).split("_")[0].removeprefix("CXR"),
        )
        return
    studies = {}  # uid -> (report, [(view, image)], where)
    if (root / "indiana_reports.csv").is_file():
        views = {}
        for row in read_csv(
            root / "indiana_projections.csv", ["uid", "filename", "projection"], skip
        ):
            views.setdefault(row["uid"], []).append(
                (row["projection"].strip(), root / "images_normalized" / row["filename"])
            )
        path = root / "indiana_reports.csv"
        for row in read_csv(path, ["uid", "findings", "impression"], skip):
            studies[row["uid"]] = (
                row["findings"].strip() or row["impression"],
                sorted(views.get(row["uid"], [])),
                f"{path}, uid {row['uid']}",
            )
    else:
        locate(root, "annotation.json", "indiana_reports.csv", "ecgen-radiology/*.xml")
        for path in sorted((root / "ecgen-radiology").glob("*.xml")):
            try:
                tree = ElementTree.parse(path)
            except (ElementTree.ParseError, OSError) as error:
                skip(f"{path}: not valid XML ({error})")
                continue
            text = {t.get("Label"): " ".join(t.itertext()) for t in tree.iter("AbstractText")}
            images = sorted(
                root / "NLMCXR_png" / f"{i.get('id')}.png" for i in tree.iter("parentImage")
            )
            uid = next((u.get("id") for u in tree.iter("uId")), path.stem).removeprefix("CXR")
            studies[uid] = (
                text.get("FINDINGS", "").strip() or text.get("IMPRESSION", ""),
                [("Lateral" if n else "Frontal", image) for n, image in enumerate(images)],
                str(path),
            )
    splits = assigned(studies)
    for uid, (report, views, where) in studies.items():
        if splits[uid] == split:
            images = [
                image for view, image in views if source.views == "all" or view.lower() == "frontal"
            ]
            yield Study(
                uid, f"iu/{uid}", images if source.views == "all" else images[:1], where, report
            )


HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ,/&()-]+):", re.MULTILINE)


def findings_section(text):
    """The findings of a MIMIC-CXR report, else its impression, else ""."""
    _, *parts = HEADING.split(text)
    sections = [(name.strip().lower(), body) for name, body in zip(parts[::2], parts[1::2])]
    return next(
        (
            body
            for wanted in ("finding", "impression")
            for name, body in sections
            if name.startswith(wanted) and body.strip()
        ),
        "",
    )


def mimic_image(subject, study, dicom):
    return Path("files") / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg"


def read_mimic_cxr(source, split, skip):
    """MIMIC-CXR as R2Gen distributes it (annotation.json, images/), or MIMIC-CXR-JPG from PhysioNet: split and metadata CSV,
    files/p10/p10000032/s50414267/ID.jpg, and the reports as mimic_cxr_sectioned.csv or as the .txt files of MIMIC-CXR, beside
    the images or in mimic-cxr-reports/. Findings, else impression. Labels (classification) from the chexpert CSV."""
    root = Path(source.path)
    if (root / "annotation.json").is_file():
        yield from r2gen(
            root, split, source.views, skip, lambda row: f"mimic/{row.get('subject_id', row['id'])}"
        )
        return
    table = locate(root, "mimic-cxr-2*-split.csv", "annotation.json")
    views = {
        row["dicom_id"]: row["ViewPosition"]
        for row in read_csv(
            locate(root, "mimic-cxr-2*-metadata.csv"), ["dicom_id", "ViewPosition"], skip
        )
    }
    texts = None
    if [*root.glob("mimic_cxr_sectioned.csv*")]:
        path = locate(root, "mimic_cxr_sectioned.csv")
        texts = {
            row["study"].removeprefix("s"): row["findings"].strip() or row["impression"]
            for row in read_csv(path, ["study", "findings", "impression"], skip)
        }
    labels = {}
    if "classification" in source.tasks:
        for row in read_csv(
            locate(root, "mimic-cxr-2*-chexpert.csv"), ["study_id", *LABELS], skip
        ):  # by name: the order differs
            found = [label for label in LABELS if row[label].strip() in ("1", "1.0")]
            labels[row["study_id"]] = (
                [label for label in found if label != "No Finding"] if found else None
            )  # nothing certain: no answer
    studies = {}
    for row in read_csv(table, ["dicom_id", "study_id", "subject_id", "split"], skip):
        if row["split"] == {"val": "validate"}.get(split, split):
            studies.setdefault((row["subject_id"], row["study_id"]), []).append(row["dicom_id"])
    for (subject, study), dicoms in studies.items():
        dicoms = sorted(
            dicoms, key=lambda d: (views.get(d) not in ("PA", "AP"), views.get(d) != "PA", d)
        )  # frontal first
        if source.views == "frontal":
            dicoms = [d for d in dicoms if views.get(d) in ("PA", "AP")][:1]
            if not dicoms:
                continue  # a lateral view alone is not asked for
        images, report = [root / mimic_image(subject, study, d) for d in dicoms], None
        if "report" in source.tasks and texts is None:
            path = mimic_image(subject, study, "").parent.with_suffix(".txt")
            path = first_file(root, path, ["", "mimic-cxr-reports"])
            try:
                report = findings_section(path.read_text(encoding="utf-8", errors="replace"))
            except OSError as error:
                skip(f"{path}: {error.strerror} (nor is there mimic_cxr_sectioned.csv in {root})")
                continue
        elif texts is not None:
            report = texts.get(study, "")
        yield Study(
            study, f"mimic/{subject}", images, f"{table}, study {study}", report, labels.get(study)
        )


def fuse_boxes(readers, threshold=0.55):
    """Boxes of one finding by several readers, lists of (x1, y1, x2, y2), as one list: weighted box fusion (Solovyev et al.
    2021) with equal weights. Each box joins the fused box that it overlaps most, above the threshold; a fused box is the
    mean of its members."""
    clusters, fused = [], np.zeros((0, 4))
    for box in (b for boxes in readers for b in boxes):
        box = np.asarray(box, dtype=float)
        sides = np.minimum(fused[:, 2:], box[2:]) - np.maximum(fused[:, :2], box[:2])
        shared = sides.clip(0).prod(1)
        iou = shared / ((fused[:, 2:] - fused[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - shared)
        if len(iou) and iou.max() > threshold:
            clusters[iou.argmax()].append(box)
        else:
            clusters.append([box])
        fused = np.stack([np.mean(c, axis=0) for c in clusters])
    return [tuple(box) for box in fused.tolist()]


def read_vindr_cxr(source, split, skip):
    """VinDr-CXR from PhysioNet (annotations/annotations_{train,test}.csv) or Kaggle (train.csv), with the images as train/ID.png
    or .jpg. Boxes are pixels of the original, whose size is in train_meta.csv and test_meta.csv if the images were resized. Several
    readers' boxes of one finding are fused. PhysioNet's validation images, and Kaggle's splits, are chosen by `assigned`."""
    root = Path(source.path)
    official = bool(
        [*root.glob("annotations/annotations_train.csv"), *root.glob("annotations_train.csv")]
    )
    part = "test" if official and split == "test" else "train"
    path = locate(
        root,
        *(
            [f"annotations/annotations_{part}.csv", f"annotations_{part}.csv"]
            if official
            else ["annotations/annotations_train.csv", "train.csv"]
        ),
    )
    sizes, images = {}, {}  # image -> finding -> reader -> boxes
    if (meta := root / f"{part}_meta.csv").is_file():
        sizes = {
            row["image_id"]: (float(row["dim1"]), float(row["dim0"]))
            for row in read_csv(meta, ["image_id", "dim0", "dim1"], skip)
        }
    for row in read_csv(path, ["image_id", "class_name", "x_min", "y_min", "x_max", "y_max"], skip):
        findings = images.setdefault(row["image_id"], {})
        if row["class_name"].lower() != "no finding":
            try:
                box = [float(row[c]) for c in ("x_min", "y_min", "x_max", "y_max")]
            except ValueError:
                skip(f"{path}, image {row['image_id']}: {row['class_name']} without a box")
                continue
            reader = row.get("rad_id") or row.get("rad_ID") or ""
            findings.setdefault(row["class_name"], {}).setdefault(reader, []).append(box)
    splits = (
        dict.fromkeys(images, "test")
        if part == "test"
        else assigned(images, (0.1, 0.0) if official else (0.1, 0.2))
    )
    for image, findings in images.items():
        if splits[image] == split:
            where, folders = f"{path}, image {image}", (part, f"{part}_png", "images", "")
            file = next(
                (
                    f
                    for kind in ("png", "jpg")
                    if (f := first_file(root, f"{image}.{kind}", folders)).is_file()
                ),
                root / part / f"{image}.png",
            )
            if not file.is_file():
                skip(
                    f"{where}: {file} does not exist (DICOM files have to be converted to PNG first)"
                )
                continue
            width, height = sizes.get(image) or image_size(file)
            if any(
                b[2] > 1.01 * width or b[3] > 1.01 * height
                for readers in findings.values()
                for boxes in readers.values()
                for b in boxes
            ):
                raise InputError(
                    f"{where}: a box lies outside {file}, {width:.0f} x {height:.0f} pixels: were the images resized? Then {meta} must "
                    f"give the original sizes, in the columns image_id, dim0 (height), dim1 (width)"
                )
            boxes = {
                ("abnormality", name): fractions(fuse_boxes(readers.values()), width, height)
                for name, readers in findings.items()
            }
            yield Study(
                image,
                f"vindr/{image}",
                [file],
                where,
                findings=sorted(findings),
                boxes=boxes,
                complete=True,
            )


def read_ms_cxr(source, split, skip):
    """MS-CXR (MS_CXR_Local_Alignment_v1.*.csv): phrases and their boxes on images of MIMIC-CXR-JPG, which are below `images` or
    path/../mimic_cxr. v1.1 has a split; v1.0 takes that of MIMIC-CXR where it is there, else `assigned` patients."""
    root, images = Path(source.path), source.image_root()
    path = locate(root, "MS_CXR_Local_Alignment_v1*.csv")
    columns = [
        "dicom_id",
        "category_name",
        "label_text",
        "path",
        "x",
        "y",
        "w",
        "h",
        "image_width",
        "image_height",
    ]
    studies = {}
    for row in read_csv(path, columns, skip):
        where = f"{path}, image {row['dicom_id']}"
        try:
            x, y, w, h = (float(row[c]) for c in "xywh")
            box = fractions([(x, y, x + w, y + h)], row["image_width"], row["image_height"])[0]
            patient = "mimic/" + re.search(r"/p(\d{8})/", f"/{row['path']}")[1]
        except (ValueError, ZeroDivisionError, TypeError):
            skip(
                f"{where}: expected numbers in x, y, w, h, image_width, image_height, and a path with the patient, like files/p10/p10000032/..."
            )
            continue
        study = studies.setdefault(
            row["dicom_id"],
            (Study(row["dicom_id"], patient, [images / row["path"]], where), row.get("split")),
        )
        study[0].boxes.setdefault(("phrase", " ".join(row["label_text"].split())), []).append(box)
    splits = {
        study.id: {"validate": "val", "valid": "val"}.get(given, given)
        for study, given in studies.values()
    }
    if not all(splits.values()):
        if tables := sorted(images.glob("mimic-cxr-2*-split.csv*")):
            official = {
                row["dicom_id"]: row["split"].replace("validate", "val")
                for row in read_csv(tables[-1], ["dicom_id", "split"], skip)
            }
            splits = {i: official.get(i, "train") for i in splits}
        else:
            patients = assigned(study.patient for study, _ in studies.values())
            splits = {study.id: patients[study.patient] for study, _ in studies.values()}
    yield from (study for study, _ in studies.values() if splits[study.id] == split)


def read_padchest_gr(source, split, skip):
    """PadChest-GR (grounded_reports_*.json): a report of its English sentences, and the boxes of the abnormal ones. The split is
    that of master_table.csv; without the file, `assigned` studies, as only the table knows the patients."""
    root = Path(source.path)
    path, official, patients = locate(root, "grounded_reports*.json"), {}, {}
    if (root / "master_table.csv").is_file():  # a row per label
        for row in read_csv(root / "master_table.csv", ["ImageID", "split"], skip):
            official[row["ImageID"]] = row["split"].replace("validation", "val")
            patients[row["ImageID"]] = row.get("PatientID")
    rows = []
    for n, row in enumerate(read_json(path)):
        try:
            findings = [
                (
                    str(f["sentence_en"]),
                    bool(f["abnormal"]),
                    [tuple(map(float, b)) for b in f.get("boxes") or ()],
                )
                for f in row["findings"]
            ]
            image = str(row["ImageID"])
            rows.append(
                (
                    image,
                    f"padchest/{patients.get(image) or image.split('_')[0]}",
                    findings,
                    f"{path}, [{n}]",
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            skip(f"{path}, [{n}]: expected an object with ImageID and findings ({error!r})")
    splits = official or assigned(patient for _, patient, *_ in rows)
    for image, patient, findings, where in rows:
        if splits.get(image if official else patient) == split:
            file = first_file(
                root, image, ("PadChest_GR", "images_grounding", "Padchest_GR_files", "images", "")
            )
            boxes = {}
            for sentence, abnormal, found in findings:
                if abnormal and found:
                    boxes.setdefault(("phrase", sentence.rstrip(". ")), []).extend(
                        fractions(found, 1, 1)
                    )
            report = " ".join(s.rstrip(". ") + "." for s, *_ in findings if s.strip())
            yield Study(
                image,
                patient,
                [file],
                where,
                report,
                boxes=boxes,
                complete=all(found for _, abnormal, found in findings if abnormal),
            )


def read_chest_imagenome(source, split, skip):
    """Chest ImaGenome (silver_dataset/splits/*.csv, silver_dataset/scene_graph/ID_SceneGraph.json): boxes of anatomical regions on
    images of MIMIC-CXR-JPG, which are, with their metadata CSV, below `images` or path/../mimic_cxr."""
    root, images = Path(source.path), source.image_root()
    table = locate(root, f"silver_dataset/splits/{ {'val': 'valid'}.get(split, split) }.csv")
    sizes = {
        row["dicom_id"]: (row["Columns"], row["Rows"])
        for row in read_csv(
            locate(images, "mimic-cxr-2*-metadata.csv"), ["dicom_id", "Rows", "Columns"], skip
        )
    }
    for row in read_csv(table, ["subject_id", "study_id", "dicom_id"], skip):
        dicom, path = (
            row["dicom_id"],
            root / "silver_dataset" / "scene_graph" / f"{row['dicom_id']}_SceneGraph.json",
        )
        if not path.is_file():  # the dataset itself lacks some
            continue
        try:
            boxes = {
                ("anatomy", o["bbox_name"]): fractions(
                    [[o[f"original_{c}"] for c in ("x1", "y1", "x2", "y2")]], *sizes[dicom]
                )
                for o in read_json(path)["objects"]
            }
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            skip(
                f"{path}: expected objects with bbox_name and original_x1 .. original_y2, and the image's size in the metadata ({error!r})"
            )
            continue
        file = images / mimic_image(row["subject_id"], row["study_id"], dicom)
        yield Study(dicom, f"mimic/{row['subject_id']}", [file], str(path), boxes=boxes)


NIH_NAMES = {"Infiltrate": "Infiltration", "Pleural_Thickening": "Pleural thickening"}


def read_nih(source, split, skip):
    """NIH ChestX-ray14: Data_Entry_2017*.csv (labels), BBox_List_2017.csv (boxes in a frame of 1024 x 1024), images*/. The split is
    that of train_val_list.txt and test_list.txt (all boxes are on test images); without these, `assigned` patients."""
    root = Path(source.path)
    path, labels, boxes = locate(root, "BBox_List_2017.csv"), {}, {}
    try:
        rows = [*csv.reader(path.read_text(encoding="utf-8-sig").splitlines())][
            1:
        ]  # a header that splits into other cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a valid CSV file ({error})") from None
    for n, (image, name, *cells) in enumerate((row for row in rows if len(row) > 1), 2):
        try:
            x, y, w, h = map(float, cells[:4])
        except ValueError:
            skip(f"{path}, line {n}: expected four numbers")
            continue
        boxes.setdefault(image, {}).setdefault(
            ("abnormality", NIH_NAMES.get(name, name)), []
        ).extend(fractions([(x, y, x + w, y + h)], 1024, 1024))
    for table in root.glob("Data_Entry*.csv"):
        for row in read_csv(table, ["Image Index", "Finding Labels"], skip):
            labels[row["Image Index"]] = [
                NIH_NAMES.get(n, n) for n in row["Finding Labels"].split("|") if n != "No Finding"
            ]
    images = sorted({*labels, *boxes} if "classification" in source.tasks else boxes)
    held = (root / "train_val_list.txt").is_file() or (root / "test_list.txt").is_file()
    patients = assigned(
        {i.split("_")[0] for i in {*labels, *boxes}}, (0.1, 0.0) if held else (0.1, 0.2)
    )
    test = set(locate(root, "test_list.txt").read_text().split()) if held else set()
    folders = ["images", "", *sorted(p.relative_to(root) for p in root.glob("images_*/images"))]
    for image in images:
        if ("test" if image in test else patients[image.split("_")[0]]) == split:
            yield Study(
                image,
                f"nih/{image.split('_')[0]}",
                [first_file(root, image, folders)],
                f"{path.parent}, image {image}",
                findings=labels.get(image),
                boxes=boxes.get(image, {}),
            )


def read_coco(source, split, skip):
    """Boxes in COCO's format: SPLIT.json, instances_SPLIT*.json or *_SPLIT.json; one file alone is split by `assigned`. Images without
    an annotation count as normal."""
    root, images = Path(source.path), source.image_root()
    files = {*root.glob("*.json"), *root.glob("annotations/*.json")}
    path = (
        next(iter(files))
        if len(files) == 1
        else locate(
            root,
            *(
                f"{a}{b}"
                for b in (f"{split}.json", f"instances_{split}*.json", f"*_{split}.json")
                for a in ("", "annotations/")
            ),
        )
    )
    tree, studies, part = read_json(path), {}, path.stem.removeprefix("instances_")
    folders = ("", "images", part, f"images/{part}", split, f"images/{split}")
    try:
        names = {c["id"]: str(c["name"]) for c in tree["categories"]}
        for row in tree["images"]:
            file = next(
                (
                    f
                    for name in (row["file_name"], Path(row["file_name"]).name)
                    if (f := first_file(images, name, folders)).is_file()
                ),
                images / row["file_name"],
            )
            studies[row["id"]] = Study(
                str(row["file_name"]),
                patient_of(row["file_name"], root),
                [file],
                f"{path}, image {row['id']}",
                complete=True,
            )
        sizes = {row["id"]: (row["width"], row["height"]) for row in tree["images"]}
        for row in tree["annotations"]:
            x, y, w, h = map(float, row["bbox"])
            name = (
                re.sub(r"(?<=[a-z])(?=[A-Z])", " ", names[row["category_id"]])
                .replace("_", " ")
                .lower()
            )
            studies[row["image_id"]].boxes.setdefault(("abnormality", name), []).extend(
                fractions([(x, y, x + w, y + h)], *sizes[row["image_id"]])
            )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{path}: not in COCO's format, images with id, file_name, width, height and annotations with image_id, "
            f"category_id, bbox ({error!r})"
        ) from None
    splits = assigned(study.patient for study in studies.values()) if len(files) == 1 else {}
    for study in studies.values():
        if splits.get(study.patient, split) == split:
            study.findings = sorted({name for _, name in study.boxes})
            yield study


BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([r"([01](?:\.\d+)?|\.\d+)"] * 4) + r"\s*\]")


def read_llava(source, split, skip):
    """Conversations in LLaVA's format, as RadVLM's tools write them: SPLIT.json, or one *.json that is split by `assigned` patients.
    Texts are kept as they are; each turn is an example, with the turns before it as its history. A turn whose answer has
    boxes is grounding, one that asks for a report or findings is a report, the others are for SFT alone."""
    root, images = Path(source.path), source.image_root()
    files = [*root.glob("*.json")]
    path = files[0] if len(files) == 1 else locate(root, f"{split}.json", f"*{split}*.json")
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of conversations")
    conversations = []
    for n, row in enumerate(rows):
        try:
            turns = [(str(t["from"]), str(t["value"])) for t in row["conversations"]]
            names, kinds = (
                [row["image"]] if isinstance(row["image"], str) else [str(i) for i in row["image"]],
                [kind for kind, _ in turns],
            )
            if kinds != ["human", "gpt"] * (len(kinds) // 2) or not turns:
                raise ValueError("turns of human and gpt in turn")
            conversations.append(
                (
                    n,
                    row.get("id", n),
                    names,
                    patient_of(names[0], root),
                    [text for _, text in turns],
                )
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            skip(
                f"{path}, [{n}]: expected an object with image and conversations of human and gpt ({error!r})"
            )
    splits = assigned(patient for *_, patient, _ in conversations) if len(files) == 1 else {}
    for n, name, names, patient, turns in conversations:
        if splits.get(patient, split) != split:
            continue
        history, pictures = (), tuple(str(first_file(images, i, ("", "images"))) for i in names)
        if problem := image_problem(pictures, images):
            skip(f"{path}, [{n}]: {problem}")
            continue
        for k, (question, answer) in enumerate(zip(turns[::2], turns[1::2])):
            question = question.replace("<image>", "").strip()
            boxes = tuple(tuple(map(float, b)) for b in BOX.findall(answer))
            asks = re.match(
                r"(?i)(?!is|are|does|do|can|could)\b.*\b(report|findings)\b", question
            )  # a yes or no is no report
            task = "grounding" if boxes else "report" if asks else "classification"
            yield Example(
                f"{name}-{k}",
                task,
                pictures,
                question,
                answer,
                boxes=boxes,
                history=history,
                patient=patient,
                label=question if boxes else "",
                kind="phrase" if boxes else "",
            )
            history += ((question, answer),)


def read_jsonl(source, split, skip):
    """Your own data: SPLIT.jsonl, one JSON object a line.

    {"id", "images": [paths from the folder], "report": text} is a report example;
    {"id", "images", "phrase": text, "boxes": [[x1, y1, x2, y2], ...]} (fractions of the image) a grounding example.
    Optional: "question", "thinking", "patient".
    """
    root, path = Path(source.path), Path(source.path) / f"{split}.jsonl"
    try:
        lines = (
            path.read_text(encoding="utf-8").rstrip().split("\n")
        )  # JSON may hold other line separators as text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot read ({getattr(error, 'strerror', 0) or error})"
        ) from None
    for n, line in enumerate(lines, 1):
        where = f"{path}, line {n}"
        try:
            row = json.loads(line)
            if not isinstance(row["images"], list):
                raise ValueError("images: expected a list of paths")
            study = Study(
                str(row["id"]),
                f"{root}/{row['patient']}" if row.get("patient") else "",
                [source.image_root() / image for image in row["images"]],
                where,
                thinking=str(row.get("thinking", "")),
            )
            if ("report" in row) == ("phrase" in row):
                raise ValueError(
                    "report and phrase are two examples, with an id each"
                    if "report" in row
                    else f"neither report nor phrase in {', '.join(row)}"
                )
            if "report" in row:
                study.report = row["report"] if isinstance(row["report"], str) else ""
            else:
                study.boxes = {
                    ("phrase", str(row["phrase"])): [
                        tuple(float(v) for v in box) for box in row["boxes"]
                    ]
                }
        except json.JSONDecodeError as error:
            skip(f"{where}: not valid JSON ({error})")
            continue
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            skip(
                f"{where}: expected an object with id, images and report, or phrase and boxes [[x1, y1, x2, y2], ..] "
                f"({error if isinstance(error, ValueError) else repr(error)})"
            )
            continue
        for example in study_examples(study, source, split, 0, skip):
            answer = boxes_text(example.boxes) if example.kind else example.answer
            yield dataclasses.replace(
                example,
                id=study.id,
                question=str(row.get("question") or example.question),
                answer=answer,
            )


SPLIT_START = {
    "train": 0,
    "val": 10_000_000,
    "test": 20_000_000,
}  # phantom indices: disjoint by construction


def read_phantoms(config, split):
    """Two sets of phantoms, as in the papers: studies as they come, with a report, and studies chosen because something
    is to be seen, with the list of their findings and a grounding question about each of them (now and then about
    one that is not there). In training the chosen ones have a report too."""

    def example(study, name, task, question, answer, **more):
        return Example(
            id=f"{study.index}{name}",
            task=task,
            images=(study,),
            question=question,
            answer=answer,
            patient=str(study.index),
            **more,
        )

    size = getattr(config.data, f"{split}_size")
    studies = (phantom(config.seed, index) for index in itertools.count(SPLIT_START[split]))
    chosen = (
        phantom(config.seed, index) for index in itertools.count(SPLIT_START[split] + 5_000_000)
    )
    chosen = (s for s in chosen if s.boxes.keys() & RARE or s.boxes and s.index % 3 == 0)
    for study in itertools.islice(studies, size):
        yield example(
            study, "", "report", QUESTIONS["report"][0], study.report, thinking=study.thinking
        )
    for study in itertools.islice(chosen, size):
        yield example(
            study, "-list", "classification", QUESTIONS["classification"][0], finding_list(study)
        )
        if split == "train":  # held-out reports keep the natural prevalence
            yield example(
                study, "", "report", QUESTIONS["report"][0], study.report, thinking=study.thinking
            )
        rng = np.random.default_rng([config.seed, study.index, 7])
        absent = [label for label in PHANTOM_LABELS if label not in study.boxes]
        for label in [*study.boxes, *([str(rng.choice(absent))] if rng.random() < 0.4 else [])]:
            boxes = tuple(
                tuple(round(float(v), 2) for v in box) for box in study.boxes.get(label, ())
            )
            yield example(
                study,
                f"-{label}",
                "grounding",
                grounding_questions(label, rng),
                boxes_text(boxes),
                thinking=grounding_thinking(study, label),
                boxes=boxes,
                label=label,
                kind="abnormality",
            )


def finding_list(study):
    names = [QUESTION_NAMES[label] for label in PHANTOM_LABELS if label in study.boxes]
    return (", ".join(names) or "none") + "."


def grounding_thinking(study, label):
    """A one-line trace for a grounding question."""
    sides = [f.side for f in study.findings if f.label == label]
    seen = {"": "It is there", "both": "It is there on both sides"}
    return (
        f"Looking for {QUESTION_NAMES[label]}. "
        + (seen.get(sides[0], f"It is there on the {sides[0]}") if sides else "It is not there")
        + "."
    )


def phantom_corpus(studies=2000):
    """Texts of the first training phantoms of seed 0: what the built-in tokenizer is trained on."""
    config = Config()
    config.data.train_size = studies // 2
    examples = list(read_phantoms(config, "train"))
    return [text for e in examples for text in (e.question, e.answer, e.thinking)]


# name: the reader, a generator of Study or Example for (source, split, skip)
READERS = {
    "phantom": read_phantoms,
    "iu_xray": read_iu_xray,
    "mimic_cxr": read_mimic_cxr,
    "vindr_cxr": read_vindr_cxr,
    "ms_cxr": read_ms_cxr,
    "padchest_gr": read_padchest_gr,
    "chest_imagenome": read_chest_imagenome,
    "nih": read_nih,
    "coco": read_coco,
    "llava": read_llava,
    "jsonl": read_jsonl,
}


# ---------------------------------------------------------------------------------------------- from studies to examples

QUESTIONS = {
    "report": (
        "Write the findings of this chest X-ray.",
        "Describe what this chest X-ray shows.",
        "Write a radiology report for this study.",
        "What are the findings in this chest X-ray?",
        "Report this chest radiograph.",
        "Give the findings section for this examination.",
        "Read this chest X-ray and write down your findings.",
        "Compose the findings of the report for these images.",
    ),
    "classification": (
        "List the findings.",
        "Which abnormalities are present?",
        "Name the abnormal findings in this chest X-ray.",
        "What is abnormal here?",
        "Which findings does this radiograph show?",
        "Enumerate the abnormalities, if any.",
    ),
    "abnormality": (
        "Where is the {}? Give its boxes.",
        "Locate the {} in the image.",
        "Give the boxes of the {}.",
        "Mark the {} with boxes.",
        "Find the {} and answer with its boxes.",
        "Which regions show the {}? Answer with boxes.",
    ),
    "anatomy": (
        "Where is the {}? Give its box.",
        "Locate the {} in the image.",
        "Give the box of the {}.",
        "Outline the {} with a box.",
        "Which region of the image is the {}? Answer with a box.",
        "Mark the {} with a box.",
    ),
    "phrase": (
        "Where is {}? Answer with boxes.",
        "Locate this finding and answer with boxes: {}",
        "Which region does this describe? Answer with boxes: {}",
        "Give the boxes for: {}",
        "Find where this is seen and give the boxes: {}",
        "Mark with boxes: {}",
    ),
    "detection": (
        "Where are abnormalities? Name each and give its boxes.",
        "Detect all abnormalities and give their boxes.",
        "Name and locate every abnormal finding with boxes.",
        "List the abnormal findings with their boxes.",
        "Mark everything abnormal: names and boxes.",
        "Find the abnormalities and give names and boxes.",
    ),
}
ANSWERS = (
    "{}",
    "It is at {}.",
    "The box is {}.",
    "{} in the image.",
)  # of one region, around its boxes
TASK_OF = {
    "report": "report",
    "classification": "classification",
    "grounding": "grounding",
    **dict.fromkeys(("abnormality", "anatomy", "phrase", "detection"), "grounding"),
}  # what data.tasks may name


def image_problem(images, root):
    """Why these images cannot be used, or ""."""
    root = os.path.abspath(root)
    for image in images:
        if not os.path.abspath(image).startswith(os.path.join(root, "")):
            return f"image {image} lies outside {root}"
        if not os.path.isfile(image):
            return f"image {image} does not exist"
    return "" if images else "the study has no image"


def study_examples(study, source, split, seed, skip):
    """The questions that source.tasks ask about a study. Training wordings vary, by seed and id; held-out ones are the first."""
    rng = np.random.default_rng([seed, int(hashlib.sha1(study.id.encode()).hexdigest()[:12], 16)])

    def wording(choices):
        return _pick(rng, choices) if split == "train" else choices[0]

    def asked(kind):
        return kind in source.tasks or TASK_OF[kind] in source.tasks

    def example(kind, suffix, answer, phrase="", **more):
        return Example(
            study.id + suffix,
            TASK_OF[kind],
            tuple(map(str, study.images)),
            wording(QUESTIONS[kind]).format(phrase),
            answer,
            patient=study.patient,
            kind=kind if TASK_OF[kind] == "grounding" else "",
            **more,
        )

    regions = {(kind, name): boxes for (kind, name), boxes in study.boxes.items() if asked(kind)}
    if anatomy := [
        key for key in regions if key[0] == "anatomy"
    ]:  # every image has dozens: one of them, as in RadVLM
        chosen = anatomy[int(rng.random() * len(anatomy))]
        regions = {
            key: boxes for key, boxes in regions.items() if key == chosen or key[0] != "anatomy"
        }
    detection = study.complete and asked("detection")
    reports, lists = (
        study.report is not None and asked("report"),
        study.findings is not None and asked("classification"),
    )
    if not (reports or lists or regions or detection):
        return
    if problem := image_problem(study.images, source.image_root()):
        skip(f"{study.where}: {problem}")
        return
    report = " ".join((study.report or "").split())
    if reports and not report:
        skip(f"{study.where}: the report is empty")
    elif reports:
        yield example("report", "", report, thinking=study.thinking)
    if lists:
        yield example(
            "classification",
            "-list",
            (", ".join(name.lower() for name in study.findings) or "none") + ".",
        )
    bad = [
        b
        for boxes in (study.boxes if detection else regions).values()
        for b in boxes
        if len(b) != 4 or not (0 <= b[0] < b[2] <= 1 and 0 <= b[1] < b[3] <= 1)
    ]
    if bad:
        skip(
            f"{study.where}: box {list(bad[0])} is not x1 < x2, y1 < y2 inside the image (fractions from 0 to 1)"
        )
        return
    for (kind, name), boxes in regions.items():
        phrase = name if kind == "phrase" else name.lower()
        text = (wording(ANSWERS) if boxes else "{}").format(boxes_text(boxes))
        yield example(
            kind, f"-{name}", text, phrase, boxes=tuple(boxes), label=name, thinking=study.thinking
        )
    if detection:
        found = [(name, boxes) for (_, name), boxes in study.boxes.items() if boxes]
        text = (
            "; ".join(f"{name} {boxes_text(boxes)}" for name, boxes in found) + "."
            if found
            else NOTHING_THERE
        )
        yield example(
            "detection",
            "-detect",
            text,
            boxes=tuple(b for _, boxes in found for b in boxes),
            label="abnormalities",
        )


def sources(config, split):
    """The datasets of a split: the entries of data.train, data.val or data.test, or the one that the section itself names. What
    an entry leaves out, the section gives; its path is relative to data.path."""
    d = config.data
    entries = getattr(d, split) or d.train
    if not entries:
        return [Source(d.source, d.path, d.images, d.tasks, d.views)]
    return [
        dataclasses.replace(
            e,
            path=os.path.join(d.path, e.path or e.source),
            tasks=e.tasks or d.tasks,
            views=e.views or d.views,
            images=os.path.join(d.path, e.images or d.images) if e.images or d.images else "",
        )
        for e in entries
    ]


def read_source(config, source, split, skip):
    """All examples of one source, in the plain output format."""
    if source.source == "phantom":
        found = read_phantoms(config, split)
    else:
        if not source.path or not Path(source.path).is_dir():
            raise InputError(
                f"data.path={source.path!r}: no such folder; set it to the {source.source} dataset"
            )
        found = READERS[source.source](source, split, skip)
    found = tqdm(
        itertools.islice(found, source.limit or None),
        f"{source.source} {split}",
        unit="",
        delay=5,
        leave=False,
        disable=rank() != 0,
    )
    found = (
        e
        for f in found
        for e in (
            [f] if isinstance(f, Example) else study_examples(f, source, split, config.seed, skip)
        )
    )
    examples = {}
    for e in found:
        if e.id in examples:
            skip(f"{source.path}, {split}: a second example has the id {e.id!r}")
        elif e.task in source.tasks or e.kind in source.tasks:
            examples[e.id] = e
    return [*examples.values()]


def read_split(config, split):
    """[(source, its examples, what could not be used)]. data.on_error=stop raises InputError for the first of the latter."""
    parts = []
    for source in sources(config, split):
        problems = []

        def skip(message):
            if config.data.on_error == "stop":
                raise InputError(f"{message} (data.on_error=skip leaves such examples out)")
            problems.append(message)

        parts.append((source, read_source(config, source, split, skip), problems))
    return parts


def plain_words(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def without_leaks(config, parts):
    """Training parts without the patients of val and test, and, with data.dedup, without reports that repeat one of theirs word for
    word. Returns (parts, what to say about it). Phantoms of different splits are different by construction."""
    if all(source.source == "phantom" for source, *_ in parts):
        return parts, ""
    held = [
        e
        for split in ("val", "test")
        for source, part, _ in read_split(config, split)
        if source.source != "phantom"
        for e in part
    ]
    patients, reports = (
        {e.patient for e in held} - {""},
        {plain_words(e.answer) for e in held if e.task == "report"},
    )
    leaks = {e for _, part, _ in parts for e in part if e.patient in patients}
    texts = [e for _, part, _ in parts for e in part if e.task == "report" and e not in leaks]
    copies = {e for e in texts if plain_words(e.answer) in reports}
    out = leaks | copies if config.data.dedup else leaks
    kept = [
        (source, [e for e in part if e not in out], problems) for source, part, problems in parts
    ]
    if leaks and not any(part for _, part, _ in kept):
        return (
            parts,
            "all patients are held out, too: kept, but what is measured on the held-out splits means nothing",
        )
    said = (
        [
            f"left out {len(leaks)} examples of {len({e.patient for e in leaks})} patients that are held out, too, such as {min(e.patient for e in leaks)}"
        ]
        if leaks
        else []
    )
    if copies:
        said.append(
            f"{len(copies)} of {len(texts)} reports ({len(copies) / len(texts):.0%}) repeat a held-out report word for word, and "
            + ("are left out" if config.data.dedup else "stay (data.dedup=true leaves them out)")
        )
    return kept, "; ".join(said)


def repeated(examples, weight, seed):
    """Every study `weight` times, a fraction being a random part of the studies. Copies have ids, and so samples, of their own."""
    groups = by_study(examples)
    order = np.random.default_rng([seed, 13]).permutation(len(groups))
    return [
        dataclasses.replace(e, id=f"{e.id}#{copy}", copy=copy) if copy else e
        for copy in range(math.ceil(weight))
        for i in sorted(order[: round(min(1, weight - copy) * len(groups))])
        for e in groups[i]
    ]


def load_split(config, split):
    """All examples of `split` ("train", "val", "test") for the configured tasks, in the configured output format. Training
    examples come as often as the weight of their source says, and never from held-out patients.

    With data.on_error=skip, examples that cannot be used are left out, counted and reported; otherwise the first one
    raises InputError.
    """
    parts, said = read_split(config, split), []
    said += [
        f"{source.source}: skipped {len(problems)} examples, the first: {problems[0]}"
        for source, _, problems in parts
        if problems
    ]
    if split == "train":
        parts, leaks = without_leaks(config, parts)
        said += [leaks] * bool(leaks)
    examples = []
    for n, (source, part, _) in enumerate(parts):
        if not part and split == "train":
            raise InputError(
                f"data.path={source.path!r}: no usable example of {source.source} in split {split!r}"
                + "".join(f"; {text}" for text in said)
            )
        part = with_traces(config, split, part, said)
        if split == "train":
            part = repeated(part, source.weight, config.seed)
        names = [
            os.path.basename(os.path.normpath(source.path)) or source.source for source, *_ in parts
        ]
        name = (
            names[n] if names.count(names[n]) == 1 else f"{names[n]}.{n}"
        )  # ids are unique in a mixture, too
        examples += [
            dataclasses.replace(
                e, id=f"{name}/{e.id}" if len(parts) > 1 else e.id, style=style_of(config)
            )
            for e in part
        ]
    if rank() == 0:
        for text in said:
            print(f"{split}: {text}", file=sys.stderr)
    if not examples:
        raise InputError(f"data.path={config.data.path!r}: no usable example in split {split!r}")
    return examples


# ---------------------------------------------------------------------------------------------- thinking traces

# Regions in the order of a systematic reading; a sentence belongs to the one whose words it has first in the second column.
REGIONS = (
    ("Devices", r"tube|catheter|line tip|\bpicc|\bport\b|pacemaker|lead|wire|clip|stent|valve"),
    ("Pleura", r"pleura|effusion|pneumothora|costophrenic"),
    ("Bones", r"bon[ey]|rib|osseous|spin|skelet|fracture|vertebra|clavic|degenerat"),
    ("Heart", r"heart|cardi"),
    ("Mediastinum", r"mediastin|aort|hil[aiu]|trache"),
    (
        "Lungs",
        r"lung|pulmon|opaci|consolid|atelect|edema|airspace|nodul|mass|pneumonia|interstit|vascul|lobe|basilar",
    ),
)
READING_ORDER = ("Heart", "Mediastinum", "Lungs", "Pleura", "Bones", "Devices")


def systematic_reading(report):
    """A trace for a cold start out of the reference report: its sentences region by region, then the rest."""
    said = {region: [] for region in (*READING_ORDER, "Other")}
    for sentence in re.split(r"(?<=[.!?])\s+", report.strip()):
        said[
            next((region for region, words in REGIONS if re.search(words, sentence, re.I)), "Other")
        ].append(sentence)
    return " ".join(
        f"{region}: {' '.join(sentences) or 'not described.'}"
        for region, sentences in said.items()
        if sentences or region != "Other"
    )


def looking_for(label, boxes):
    """A one-line trace for a grounding question. The left of the patient is on the right of the image."""
    sides = {"right" if box[0] + box[2] < 1 else "left" for box in boxes}
    where = (
        "It is not there."
        if not boxes
        else "It is there on both sides."
        if len(sides) > 1
        else f"It is there on the {sides.pop()}."
    )
    return f"Looking for {label}. {where}"


def texts_by_id(path, key):
    """{id: text} of a file of JSON lines with `id` and `key`."""
    texts = {}
    try:
        for n, line in enumerate(Path(path).read_text(encoding="utf-8").rstrip().split("\n"), 1):
            row = json.loads(line)
            if not isinstance(row[key], str):
                raise ValueError(f"{key}: expected text, got {row[key]!r}")
            texts[str(row["id"])] = row[key]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot read ({getattr(error, 'strerror', 0) or error})"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}, line {n}: expected an object with id and {key} ({error!r})"
        ) from None
    return texts


def with_traces(config, split, examples, said):
    """Examples with thinking: in training from data.traces where it is given, else their own, else made from report and boxes."""
    if not config.data.thinking:
        return examples
    if not config.data.traces or split != "train":
        made = {
            "report": lambda e: systematic_reading(e.answer),
            "grounding": lambda e: looking_for(e.label, e.boxes),
        }
        return [
            e
            if e.thinking or e.task not in made
            else dataclasses.replace(e, thinking=made[e.task](e))
            for e in examples
        ]
    traces = texts_by_id(config.data.traces, "thinking")
    said.append(
        f"{sum(e.id in traces for e in examples)} of {len(examples)} examples have a trace in {config.data.traces}"
    )
    return [dataclasses.replace(e, thinking=traces.get(e.id, "")) for e in examples]


# ---------------------------------------------------------------------------------------------- data order

STREAMS = {
    "sft": 0,
    "more": 1,
    "cold_start": 2,
    "grpo": 3,
}  # every stage reads the data in its own order


@lru_cache(maxsize=8)
def shuffled(n, seed, stream, epoch):
    return np.random.default_rng([seed, stream, epoch]).permutation(n)


def indices(n, count, step, seed, stream):
    """Indices of the `count` examples of step `step` out of n: consecutive slices of endless shuffled epochs."""
    places = range(step * count, (step + 1) * count)
    return [int(shuffled(n, seed, STREAMS[stream], p // n)[p % n]) for p in places]


def by_study(examples):
    """Examples grouped by their images: lists of questions about the same study."""
    groups = {}
    for example in examples:
        groups.setdefault((example.images, example.copy), []).append(example)
    return list(groups.values())


def grpo_batch(examples, step, config):
    """The examples of one GRPO step: data.report_share of them reports, the rest grounding.

    All are of one task if the data have only one. A function of its arguments alone, so that a run
    can resume.
    """
    count, seed = config.grpo.prompts, config.seed
    reports = [e for e in examples if e.task == "report"]
    boxes = [e for e in examples if e.task == "grounding"]
    n_reports = round(count * config.data.report_share) if boxes else count
    if not reports:
        n_reports = 0

    chosen = []
    for pool, size in ((reports, n_reports), (boxes, count - n_reports)):
        if size:
            chosen += [pool[i] for i in indices(len(pool), size, step, seed, "grpo")]
    order = np.random.default_rng([seed, STREAMS["grpo"], step, 1]).permutation(count)
    return [chosen[i] for i in order]


def check_tasks(config):
    """Raises InputError if there is nothing that GRPO can train on."""
    tasks = {task for source in sources(config, "train") for task in source.tasks}
    if not {"report", "grounding"} & {TASK_OF[task] for task in tasks}:
        raise InputError(f"data.tasks={sorted(tasks)}: GRPO needs report or grounding examples")


# ---------------------------------------------------------------------------------------------- phantoms

PHANTOM_LABELS = (
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
RARE = {
    "Enlarged Cardiomediastinum",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Pneumothorax",
    "Pleural Other",
    "Fracture",
}
# Half of the studies are normal; the others draw one clinical picture, so findings co-occur: (cumulative, P(label)).
PICTURES = (
    (
        0.100,
        {
            "Cardiomegaly": 0.85,
            "Edema": 0.50,
            "Pleural Effusion": 0.50,
            "Support Devices": 0.25,
            "Atelectasis": 0.15,
        },
    ),
    (
        0.185,
        {
            "Pneumonia": 0.55,
            "Consolidation": 0.40,
            "Lung Opacity": 0.50,
            "Pleural Effusion": 0.20,
            "Atelectasis": 0.06,
        },
    ),
    (
        0.260,
        {
            "Atelectasis": 0.90,
            "Pleural Effusion": 0.30,
            "Support Devices": 0.25,
            "Lung Opacity": 0.12,
        },
    ),
    (
        0.300,
        {"Fracture": 0.55, "Pneumothorax": 0.50, "Pleural Effusion": 0.15, "Support Devices": 0.30},
    ),
    (
        0.345,
        {
            "Lung Lesion": 0.95,
            "Enlarged Cardiomediastinum": 0.12,
            "Lung Opacity": 0.10,
            "Pleural Effusion": 0.08,
        },
    ),
    (0.400, {"Cardiomegaly": 0.85, "Enlarged Cardiomediastinum": 0.15, "Support Devices": 0.15}),
    (
        0.435,
        {
            "Enlarged Cardiomediastinum": 0.65,
            "Support Devices": 0.30,
            "Edema": 0.12,
            "Pneumothorax": 0.06,
        },
    ),
    (0.490, {"Pleural Other": 0.50, "Lung Opacity": 0.60, "Lung Lesion": 0.05}),
    (1.00, {"Support Devices": 0.06}),
)
# label: (region, noun phrases, or whole sentences where they end in a full stop), in the order of placing.
WORDINGS = {
    "Cardiomegaly": ("heart", "{degree} cardiomegaly|the heart is {degree}ly enlarged."),
    "Enlarged Cardiomediastinum": (
        "mediastinum",
        "widening of the mediastinum|the mediastinum is widened.",
    ),
    "Pleural Effusion": ("pleura", "{a}{size} {side} pleural effusion{s}"),
    "Pneumothorax": ("pleura", "a {size} {side} pneumothorax"),
    "Atelectasis": (
        "lungs",
        "linear {side} basilar atelectasis|atelectasis at the {side} lung base{s}",
    ),
    "Edema": (
        "lungs",
        "{degree} pulmonary edema|findings are consistent with {degree} pulmonary edema.",
    ),
    "Consolidation": (
        "lungs",
        "consolidation in the {side} {zone}|dense {side} {zone} consolidation",
    ),
    "Pneumonia": (
        "lungs",
        "patchy {side} {zone} pneumonia|findings are consistent with {side} {zone} pneumonia.",
    ),
    "Lung Opacity": ("lungs", "a hazy opacity in the {side} {zone}|a hazy {side} {zone} opacity"),
    "Lung Lesion": ("lungs", "{what} in the {side} {zone}"),
    "Pleural Other": ("pleura", "{side} {what}|{what} on the {side}"),
    "Fracture": ("bones", "{a}displaced {side} rib fracture{s}|{a}{side} rib fracture{s}"),
    "Support Devices": ("devices", "{what}|{what} is in place."),
}
LUNGS = tuple(label for label, (region, _) in WORDINGS.items() if region == "lungs")
CERTAIN = ("there {be} {phrase}.", "{phrase} {be} present.", "{phrase} {be} seen.")
HEDGED = ("possible {bare}.", "there may be {phrase}.")
DENIED = ("no {}.", "there is no {}.", "no evidence of {}.")
# (probability, region, labels, whether it denies them, wording), used when all are absent and none is denied yet.
NORMALS = (
    (
        0.20,
        "heart",
        ("Cardiomegaly", "Enlarged Cardiomediastinum"),
        True,
        "the cardiomediastinal silhouette is normal.",
    ),
    (0.90, "heart", ("Cardiomegaly",), True, "heart size is normal.|the heart is normal in size."),
    (
        0.75,
        "mediastinum",
        ("Enlarged Cardiomediastinum",),
        True,
        "the mediastinal contours are normal.|mediastinal contours are unremarkable.",
    ),
    (
        0.90,
        "lungs",
        LUNGS,
        False,
        "the lungs are clear.|lungs are clear bilaterally.|both lungs are clear.",
    ),
    (0.30, "lungs", ("Edema", "Cardiomegaly"), False, "pulmonary vascularity is normal."),
    (
        0.25,
        "pleura",
        ("Consolidation", "Pleural Effusion", "Pneumothorax"),
        True,
        "focal consolidation, pleural effusion, or pneumothorax",
    ),
    (
        0.80,
        "pleura",
        ("Pleural Effusion", "Pneumothorax"),
        True,
        "pleural effusion or pneumothorax",
    ),
    (0.35, "lungs", ("Consolidation",), True, "focal consolidation"),
    (0.10, "lungs", ("Pneumonia",), True, "pneumonia"),
    (0.15, "lungs", ("Edema",), True, "pulmonary edema"),
    (0.70, "pleura", ("Pneumothorax",), True, "pneumothorax"),
    (0.60, "pleura", ("Pleural Effusion",), True, "pleural effusion"),
    (0.10, "bones", ("Fracture",), True, "rib fracture"),
    (
        0.55,
        "bones",
        ("Fracture",),
        False,
        "the bones are intact.|osseous structures are unremarkable.",
    ),
)
ARTICLE, SUMMARY = re.compile("^an? "), "no acute cardiopulmonary abnormality"
ORDERS = ("heart mediastinum lungs pleura bones devices",) * 8 + (
    "lungs pleura heart mediastinum bones devices",
    "devices heart mediastinum lungs pleura bones",
)
SIZES, DEGREES = ("small", "moderate", "large"), ("mild", "moderate", "severe")
ZONES = {"upper lobe": -0.21, "mid lung": -0.03, "lower lobe": 0.13}  # heights of their centres
SIDES = {
    "Pleural Effusion": ("right", "left", "both"),
    "Atelectasis": ("right", "left", "both"),
    "Edema": ("both",),
    "Pneumothorax": ("right", "left"),
    "Pleural Other": ("right", "left"),
    "Fracture": ("right", "left"),
}
PLEURA = {
    "apical pleural thickening": (-0.5, -0.27),
    "lateral pleural thickening": (-0.16, 0.14),
    "pleural plaque": (-0.02, 0.12),
}
TUBES = {
    "a pacemaker": ((0.30, -0.24), (0.16, -0.30), (0.01, -0.20), (-0.03, 0.05), (0.08, 0.17)),
    "an endotracheal tube": ((0, -0.5), (0.005, -0.35), (0, -0.13)),
    "a central venous catheter": ((-0.22, -0.40), (-0.12, -0.36), (-0.065, -0.28), (-0.05, 0.0)),
    "an enteric tube": ((0, -0.5), (0.01, -0.2), (0.015, 0.2), (0.06, 0.32), (0.13, 0.36)),
    "a chest tube": ((0.46, 0.16), (0.33, 0.08), (0.27, -0.08), (0.24, -0.27)),
}
QUESTION_NAMES = {label: label.lower() for label in PHANTOM_LABELS} | {
    "Enlarged Cardiomediastinum": "widened mediastinum",
    "Cardiomegaly": "enlarged heart",
    "Pleural Other": "pleural thickening",
    "Fracture": "rib fracture",
}


@dataclass(frozen=True)
class Finding:
    label: str
    side: str  # of the patient: "left", "right", "both" or ""
    zone: str  # a key of ZONES, or ""
    severity: int  # 0, 1, 2
    what: str  # its noun phrase, where the label alone does not tell
    certain: bool
    mentioned: bool
    boxes: tuple  # (x1, y1, x2, y2) in fractions of the image
    layers: tuple = field(
        repr=False
    )  # one per box: (polygons in the thorax frame, blur, density, opacity)


@dataclass(frozen=True, eq=False)
class Phantom:
    seed: int
    index: int
    findings: tuple
    report: str
    thinking: str
    states: tuple  # 14 ints in the order of LABELS, as the report says: 0 blank, 1 positive, 2 negative, 3 uncertain
    boxes: dict  # label -> boxes of everything drawn, mentioned or not
    size: tuple  # width, height in pixels
    anatomy: SimpleNamespace = field(repr=False)

    @cached_property
    def image(self):
        """PIL image, mode "L", drawn on first use."""
        return draw(self)


@lru_cache(maxsize=1 << 15)  # SFT and GRPO use the same ones, already drawn
def phantom(seed, index):
    """Study `index` of the endless data set `seed`: texts and boxes at once, pixels on first use of `.image`."""
    rng = np.random.default_rng([seed, index, 0])
    anatomy = _anatomy(rng)
    findings = _findings(rng, anatomy)
    texts = _texts(
        np.random.default_rng([seed, index, 1]), findings
    )  # a stream of its own: pixels never depend on it
    return Phantom(
        seed,
        index,
        findings,
        *texts,
        {f.label: list(f.boxes) for f in findings},
        anatomy.size,
        anatomy,
    )


def grounding_questions(label, rng):
    """One wording of "where is `label`?"."""
    return _pick(rng, QUESTIONS["abnormality"][:4]).format(QUESTION_NAMES[label])


def _pick(rng, items):
    return items[int(rng.random() * len(items))]


def _anatomy(rng):
    """Geometry in the thorax frame: origin mid-chest, u to the patient's left, v down, image side 1."""
    w, h, angle, scale, x, y, lung, height, dome, higher, curve, heart, middle, rib = rng.random(
        14
    ).tolist()
    width, lung, dome = 112 + int(33 * w), 0.365 + 0.04 * lung, 0.25 + 0.05 * dome
    return SimpleNamespace(
        size=(width, min(max(int(width * (0.92 + 0.2 * h)), 112), 144)),
        angle=math.radians(6 * angle - 3),
        scale=0.94 + 0.1 * scale,
        x=0.48 + 0.04 * x,
        y=0.48 + 0.04 * y,
        lung=lung,
        height=0.40 + 0.04 * height,
        dome={-1: dome, 1: dome + 0.01 + 0.025 * higher},
        curve=1.2 + 0.6 * curve,
        heart=lung * (0.40 + 0.07 * heart),
        middle=0.05 + 0.012 * middle,
        rib=0.085 + 0.015 * rib,
    )


def _place(points, an):
    """Thorax frame -> fractions of the image, (N, 2) -> (N, 2)."""
    cos, sin = an.scale * math.cos(an.angle), an.scale * math.sin(an.angle)
    return np.asarray(points) @ ((cos, sin), (-sin, cos)) + (an.x, an.y)


def _loop(u1, v1, u2, v2):
    """Polygon along one curve and back along another."""
    return np.stack([np.concatenate([u1, u2[::-1]]), np.concatenate([v1, v2[::-1]])], 1)


def _ellipse(u, v, ru, rv, tilt=0.0):
    turn = np.linspace(0, 2 * np.pi, 24)
    return np.stack([u + ru * np.cos(turn), v + rv * np.sin(turn) + tilt * np.cos(turn)], 1)


def _stroke(path, width):
    """Polyline -> one quad per segment."""
    path = np.asarray(path)
    step = np.diff(path, axis=0)
    side = step[:, ::-1] * (-1, 1) * (width / 2 / np.hypot(*step.T))[:, None]
    return list(np.stack([path[:-1] - side, path[1:] - side, path[1:] + side, path[:-1] + side], 1))


def _floor(a, sign, an):  # height of the diaphragm at distance `a` from the midline
    return an.dome[sign] + an.curve * (a - 0.16) ** 2


def _wall(v, an):  # distance of the chest wall from the midline at height v
    return 0.05 + (an.lung - 0.05) * np.sqrt(np.maximum(1 - (np.minimum(v, 0) / an.height) ** 2, 0))


def _rim(sign, top, bottom, thick, an):
    """Polygon between the chest wall and a parallel of it."""
    v = np.linspace(max(top, -an.height), bottom, 20)
    wall = _wall(v, an)
    inner = np.maximum(wall - thick * (wall - 0.05) / (an.lung - 0.05), an.middle)
    return _loop(
        sign * wall, v, sign * inner, np.where(v < 0, v * (1 - 1.2 * thick / an.height), v)
    )


def _heart(half, an):
    shape = _ellipse(0.055 + 0.3 * (half - 0.16), an.dome[-1] - 0.06, half, 0.78 * half, 0.2 * half)
    return [np.minimum(shape, (1, an.dome[1] + 0.03))]


def _findings(rng, an):
    """Sample what is there, where, and how it looks; a place taken or hidden by one finding is not used by another."""
    point = rng.random()
    picture = next(chances for cumulative, chances in PICTURES if point < cumulative)
    labels = {label for label, chance in picture.items() if rng.random() < chance}
    free = [
        (side, zone)
        for side in ("right", "left")
        for zone in ZONES
        if side == "right" or zone == "upper lobe" or "Cardiomegaly" not in labels
    ]
    found, bases = [], {-1: 0.17, 1: 0.17}  # height down to which the lung bases are visible
    for label in (
        label for label in WORDINGS if label in labels and (free or label not in LUNGS[2:])
    ):
        severity = int(rng.random() * 3)
        side, zone = (
            free.pop(int(rng.random() * len(free)))
            if label in LUNGS[2:]
            else (_pick(rng, SIDES.get(label, ("",))), "")
        )
        hidden = {
            "Pleural Effusion": ("lower lobe", "mid lung")[:severity],
            "Atelectasis": ("lower lobe",),
            "Pneumothorax": ("upper lobe",),
        }.get(label, ())
        free = [(s, z) for s, z in free if z not in hidden or side not in (s, "both")]
        what, layers = _layers(rng, label, side, zone, severity, an, bases, found)
        boxes = []
        for polygons, blur, _, _ in layers:
            points = _place(np.concatenate(polygons), an)
            pad = 0.004 + 0.75 * blur  # how far a soft border is visible
            boxes.append(
                tuple(np.clip([*points.min(0) - pad, *points.max(0) + pad], 0, 1).tolist())
            )
        certain = label == "Support Devices" or rng.random() > (0.25, 0.12, 0.06)[severity]
        mentioned = (
            rng.random() < (0.6, 0.8, 0.9)[severity]
        )  # the slighter, the easier to pass over
        found.append(
            Finding(label, side, zone, severity, what, certain, mentioned, tuple(boxes), layers)
        )
    return tuple(found)


def _layers(rng, label, side, zone, severity, an, bases, found):
    """(what, layers) of one finding, a layer per box; an effusion raises `bases`."""
    uni, lung, what, large = rng.uniform, an.lung, "", any(f.label == "Cardiomegaly" for f in found)
    signs = {"left": (1,), "both": (-1, 1)}.get(side, (-1,))
    s, v, a = (
        signs[0],
        ZONES.get(zone, 0) + uni(-0.02, 0.02),
        uni(0.17, 0.23) + 0.06 * (zone == "lower lobe"),
    )
    blur, density, opacity, shapes = 0, 0.70, 1.0, []  # one list of polygons per box
    match label:
        case "Cardiomegaly":
            shapes = [_heart(lung * (0.56, 0.61, 0.66)[severity], an)]
        case "Enlarged Cardiomediastinum":
            half, rows = (
                np.array((0.8, 1, 1, 0.95, 0.85, 0.7)) * uni(0.12, 0.15),
                np.linspace(-0.36, 0.06, 6),
            )
            shapes = [[_loop(half, rows, -half, rows)]]
        case "Pleural Effusion":
            for s in signs:
                d = np.linspace(0.06 if s < 0 else 0.21 if large else 0.12, lung, 30)
                floor, behind = (
                    _floor(d, s, an),
                    0.05 * (large and s > 0),
                )  # show above a heart that hides the base
                top = _floor(lung, s, an) - (0.16, 0.24, 0.35)[severity] - behind + uni(-0.02, 0.02)
                surface = top + 0.11 * (
                    1 - np.exp((d - lung) / 0.08)
                )  # meniscus: it climbs the wall
                d, surface, floor = (
                    curve[surface < floor - 0.015] for curve in (d, surface, floor)
                )
                shapes.append([_loop(s * d, surface, s * d, floor + 0.01)])
                bases[s] = top - 0.03
        case "Pneumothorax":
            density, shapes = (
                0.06,
                [[_rim(s, -0.5, (0.04, 0.11, 0.18)[severity], (0.085, 0.11, 0.14)[severity], an)]],
            )
        case "Atelectasis":
            for s in signs:
                v, tilt, inner = bases[s] - uni(0, 0.03), uni(-0.03, 0.05), 0.13 if s < 0 else 0.20
                shapes.append(_stroke(((s * inner, v + tilt), (s * (lung - 0.03), v)), 0.034))
                if severity:
                    shapes[-1] += _stroke(
                        ((s * (inner + 0.03), v + tilt - 0.06), (s * (lung - 0.07), v - 0.05)),
                        0.026,
                    )
        case "Edema":
            blur, opacity, shapes = (
                0.045,
                (0.58, 0.68, 0.78)[severity],
                [[_ellipse(s * 0.17, -0.02, 0.12, 0.20)] for s in signs],
            )
        case "Consolidation":
            blur, opacity, d = 0.006, 0.92, np.array((0.07, _wall(v - 0.09, an) - 0.01))
            edge = v + uni(-0.2, 0.2) * (d - 0.2)
            shapes = [[_loop(s * d, edge - uni(0.07, 0.10), s * d, edge + uni(0.07, 0.09))]]
        case "Pneumonia":
            blur, opacity = 0.011, 0.9
            spots = rng.uniform((-0.08, -0.08, 0.028, 0.028), (0.08, 0.08, 0.042, 0.042), (10, 4))
            shapes = [[_ellipse(s * a + x, v + y, *radii) for x, y, *radii in spots.tolist()]]
        case "Lung Opacity":
            blur, opacity, shapes = 0.035, 0.75, [[_ellipse(s * a, v, *rng.uniform(0.09, 0.11, 2))]]
        case "Lung Lesion":
            what, spots, radius = (
                "a mass" if severity == 2 else "a nodule",
                ((a, v),),
                (0.052, 0.062, 0.08)[severity],
            )
            if severity == 0 and rng.random() < 0.5:
                what, spots = "nodules", ((a - 0.05, v - 0.05), (a + 0.05, v + 0.05))
            density, shapes = (
                0.78,
                [[_ellipse(s * x, y, radius, radius * uni(0.9, 1.1))] for x, y in spots],
            )
        case "Pleural Other":
            what = _pick(rng, tuple(PLEURA))
            density, shapes = 0.94, [[_rim(s, *PLEURA[what], 0.06, an)]]
        case "Fracture":
            v, d, density = uni(-0.22, 0.05), lung - 0.09, 0.95
            for v in (v, v + 0.11)[: 1 + (severity == 2)]:  # two ends of a rib, out of line
                shapes.append(
                    _stroke(((s * (d - 0.06), v - 0.015), (s * (d - 0.006), v)), 0.034)
                    + _stroke(((s * (d + 0.006), v + 0.035), (s * (d + 0.055), v + 0.055)), 0.034)
                )
        case "Support Devices":
            air = [1 if f.side == "left" else -1 for f in found if f.label == "Pneumothorax"]
            what = "a chest tube" if air else _pick(rng, tuple(TUBES)[:4])
            s = air[0] if air else _pick(rng, (-1, 1)) if what == "a pacemaker" else 1
            density, shapes = 0.97, [_stroke([(s * u, v) for u, v in TUBES[what]], 0.024)]
            shapes[0] += (
                _stroke(((s * 0.26, -0.25), (s * 0.34, -0.25)), 0.085)
                if what == "a pacemaker"
                else []
            )
    return what, tuple((polygons, blur, density, opacity) for polygons in shapes)


def draw(phantom, without=None):
    """Pixels as a PIL "L" image, optionally without the finding `without` (same anatomy, same noise)."""
    an, (w, h) = phantom.anatomy, phantom.size
    rng = np.random.default_rng([phantom.seed, phantom.index, 2])

    def mask(polygons, blur=0):
        """Coverage of the pixels, 0..1: drawn at twice the size for smooth borders."""
        canvas = Image.new("L", (2 * w, 2 * h))
        pen, points = ImageDraw.Draw(canvas), _place(np.concatenate(polygons), an) * (2 * w, 2 * h)
        for part in np.split(points, np.cumsum([len(p) for p in polygons[:-1]])):
            pen.polygon(part.ravel().tolist(), fill=255)
        canvas = (
            canvas.reduce(2).filter(ImageFilter.GaussianBlur(blur * w))
            if blur
            else canvas.reduce(2)
        )
        return np.asarray(canvas, dtype=np.float32) / 255

    def findings(density, *regions, within=1):
        for f in phantom.findings:
            if f.label != without and WORDINGS[f.label][0] in regions:
                for polygons, blur, value, opacity in f.layers:
                    density = density + (value - density) * (
                        mask(polygons, blur) * (opacity * within)
                    )
        return density

    cos, sin = math.cos(an.angle) / an.scale, math.sin(an.angle) / an.scale
    x = (np.arange(w, dtype=np.float32) + 0.5) / w - an.x
    y = ((np.arange(h, dtype=np.float32) + 0.5) / h - an.y)[:, None]
    a, v = np.abs(x * cos + y * sin), y * cos - x * sin
    low = Image.fromarray(rng.standard_normal((h // 5, w // 5), dtype=np.float32))
    low = np.asarray(low.resize((w, h), Image.Resampling.BILINEAR)) * np.float32(0.03)
    d, rows = np.linspace(0, 0.5, 20), np.linspace(-an.height, 0.36, 30)
    belly = mask([_loop(s * d, _floor(d, s, an), s * d, d * 0 + 0.7) for s in (-1, 1)])
    lungs = mask(
        [_loop(s * _wall(rows, an), rows, np.full(30, s * 0.03), rows) for s in (-1, 1)]
    ) * (1 - belly)
    turn, reach, s = rng.uniform(-1.5, 1.5, 18), rng.uniform(0.12, 0.26, 18), np.repeat((-1, 1), 9)
    ends = np.stack(
        [
            s * 0.07,
            np.full(18, -0.02),
            s * (0.07 + reach * np.cos(turn)),
            1.2 * reach * np.sin(turn),
        ],
        1,
    )
    vessels = _stroke(ends.reshape(-1, 2), 0.009)  # from the hilum and back
    density = 0.60 + low + (-0.33 + 0.10 * mask(vessels)) * lungs
    density = findings(density, "lungs", "pleura", within=lungs)
    ribs = np.cos((v + 0.9 * a * a - 0.55 * a) * (2 * math.pi / an.rib))
    density += 0.08 * np.maximum(ribs - 0.1, 0) * lungs
    half, rows = (
        an.middle * np.array((0.9, 0.9, 1, 1.25, 1.1, 1.4, 1.7)),
        (-0.5, -0.3, -0.24, -0.18, -0.10, 0, 0.3),
    )
    density += (0.68 - density) * mask([_loop(half, rows, -half, rows), *_heart(an.heart, an)])
    density = findings(density, "heart", "mediastinum")
    density += (0.74 + low - density) * belly
    # Clavicles over everything soft; the trachea dark and the spine bright on the midline.
    clavicles = [
        quad
        for s in (-1, 1)
        for quad in _stroke(((s * 0.04, -0.31), (s * 0.2, -0.35), (s * 0.38, -0.39)), 0.024)
    ]
    density += 0.08 * mask(clavicles)
    density += np.where(
        a < 0.016,
        np.where(v < -0.13, np.float32(-0.06), np.float32(0.04)),
        np.float32(0.04) * (a < 0.03),
    )
    density = findings(density, "bones", "devices")
    density *= np.clip(
        (0.20 + 0.34 * np.clip((v + 0.44) / 0.1, 0, 1) - a) / 0.03, 0, 1
    )  # air around
    gain, offset, gamma, grain = rng.uniform((0.90, -0.02, 0.88, 2), (1.08, 0.02, 1.12, 4)).astype(
        np.float32
    )
    film = Image.fromarray((255 * np.clip(density * gain + offset, 0, 1) ** gamma).astype(np.uint8))
    pixels = np.asarray(film.filter(ImageFilter.SMOOTH)) + grain * rng.standard_normal(
        (h, w), dtype=np.float32
    )
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _phrases(f):
    """The wordings of a finding, filled in."""
    plural = f.side == "both" or len(f.boxes) > 1
    return (
        WORDINGS[f.label][1]
        .format(
            what=f.what,
            a="" if plural else "a ",
            s="s" * plural,
            side="bilateral" if f.side == "both" else f.side,
            zone=f.zone,
            size=SIZES[f.severity],
            degree=DEGREES[f.severity],
        )
        .split("|")
    )


def _texts(rng, findings):
    """(report, thinking, states) of a reader who mentions most findings and denies some others."""
    drawn, denied, states = {f.label for f in findings}, set(), [0] * len(LABELS)
    stock = not findings and rng.random() < 0.3  # the usual words for a normal study
    choose = (lambda items: items[0]) if stock else (lambda items: _pick(rng, items))
    said = {region: [] for region in ORDERS[0].split()}
    for f in (f for f in findings if f.mentioned):
        states[LABELS.index(f.label)] = 1 if f.certain else 3
        phrase = choose(_phrases(f)) if f.certain else _phrases(f)[0]
        if not phrase.endswith("."):
            be = (
                "are"
                if phrase.endswith(("effusions", "fractures")) or phrase.startswith("nodules")
                else "is"
            )
            phrase = choose(CERTAIN if f.certain else HEDGED).format(
                phrase=phrase, bare=ARTICLE.sub("", phrase), be=be
            )
        said[WORDINGS[f.label][0]].append(phrase)
    for chance, region, labels, denies, phrases in NORMALS:
        if (
            drawn.isdisjoint(labels)
            and denied.isdisjoint(labels)
            and (0.5 if stock else rng.random()) < chance
        ):
            phrase = choose(phrases.split("|"))
            said[region].append(phrase if phrase.endswith(".") else choose(DENIED).format(phrase))
            denied.update(labels if denies else ())
    for label in denied:
        states[LABELS.index(label)] = 2
    states[0] = int(not {1, 3} & set(states[1:13]))
    sentences = [sentence for region in choose(ORDERS).split() for sentence in said[region]]
    if rng.random() < 0.4 or not sentences:  # two readers in five close with an impression
        names = [
            ("" if f.certain else "possible ") + QUESTION_NAMES[f.label]
            for f in sorted(findings, key=lambda f: LABELS.index(f.label))
            if f.mentioned
        ]
        sentences.append(f"impression: {', '.join(names) or SUMMARY}.")
    return " ".join(s[0].upper() + s[1:] for s in sentences), _thinking(findings), tuple(states)


def _thinking(findings):
    """A systematic reading, region by region, of what the report mentions."""

    def read(region, default, side=""):
        seen = [
            f
            for f in findings
            if f.mentioned and WORDINGS[f.label][0] == region and f.side in (side or f.side, "both")
        ]
        return (
            ", ".join("possible " * (not f.certain) + ARTICLE.sub("", _phrases(f)[0]) for f in seen)
            or default
        )

    return (
        f"Heart: {read('heart', 'normal size')}. Mediastinum: {read('mediastinum', 'normal')}. Right lung: "
        f"{read('lungs', 'clear', 'right')}. Left lung: {read('lungs', 'clear', 'left')}. Pleura: "
        f"{read('pleura', 'normal')}. Bones: {read('bones', 'intact')}. Devices: {read('devices', 'none')}."
    )


# ---------------------------------------------------------------------------------------------- python data.py config.yaml


def spread(values):
    """min / median / max"""
    return (
        " / ".join(f"{v:.0f}" for v in np.percentile(values, (0, 50, 100), method="nearest"))
        if len(values)
        else "-"
    )


def contact_sheet(examples, columns=4, side=360, foot=96):
    """One picture of all: each example's first image with its boxes, and question and answer below."""
    rows = -(-len(examples) // columns)
    sheet, font = (
        Image.new("RGB", (columns * side, rows * (side + foot)), "white"),
        ImageFont.load_default(11),
    )
    for n, e in enumerate(examples):
        x, y = n % columns * side, n // columns * (side + foot)
        try:
            image = open_images(dataclasses.replace(e, images=e.images[:1]))[0]
        except InputError:  # the description says so
            image = Image.new("RGB", (side, side))
        image = ImageOps.contain(
            image, (side - 8, side - 8)
        )  # enlarged or reduced: boxes are fractions
        pen = ImageDraw.Draw(image)
        for box in e.boxes:
            pen.rectangle([v * s for v, s in zip(box, image.size * 2)], outline="red", width=2)
        sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
        text = [
            f"{e.id}  ({e.kind or e.task})",
            *textwrap.wrap(e.question, 60)[:2],
            *textwrap.wrap(e.answer, 60)[:4],
        ]
        ImageDraw.Draw(sheet).multiline_text(
            (x + 6, y + side), "\n".join(text), "black", font, spacing=2
        )
    return sheet


def describe(config, encode, label):
    """What a run with this configuration would read, as text, and a contact sheet.

    encode(example) -> (number of prompt tokens, of answer tokens); label(reports) -> states (N, 14), as rewards.labeler."""
    stopping, config = (
        config.data.on_error == "stop",
        dataclasses.replace(config, data=dataclasses.replace(config.data, on_error="skip")),
    )
    rng, said, chosen = np.random.default_rng(config.seed), [], []
    counts = [
        [
            "source",
            "split",
            "task",
            "examples",
            "studies",
            "patients",
            "words (min / median / max)",
            "image width",
            "image height",
        ]
    ]
    labels, lengths = {}, [["tokens, min / median / max", "of", "prompt", "answer"]]

    def tried(function, *args):
        try:
            return function(*args)
        except InputError as error:
            said.append(f"cannot be read: {error}")

    for split in ("train", "val", "test"):
        parts = tried(read_split, config, split) or []
        if split == "train":
            parts, leaks = tried(without_leaks, config, parts) or (parts, "")
            said += [f"{split}: {leaks}"] * bool(leaks)
        for source, _, problems in parts:
            stops = (
                "would stop a run (data.on_error=skip leaves such examples out)"
                if stopping
                else "left out"
            )
            said += [f"{split}, {source.source}: {stops}: {len(problems)}, such as"] * bool(
                problems
            ) + [f"  {problem}" for problem in problems[:3]]
        everything = [e for _, part, _ in parts for e in part]
        written = [
            dataclasses.replace(e, style=style_of(config))
            for e in tried(with_traces, config, split, everything, said) or everything
        ]
        for source, part, _ in parts:
            for kind in sorted({e.kind or e.task for e in part}):
                some = [e for e in part if (e.kind or e.task) == kind]
                few = [some[i] for i in sorted(rng.permutation(len(some))[:50])]
                sizes = [
                    tried(image_size, i) if isinstance(i, (str, Path)) else i.size
                    for e in few
                    for i in e.images
                ]
                sizes = np.array([size for size in sizes if size]).reshape(-1, 2)
                counts.append(
                    [
                        source.source,
                        split,
                        kind,
                        str(len(some)),
                        str(len({e.images for e in some})),
                        str(len({e.patient for e in some})),
                        spread([len(e.answer.split()) for e in some]),
                        spread(sizes[:, 0]),
                        spread(sizes[:, 1]),
                    ]
                )
                chosen += (
                    sorted(few, key=lambda e: not e.boxes)[:4] if split == "train" else few[:1]
                )
        reports = [e.answer for e in everything if e.task == "report"]
        if reports:
            reports = [reports[i] for i in rng.permutation(len(reports))[:2000]]
            labels[f"{split}, {len(reports)} reports"] = np.isin(label(reports), (1, 3)).mean(0)
        few = [tried(encode, written[i]) for i in rng.permutation(len(written))[:32]]
        if few := [pair for pair in few if pair]:
            prompts, answers = zip(*few)
            lengths.append([split, str(len(few)), spread(prompts), spread(answers)])
    prevalence = [["positive or uncertain", *labels]] + [
        [name, *(f"{share[i]:.1%}" for share in labels.values())] for i, name in enumerate(LABELS)
    ]
    limits = f"limits: model.max_prompt_tokens={config.model.max_prompt_tokens}, grpo.max_new_tokens={config.grpo.max_new_tokens}"
    return "\n\n".join(
        [
            format_table(counts),
            *[format_table(prevalence)] * bool(labels),
            f"{format_table(lengths)}\n{limits}",
            "\n".join(dict.fromkeys(said)) or "nothing was skipped",
        ]
    ), contact_sheet(chosen) if chosen else None


def main():
    import model  # for token lengths and labels alone
    import rewards

    parser = argparse.ArgumentParser(
        description="Describes what a run would read, and writes OUT/data.png: examples with their boxes."
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    policy = model.load_policy(config, weights=False)
    text, sheet = describe(
        config,
        lambda e: (policy.encode(e)["input_ids"].shape[1], len(policy.encode_target(e))),
        rewards.labeler(config.rewards),
    )
    print(text)
    if sheet is None:
        raise InputError(f"data.path={config.data.path!r}: there is no usable example")
    path = Path(config.out, "data.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"\nexamples: {path}")


if __name__ == "__main__":
    main()
