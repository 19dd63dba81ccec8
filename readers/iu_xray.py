"""IU X-Ray: reports.

As R2Gen distributes it (annotation.json, images/), as Kaggle does (two CSV files, and
images_normalized/ or images/images_normalized/), or as OpenI does (ecgen-radiology/*.xml,
NLMCXR_png/). The latter two have no split (see hash_split) and keep the original sections: the
report is the findings, else the impression. OpenI does not say which view an image is: the first by
name counts as frontal, which is wrong for one study in ten.
"""

from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from readers.r2gen import read_r2gen
from readers.study import Skip, Studies, Study, first_file, hash_split, locate, read_csv
from runtime.config import Source

# The reports of Kaggle, and of OpenI.
REPORTS = "indiana_reports.csv"
TEXTS = "ecgen-radiology/*.xml"


def read(source: Source, split: str, skip: Skip) -> Studies:
    root = Path(source.path)
    path = locate(root, "annotation.json", REPORTS, TEXTS)
    if path.name == "annotation.json":
        yield from read_r2gen(source, split, skip, r2gen_patient)
        return
    read_all = read_kaggle if path.name == REPORTS else read_openi
    studies = list(read_all(source, skip))
    # A study is a patient here.
    splits = hash_split(study.id for study in studies)
    for study in studies:
        if source.views == "frontal":
            study.images = study.images[:1]
        if splits[study.id] == split:
            yield study


def r2gen_patient(row):
    study, *_ = str(row["id"]).split("_")
    return "iu/" + study.removeprefix("CXR")


def read_kaggle(source, skip):
    images = defaultdict(list)
    folders = ("images_normalized", "images/images_normalized", "")
    root = Path(source.path)
    path = root / "indiana_projections.csv"
    rows = read_csv(path, skip, "uid", "filename", "projection")
    for row in rows:
        view = row["projection"].strip()
        if source.views != "frontal" or view.lower() == "frontal":
            image = first_file(source.image_root(), folders, row["filename"])
            images[row["uid"]].append((view, image))

    path = root / REPORTS
    rows = read_csv(path, skip, "uid", "findings", "impression")
    for row in rows:
        uid = row["uid"]
        findings = row["findings"].strip()
        # In the order of the names of the views.
        ordered = [image for _, image in sorted(images[uid])]
        where = f"{path}, uid {uid}"
        yield Study(uid, f"iu/{uid}", ordered, where, findings or row["impression"])


def read_openi(source, skip):
    folders = ("NLMCXR_png", "")
    for path in sorted(Path(source.path).glob(TEXTS)):
        try:
            tree = ElementTree.parse(path)
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
            skip(f"{path}: not valid XML ({error})")
            continue
        sections = {}
        for part in tree.iter("AbstractText"):
            name = part.get("Label")
            sections[name] = " ".join(part.itertext())
        findings = sections.get("FINDINGS", "").strip()
        report = findings or sections.get("IMPRESSION", "")
        images = []
        for image in tree.iter("parentImage"):
            name = image.get("id")
            images.append(first_file(source.image_root(), folders, f"{name}.png"))
        uid = path.stem
        yield Study(uid, f"iu/{uid}", sorted(images), str(path), report)
