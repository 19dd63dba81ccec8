"""PadChest-GR: reports of English sentences, and the boxes of the abnormal ones.

grounded_reports_*.json. The split is that of master_table.csv; without the file, studies are
divided by hash_split, as only the table knows the patients.
"""

from pathlib import Path

from readers.study import Study, first_file, locate, normalize_box, of_split, read_csv, read_json

FOLDERS = ("PadChest_GR", "images_grounding", "Padchest_GR_files", "images", "")


def read(source, split, skip):
    root = Path(source.path)
    path = locate(root, "grounded_reports*.json")
    splits, patients = read_table(root / "master_table.csv", skip)
    studies = []
    for n, row in enumerate(read_json(path)):
        where = f"{path}, [{n}]"
        try:
            image = str(row["ImageID"])
            sentences = [parse_sentence(finding) for finding in row["findings"]]
        except (KeyError, TypeError, ValueError) as error:
            skip(f"{where}: expected an object with ImageID and findings ({error!r})")
            continue
        patient = f"padchest/{patients.get(image) or image.split('_')[0]}"
        report = " ".join(text.rstrip(". ") + "." for text, *_ in sentences if text.strip())
        study = Study(image, patient, [first_file(root, FOLDERS, image)], where, report)
        study.complete = all(boxes for _, abnormal, boxes in sentences if abnormal)
        for text, abnormal, boxes in sentences:
            if abnormal and boxes:
                study.boxes.setdefault(("phrase", text.rstrip(". ")), []).extend(boxes)
        studies.append(study)
    if splits:
        yield from (study for study in studies if splits.get(study.id) == split)
    else:
        yield from of_split(studies, split)


def parse_sentence(finding):
    boxes = [normalize_box(box, 1, 1) for box in finding.get("boxes") or ()]
    return str(finding["sentence_en"]), bool(finding["abnormal"]), boxes


def read_table(path, skip):
    """Split and patient of each image. The table has a row per label."""
    splits, patients = {}, {}
    if path.is_file():
        for row in read_csv(path, ["ImageID", "split"], skip):
            splits[row["ImageID"]] = row["split"].replace("validation", "val")
            patients[row["ImageID"]] = row.get("PatientID")
    return splits, patients
