"""MIMIC-CXR: reports, and labels for classification.

As R2Gen distributes it (annotation.json, images/), or MIMIC-CXR-JPG from PhysioNet: split and
metadata CSV, files/p10/p10000032/s50414267/ID.jpg, and the reports as mimic_cxr_sectioned.csv or as
the .txt files of MIMIC-CXR, beside the images or in mimic-cxr-reports/. The CSV files stand in
data.path or data.images. The report is the findings, else the impression, else the last paragraph
(in .txt files, what follows the name of the examination comes before the impression, so that
reports without a heading for findings can differ). Labels come from the chexpert CSV. R2Gen's file
does not say which images are frontal: data.views=frontal needs the metadata CSV, too.
"""

import difflib
import re
from functools import cache
from pathlib import Path

from readers.r2gen import read_r2gen
from readers.study import (
    LABELS,
    Skip,
    Studies,
    Study,
    choose_views,
    find,
    findings_of,
    first_file,
    locate,
    read_csv,
    split_name,
)
from runtime.config import InputError, Source

# The beginning of a line, or capitals after a sentence, before a colon that is not that of a time.
HEADING = re.compile(
    r"(?:^[ \t]*|(?<=\.)[ \t]+(?=[A-Z]{4}|Impression|Conclusion))"
    r"([A-Za-z](?:[\w ,/&()-]|(?<=\d):(?=\d))*?)[ \t]*:(?!\d\d)",
    re.M,
)
SECTIONS = {
    "findings": "FINDINGS|FINDINGS AND IMPRESSION|FINDINGS/IMPRESSION",
    "report": "REPORT",
    "impression": "IMPRESSION|CONCLUSION|SUMMARY|OPINION",
    "other": (
        "EXAM|EXAMINATION|TYPE OF EXAMINATION|STUDY|INDICATION|CLINICAL INDICATION|HISTORY"
        "|CLINICAL HISTORY|CLINICAL INFORMATION|REASON FOR EXAM|REASON FOR EXAMINATION|COMPARISON"
        "|TECHNIQUE|RECOMMENDATION|NOTIFICATION|WET READ|ADDENDUM"
    ),
}
# Fewer words after the name of an examination, as in "CHEST, TWO VIEWS: 10:45", are no findings;
# fewer in a paragraph without a heading are a signature.
MIN_WORDS = 5


def read(source: Source, split: str, skip: Skip) -> Studies:
    table = locate(source, "annotation.json", "mimic-cxr-2*-split.csv")
    if table.name == "annotation.json":
        yield from read_annotation(source, table, split, skip)
        return
    views = read_views(source, skip)
    texts = read_sections(source, skip)
    labels = {}
    if "classification" in source.tasks:
        labels = read_labels(source, skip)
    studies = {}
    for row in read_csv(table, skip, "dicom_id", "study_id", "subject_id", "split"):
        if split_name(row["split"]) == split:
            dicom, study, subject = row["dicom_id"], row["study_id"], row["subject_id"]
            image = source.image_root() / mimic_image(subject, study, dicom)
            new = Study(study, f"mimic/{subject}", [], f"{table}, study {study}")
            studies.setdefault(study, new).images.append((views.get(dicom), image))

    for study in choose_views(studies.values(), source, f"{table}, {split}"):
        study.findings = labels.get(study.id)
        if texts is not None:
            study.report = texts.get(study.id, "")
        elif "report" in source.tasks:
            study.report = read_text(source, study, skip)
            if study.report is None:
                continue
        yield study


def read_annotation(source, path, split, skip):
    """R2Gen's file, which does not know the views."""
    studies = list(read_r2gen(source, path, split, skip, r2gen_patient))
    if source.views == "frontal":
        views = read_views(source, skip)
        for study in studies:
            # The files are named by their dicom.
            study.images = [(views.get(image.stem), image) for image in study.images]
        studies = choose_views(studies, source, f"{path}, {split}")
    yield from studies


def r2gen_patient(row):
    return f"mimic/{row.get('subject_id', row['id'])}"


