"""MIMIC-CXR: reports, and labels for classification.

As R2Gen distributes it (annotation.json, images/), or MIMIC-CXR-JPG from PhysioNet: split and
metadata CSV, files/p10/p10000032/s50414267/ID.jpg, and the reports as mimic_cxr_sectioned.csv or as
the .txt files of MIMIC-CXR, beside the images or in mimic-cxr-reports/. The report is the findings,
else the impression. Labels come from the chexpert CSV.
"""

import re
from collections import defaultdict
from pathlib import Path

from readers.r2gen import read_r2gen
from readers.study import LABELS, Skip, Studies, Study, first_file, locate, read_csv, split_name
from runtime.config import Source

HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ,/&()-]+):", re.MULTILINE)
# PA before AP before all others.
RANKS = {"PA": 0, "AP": 1}
NOT_FRONTAL = 2


def read(source: Source, split: str, skip: Skip) -> Studies:
    root = Path(source.path)
    table = locate(root, "annotation.json", "mimic-cxr-2*-split.csv")
    if table.name == "annotation.json":
        yield from read_r2gen(source, split, skip, r2gen_patient)
        return
    ranks = read_ranks(root, skip)
    texts = read_sections(root, skip)
    labels = {}
    if "classification" in source.tasks:
        labels = read_labels(root, skip)

    studies = defaultdict(list)
    rows = read_csv(table, skip, "dicom_id", "study_id", "subject_id", "split")
    for row in rows:
        dicom = row["dicom_id"]
        rank = ranks.get(dicom, NOT_FRONTAL)
        # With frontal views alone, a study that has none is not asked about.
        wanted = source.views != "frontal" or rank != NOT_FRONTAL
        if wanted and split_name(row["split"]) == split:
            subject = row["subject_id"]
            study = row["study_id"]
            image = root / mimic_image(subject, study, dicom)
            studies[subject, study].append((rank, image))

    for (subject, study), ranked in studies.items():
        images = [image for _, image in sorted(ranked)]
        if source.views == "frontal":
            images = images[:1]
        report = None
        if texts is not None:
            report = texts.get(study, "")
        elif "report" in source.tasks:
            report = read_text(root, subject, study, skip)
            if report is None:
                continue
        where = f"{table}, study {study}"
        findings = labels.get(study)
        yield Study(study, f"mimic/{subject}", images, where, report, findings)


def r2gen_patient(row):
    return f"mimic/{row.get('subject_id', row['id'])}"


def mimic_image(subject: str, study: str, dicom: str) -> Path:
    """The place of an image in MIMIC-CXR-JPG."""
    return Path("files", f"p{subject[:2]}", f"p{subject}", f"s{study}", f"{dicom}.jpg")


def read_ranks(root, skip):
    """dicom -> rank of its view"""
    path = locate(root, "mimic-cxr-2*-metadata.csv")
    ranks = {}
    for row in read_csv(path, skip, "dicom_id", "ViewPosition"):
        view = row["ViewPosition"]
        ranks[row["dicom_id"]] = RANKS.get(view, NOT_FRONTAL)
    return ranks


def read_sections(root, skip):
    """study -> report of mimic_cxr_sectioned.csv; None without the file."""
    paths = list(root.glob("mimic_cxr_sectioned.csv*"))
    if not paths:
        return None
    reports = {}
    for row in read_csv(paths[0], skip, "study", "findings", "impression"):
        study = row["study"].removeprefix("s")
        findings = row["findings"].strip()
        reports[study] = findings or row["impression"]
    return reports


def read_labels(root, skip):
    """study -> positive observations, where there are certain labels."""
    path = locate(root, "mimic-cxr-2*-chexpert.csv")
    labels = {}
    for row in read_csv(path, skip, "study_id", *LABELS):
        # By name: the order of the labels differs.
        found = [label for label in LABELS if row[label].strip() in ("1", "1.0")]
        if found:
            names = [label for label in found if label != "No Finding"]
            labels[row["study_id"]] = names
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


def findings_section(text: str) -> str:
    """The findings of a MIMIC-CXR report, else its impression, else ""."""
    _, *parts = HEADING.split(text)
    for wanted in ("FINDING", "IMPRESSION"):
        for name, body in zip(parts[::2], parts[1::2]):
            if name.startswith(wanted) and body.strip():
                return body
    return ""
