"""MIMIC-CXR: reports, and labels for classification.

As R2Gen distributes it (annotation.json, images/), or MIMIC-CXR-JPG from PhysioNet: split and
metadata CSV, files/p10/p10000032/s50414267/ID.jpg, and the reports as mimic_cxr_sectioned.csv or as
the .txt files of MIMIC-CXR, beside the images or in mimic-cxr-reports/. The report is the findings,
else the impression, else the last paragraph. Labels come from the chexpert CSV. R2Gen's file does
not say which images are frontal: data.views=frontal needs the metadata CSV beside it.
"""

import difflib
import re
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path

from readers.r2gen import read_r2gen
from readers.study import LABELS, Skip, Studies, Study, first_file, locate, read_csv, split_name
from runtime.config import InputError, Source
from runtime.output import warn0

# A word or some at the beginning of a line, or capitals after a sentence, before a colon.
HEADING = re.compile(
    r"(?:^[ \t]*|(?<=\.)[ \t]+(?=[A-Z]{4}))([A-Za-z][A-Za-z0-9 ,/&()-]*?)[ \t]*:", re.M
)
SECTIONS = {
    "findings": ("FINDINGS", "FINDING", "FINDINGS AND IMPRESSION", "FINDINGS/IMPRESSION"),
    "impression": ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "SUMMARY", "OPINION"),
    "other": (
        "EXAM",
        "EXAMINATION",
        "TYPE OF EXAMINATION",
        "STUDY",
        "INDICATION",
        "CLINICAL INDICATION",
        "HISTORY",
        "CLINICAL HISTORY",
        "CLINICAL INFORMATION",
        "REASON FOR EXAM",
        "REASON FOR EXAMINATION",
        "COMPARISON",
        "COMPARISONS",
        "TECHNIQUE",
        "RECOMMENDATION",
        "RECOMMENDATIONS",
        "NOTIFICATION",
        "WET READ",
        "ADDENDUM",
    ),
}
# Fewer words after the name of an examination, as in "CHEST, TWO VIEWS: 10:45", are no findings.
MIN_WORDS = 5
# PA before AP before all others, by the column ViewPosition or by the code's meaning.
RANKS = {"PA": 0, "POSTERO-ANTERIOR": 0, "AP": 1, "ANTERO-POSTERIOR": 1}
NOT_FRONTAL = 2
UNKNOWN = 3


def read(source: Source, split: str, skip: Skip) -> Studies:
    root = Path(source.path)
    table = locate(root, "annotation.json", "mimic-cxr-2*-split.csv")
    if table.name == "annotation.json":
        frontal = partial(first_frontal, root, skip)
        yield from read_r2gen(source, split, skip, r2gen_patient, frontal)
        return
    texts = read_sections(root, skip)
    labels = {}
    if "classification" in source.tasks:
        labels = read_labels(root, skip)
    for (subject, study), images in images_of_split(source, table, split, skip).items():
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


def images_of_split(source, table, split, skip):
    """(subject, study) -> its images, PA before AP before others; only the first frontal one, if
    that is asked for."""
    ranks = read_ranks(Path(source.path), skip)
    studies = defaultdict(list)
    unknown = 0
    for row in read_csv(table, skip, "dicom_id", "study_id", "subject_id", "split"):
        if split_name(row["split"]) != split:
            continue
        dicom, study, subject = row["dicom_id"], row["study_id"], row["subject_id"]
        rank = ranks.get(dicom, UNKNOWN)
        if source.views == "frontal" and rank >= NOT_FRONTAL:
            # A study without a frontal view is not asked about.
            unknown += rank == UNKNOWN
            continue
        image = source.image_root() / mimic_image(subject, study, dicom)
        studies[subject, study].append((rank, image))
    if unknown:
        warn0(
            f"{table}: {unknown} images of {split}, whose view is unknown, are left out "
            f"(data.views=frontal)"
        )
    images = {}
    for study, ranked in studies.items():
        ordered = [image for _, image in sorted(ranked)]
        images[study] = ordered[:1] if source.views == "frontal" else ordered
    return images


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
        # Where the position is empty, the code may say it.
        view = row["ViewPosition"] or row.get("ViewCodeSequence_CodeMeaning", "")
        known = NOT_FRONTAL if view.strip() else UNKNOWN
        ranks[row["dicom_id"]] = RANKS.get(view.strip().upper(), known)
    return ranks


@lru_cache(maxsize=1)
def ranks_beside(root, skip):
    """The ranks that R2Gen's file lacks. Raises InputError."""
    try:
        return read_ranks(root, skip)
    except InputError as error:
        raise InputError(
            f"{root}/annotation.json does not say which images are frontal ({error}); copy the "
            f"metadata CSV of MIMIC-CXR-JPG there, or set data.views=all"
        ) from None


def first_frontal(root, skip, images):
    """The first frontal image of R2Gen's, whose files are named by their dicom, in a list."""
    ranks = ranks_beside(root, skip)
    return [path for path in images if ranks.get(path.stem, UNKNOWN) < NOT_FRONTAL][:1]


def read_sections(root, skip):
    """study -> report of mimic_cxr_sectioned.csv; None without the file."""
    paths = list(root.glob("mimic_cxr_sectioned.csv*"))
    if not paths:
        return None
    reports = {}
    for row in read_csv(paths[0], skip, "study", "findings", "impression"):
        study = row["study"].removeprefix("s")
        sections = [row["findings"], row["impression"], row.get("last_paragraph", "")]
        reports[study] = next((text for text in sections if text.strip()), "")
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
    """The findings of a MIMIC-CXR report, else what follows the name of the examination, else the
    impression, else "".

    "LUNGS:" and the like are no sections: they stay in the findings.
    """
    headings = [(m, section_of(m[1])) for m in HEADING.finditer(text)]
    headings = [(m, kind) for m, kind in headings if kind]
    bodies = {}
    for k, (match, kind) in enumerate(headings):
        end = headings[k + 1][0].start() if k + 1 < len(headings) else len(text)
        body = text[match.end() : end]
        enough = MIN_WORDS if kind == "examination" else 1
        if len(body.split()) >= enough:
            bodies.setdefault(kind, body)
    kinds = ("findings", "examination", "impression")
    return next((bodies[kind] for kind in kinds if kind in bodies), "")


def section_of(heading):
    """findings, impression, examination, other, or "" for what is no section."""
    name = heading.strip().upper()
    for kind, names in SECTIONS.items():
        # Dictated words are sometimes misspelt.
        if difflib.get_close_matches(name, names, n=1, cutoff=0.85):
            return kind
    examination = re.search(r"\b(CHEST|VIEWS?|RADIOGRAPHS?)\b", heading)
    return "examination" if examination and heading.isupper() else ""
