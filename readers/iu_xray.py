"""IU X-Ray: reports.

As R2Gen distributes it (annotation.json, images/), as Kaggle does (two CSV files,
images_normalized/), or as OpenI does (ecgen-radiology/*.xml, NLMCXR_png/). The latter two have no
split (see hash_split) and keep the original sections: the report is the findings, else the
impression. OpenI does not say which view an image is: the first by name counts as frontal, which is
wrong for one study in ten.
"""

from pathlib import Path
from xml.etree import ElementTree

from readers.r2gen import is_r2gen, read_r2gen
from readers.study import Study, hash_split, locate, read_csv


def read(source, split, skip):
    root = Path(source.path)
    if is_r2gen(root):
        yield from read_r2gen(root, split, source.views, skip, r2gen_patient)
        return
    if (root / "indiana_reports.csv").is_file():
        studies = read_kaggle(root, skip)
    else:
        locate(root, "annotation.json", "indiana_reports.csv", "ecgen-radiology/*.xml")
        studies = read_openi(root, skip)
    splits = hash_split(studies)
    for uid, (report, views, where) in studies.items():
        if splits[uid] != split:
            continue
        images = [image for _, image in views]
        if source.views == "frontal":
            images = [image for view, image in views if view.lower() == "frontal"][:1]
        yield Study(uid, f"iu/{uid}", images, where, report)


def r2gen_patient(row):
    return "iu/" + str(row["id"]).split("_")[0].removeprefix("CXR")


def read_kaggle(root, skip):
    """uid -> (report, views, where)"""
    views = {}
    projections = root / "indiana_projections.csv"
    for row in read_csv(projections, ["uid", "filename", "projection"], skip):
        image = root / "images_normalized" / row["filename"]
        views.setdefault(row["uid"], []).append((row["projection"].strip(), image))
    path = root / "indiana_reports.csv"
    studies = {}
    for row in read_csv(path, ["uid", "findings", "impression"], skip):
        uid = row["uid"]
        report = row["findings"].strip() or row["impression"]
        studies[uid] = report, sorted(views.get(uid, [])), f"{path}, uid {uid}"
    return studies


def read_openi(root, skip):
    """uid -> (report, views, where)"""
    studies = {}
    for path in sorted((root / "ecgen-radiology").glob("*.xml")):
        try:
            tree = ElementTree.parse(path)
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:
            skip(f"{path}: not valid XML ({error})")
            continue
        sections = {t.get("Label"): " ".join(t.itertext()) for t in tree.iter("AbstractText")}
        report = sections.get("FINDINGS", "").strip() or sections.get("IMPRESSION", "")
        names = [image.get("id") for image in tree.iter("parentImage")]
        images = sorted(root / "NLMCXR_png" / f"{name}.png" for name in names)
        views = [("Lateral" if n else "Frontal", image) for n, image in enumerate(images)]
        uid = next((u.get("id") for u in tree.iter("uId")), path.stem).removeprefix("CXR")
        studies[uid] = report, views, str(path)
    return studies
