"""IU X-Ray: reports.

As R2Gen distributes it (annotation.json, images/), as Kaggle does (two CSV files, and
images_normalized/ or images/images_normalized/), or as OpenI does (ecgen-radiology/*.xml,
NLMCXR_png/). The latter two have no split (see hash_split) and keep the original sections: the
report is the findings, else the impression. R2Gen and OpenI do not say which view an image is: the
first by name counts as frontal, which is wrong for one study of OpenI in ten.
"""

from xml.etree import ElementTree

from readers.r2gen import read_r2gen
from readers.study import (
    Skip,
    Studies,
    Study,
    choose_views,
    first_file,
    hash_split,
    locate,
    read_csv,
)
from runtime.config import Source

# The reports of Kaggle, and of OpenI.
REPORTS = "indiana_reports.csv"
TEXTS = "ecgen-radiology/*.xml"


def read(source: Source, split: str, skip: Skip) -> Studies:
    path = locate(source, "annotation.json", REPORTS, TEXTS)
    if path.name == "annotation.json":
        studies = list(read_r2gen(source, path, split, skip, r2gen_patient))
        for study in studies:
            study.images = usual_views(study.images)
    else:
        read_all = read_kaggle if path.name == REPORTS else read_openi
        everyone = list(read_all(source, path, skip))
        # A study is a patient here.
        splits = hash_split(study.id for study in everyone)
        studies = [study for study in everyone if splits[study.id] == split]
    yield from choose_views(studies, source, f"{path}, {split}")


def r2gen_patient(row):
    study, *_ = str(row["id"]).split("_")
    return "iu/" + study.removeprefix("CXR")


def usual_views(images):
    """(view, path) of each, where the first is frontal."""
    return [("lateral" if k else "frontal", image) for k, image in enumerate(images)]


def read_kaggle(source, path, skip):
    studies = {}
    for row in read_csv(path, skip, "uid", "findings", "impression"):
        uid = row["uid"]
        findings = row["findings"].strip()
        where = f"{path}, uid {uid}"
        studies[uid] = Study(uid, f"iu/{uid}", [], where, findings or row["impression"])

    folders = ("images_normalized", "images/images_normalized", "")
    path = locate(source, "indiana_projections.csv")
    for row in read_csv(path, skip, "uid", "filename", "projection"):
        image = first_file(source.image_root(), folders, row["filename"])
        if row["uid"] in studies:
            studies[row["uid"]].images.append((row["projection"], image))
    return studies.values()


def read_openi(source, path, skip):
    for file in sorted(path.parent.glob("*.xml")):
        try:
            tree = ElementTree.parse(file)
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
            skip(f"{file}: not valid XML ({error})")
            continue
        sections = {}
        for part in tree.iter("AbstractText"):
            name = part.get("Label")
            sections[name] = " ".join(part.itertext())
        findings = sections.get("FINDINGS", "").strip()
        report = findings or sections.get("IMPRESSION", "")
        images = []
        for image in tree.iter("parentImage"):
            name = f"{image.get('id')}.png"
            images.append(first_file(source.image_root(), ("NLMCXR_png", ""), name))
        views = usual_views(sorted(images))
        yield Study(file.stem, f"iu/{file.stem}", views, str(file), report)
