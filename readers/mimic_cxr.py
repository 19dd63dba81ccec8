"""MIMIC-CXR: reports, and labels for classification.

As R2Gen distributes it (annotation.json, images/), or MIMIC-CXR-JPG from PhysioNet: split and
metadata CSV, files/p10/p10000032/s50414267/ID.jpg, and the reports as mimic_cxr_sectioned.csv or as
the .txt files of MIMIC-CXR, beside the images or in mimic-cxr-reports/. The report is the findings,
else the impression. Labels come from the chexpert CSV.
"""

import re
from pathlib import Path

from readers.r2gen import is_r2gen, read_r2gen
from readers.study import LABELS, Study, first_file, locate, read_csv

HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ,/&()-]+):", re.MULTILINE)
# PA before AP before all others.
RANKS = {"PA": 0, "AP": 1}
NOT_FRONTAL = 2


def read(source, split, skip):
    root = Path(source.path)
    if is_r2gen(root):
        yield from read_r2gen(root, split, source.views, skip, r2gen_patient)
        return
    table = locate(root, "mimic-cxr-2*-split.csv", "annotation.json")
    metadata = locate(root, "mimic-cxr-2*-metadata.csv")
    rows = read_csv(metadata, ["dicom_id", "ViewPosition"], skip)
    ranks = {row["dicom_id"]: RANKS.get(row["ViewPosition"], NOT_FRONTAL) for row in rows}
    texts = read_sections(root, skip)
    labels = read_labels(root, skip) if "classification" in source.tasks else {}

    studies = {}
    official = "validate" if split == "val" else split
    for row in read_csv(table, ["dicom_id", "study_id", "subject_id", "split"], skip):
        if row["split"] == official:
            key = row["subject_id"], row["study_id"]
            studies.setdefault(key, []).append(row["dicom_id"])
    for (subject, study), dicoms in studies.items():
        ranked = sorted((ranks.get(d, NOT_FRONTAL), d) for d in dicoms)
        dicoms = [d for _, d in ranked]
        if source.views == "frontal":
            dicoms = [d for rank, d in ranked if rank != NOT_FRONTAL][:1]
            if not dicoms:
                # A lateral view alone is not asked for.
                continue
        report = None
        if texts is not None:
            report = texts.get(study, "")
        elif "report" in source.tasks:
            report = read_text(root, subject, study, skip)
            if report is None:
                continue
        images = [root / mimic_image(subject, study, d) for d in dicoms]
        where = f"{table}, study {study}"
        yield Study(study, f"mimic/{subject}", images, where, report, labels.get(study))


def r2gen_patient(row):
    return f"mimic/{row.get('subject_id', row['id'])}"


def mimic_image(subject, study, dicom):
    """The place of an image in MIMIC-CXR-JPG."""
    return Path("files", f"p{subject[:2]}", f"p{subject}", f"s{study}", f"{dicom}.jpg")


def read_sections(root, skip):
    """study -> report of mimic_cxr_sectioned.csv; None without the file."""
    if not list(root.glob("mimic_cxr_sectioned.csv*")):
        return None
    rows = read_csv(
        locate(root, "mimic_cxr_sectioned.csv"), ["study", "findings", "impression"], skip
    )
    return {
        row["study"].removeprefix("s"): row["findings"].strip() or row["impression"] for row in rows
    }


def read_labels(root, skip):
    """study -> positive observations; None where nothing is certain."""
    # By name: the order of the labels differs.
    rows = read_csv(locate(root, "mimic-cxr-2*-chexpert.csv"), ["study_id", *LABELS], skip)
    labels = {}
    for row in rows:
        found = [label for label in LABELS if row[label].strip() in ("1", "1.0")]
        names = [label for label in found if label != "No Finding"]
        labels[row["study_id"]] = names if found else None
    return labels


def read_text(root, subject, study, skip):
    """The report of a .txt file; None if it cannot be read."""
    path = mimic_image(subject, study, "").parent.with_suffix(".txt")
    path = first_file(root, ("", "mimic-cxr-reports"), path)
    try:
        return findings_section(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        skip(f"{path}: {error.strerror} (nor is there mimic_cxr_sectioned.csv in {root})")
        return None


def findings_section(text):
    """The findings of a MIMIC-CXR report, else its impression, else ""."""
    _, *parts = HEADING.split(text)
    sections = [(name.strip().lower(), body) for name, body in zip(parts[::2], parts[1::2])]
    for wanted in ("finding", "impression"):
        for name, body in sections:
            if name.startswith(wanted) and body.strip():
                return body
    return ""
