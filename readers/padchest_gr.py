"""PadChest-GR: reports of English sentences, and the boxes of the abnormal ones.

grounded_reports_*.json. The split is that of master_table.csv; without the file, studies are
divided by hash_split, as only the table knows the patients.
"""

from pathlib import Path

from readers.study import Study, first_file, hash_split, locate, normalize_box, read_csv, read_json

FOLDERS = ("PadChest_GR", "images_grounding", "Padchest_GR_files", "images", "")


def read(source, split, skip):
    root = Path(source.path)
    path = locate(root, "grounded_reports*.json")
    splits, patients = read_table(root / "master_table.csv", skip)
    rows = []
    for n, row in enumerate(read_json(path)):
        where = f"{path}, [{n}]"
        try:
            image = str(row["ImageID"])
            sentences = [parse_sentence(finding) for finding in row["findings"]]
        except (KeyError, TypeError, ValueError) as error:
            skip(f"{where}: expected an object with ImageID and findings ({error!r})")
            continue
        patient = f"padchest/{patients.get(image) or image.split('_')[0]}"
        rows.append((image, patient, sentences, where))
    by_patient = {} if splits else hash_split(patient for _, patient, *_ in rows)
    for image, patient, sentences, where in rows:
        if (splits.get(image) or by_patient.get(patient)) != split:
            continue
        report = " ".join(text.rstrip(". ") + "." for text, *_ in sentences if text.strip())
        boxes = {}
        for text, abnormal, found in sentences:
            if abnormal and found:
                boxes.setdefault(("phrase", text.rstrip(". ")), []).extend(found)
        complete = all(found for _, abnormal, found in sentences if abnormal)
        file = first_file(root, image, FOLDERS)
        yield Study(image, patient, [file], where, report, boxes=boxes, complete=complete)


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