def mimic_image(subject: str, study: str, dicom: str) -> Path:
    """The place of an image in MIMIC-CXR-JPG."""
    return Path("files", f"p{subject[:2]}", f"p{subject}", f"s{study}", f"{dicom}.jpg")


def read_views(source, skip):
    """dicom -> its view, by the position or, where that is empty, by the code's meaning."""
    path = find(source, "mimic-cxr-2*-metadata.csv")
    if not path:
        raise InputError(
            f"{source.path}: expected mimic-cxr-2*-metadata.csv there, which names the views; only "
            f"annotation.json of R2Gen is read without it, and only with data.views=all"
        )
    views = {}
    for row in read_csv(path, skip, "dicom_id", "ViewPosition"):
        code = row.get("ViewCodeSequence_CodeMeaning")
        views[row["dicom_id"]] = row["ViewPosition"].strip() or code
    return views


def read_sections(source, skip):
    """study -> report of mimic_cxr_sectioned.csv; None without the file."""
    path = find(source, "mimic_cxr_sectioned.csv")
    if not path:
        return None
    reports = {}
    for row in read_csv(path, skip, "study", "findings", "impression"):
        study = row["study"].removeprefix("s")
        sections = [row["findings"], row["impression"], row.get("last_paragraph", "")]
        reports[study] = next((text for text in sections if text.strip()), "")
    return reports


def read_labels(source, skip):
    """study -> positive observations, where there are certain labels."""
    path = locate(source, "mimic-cxr-2*-chexpert.csv")
    # By name: the order of the labels differs.
    rows = read_csv(path, skip, "study_id", *LABELS)
    return {row["study_id"]: findings_of(row, "1", "1.0") for row in rows}


def read_text(source, study, skip):
    """The report of a .txt file; None if it cannot be read."""
    folder = study.images[0].relative_to(source.image_root()).parent
    folders = ("", "mimic-cxr-reports")
    path = first_file(Path(source.path), folders, folder.with_suffix(".txt"))
    try:
        return findings_section(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        skip(f"{path}: {error.strerror} (nor is there mimic_cxr_sectioned.csv in {source.path})")
        return None


def findings_section(text: str) -> str:
    """The findings of a MIMIC-CXR report, else what follows "REPORT:", else what follows the name
    of the examination, else the impression, else the last paragraph, if it has no heading.

    "LUNGS:" and the like are no sections: they stay in the findings.
    """
    # (where it begins, where its body begins, kind) of each section.
    sections = []
    kind = ""
    for match in HEADING.finditer(text):
        found = section_of(match[1])
        # "CHEST:" is one of the parts of findings, too.
        if found and not (found == "examination" and kind in ("findings", "report", "impression")):
            kind = found
            sections.append((match.start(), match.end(), kind))
    bodies = {}
    body = text
    ends = [start for start, *_ in sections[1:]] + [len(text)]
    for (_, start, kind), end in zip(sections, ends):
        body = text[start:end]
        enough = 1 if kind in ("findings", "impression") else MIN_WORDS
        if len(body.split()) >= enough:
            bodies.setdefault(kind, body)
    # What stands in paragraphs of its own below the last heading.
    _, *paragraphs = re.split(r"\n\s*\n", body.strip())
    long = [part for part in paragraphs if len(part.split()) >= MIN_WORDS]
    bodies["paragraph"] = "".join(long[-1:])
    kinds = ("findings", "report", "examination", "impression", "paragraph")
    return next(bodies[kind] for kind in kinds if kind in bodies)


@cache
def section_of(heading):
    """findings, impression, examination, other, or "" for what is no section."""
    name = heading.upper()
    for kind, names in SECTIONS.items():
        # Dictated words are sometimes misspelt.
        if difflib.get_close_matches(name, names.split("|"), n=1, cutoff=0.85):
            return kind
    return "examination" if re.search(r"\b(CHEST|VIEWS?|RADIOGRAPHS?)\b", name) else ""
