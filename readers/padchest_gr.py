"""PadChest-GR: reports of English sentences, and the boxes of the abnormal ones.

grounded_reports_*.json. The split is that of master_table.csv; without the file, studies are
divided by hash_split, as only the table knows the patients.
"""

from readers.study import (
    MALFORMED,
    Skip,
    Studies,
    Study,
    find,
    first_file,
    locate,
    normalize_box,
    of_split,
    read_csv,
    read_list,
    split_name,
)
from runtime.config import Source

FOLDERS = ("PadChest_GR", "images_grounding", "Padchest_GR_files", "images", "")


def read(source: Source, split: str, skip: Skip) -> Studies:
    path = locate(source, "grounded_reports*.json")
    table = read_table(find(source, "master_table.csv"), skip)
    studies = []
    for n, row in enumerate(read_list(path, "studies")):
        where = f"{path}, [{n}]"
        try:
            study = parse_row(row, where)
        except MALFORMED as error:
            skip(f"{where}: expected an object with ImageID and findings ({error!r})")
            continue
        image = study.id
        known, _ = table.get(image, (None, None))
        study.patient = f"padchest/{known or image.split('_')[0]}"
        study.images = [first_file(source.image_root(), FOLDERS, image)]
        studies.append(study)
    if not table:
        yield from of_split(studies, split)
        return
    for study in studies:
        if study.id in table and table[study.id][1] == split:
            yield study


def parse_row(row, where):
    """A study without its patient and image."""
    study = Study(str(row["ImageID"]), "", [], where, report="", complete=True)
    for finding in row["findings"]:
        text = str(finding["sentence_en"]).rstrip(". ")
        if text.strip():
            study.report += f" {text}."
        boxes = [normalize_box(box, 1, 1) for box in finding.get("boxes") or ()]
        if not finding["abnormal"]:
            continue
        if boxes:
            study.boxes.setdefault(("phrase", text), []).extend(boxes)
        else:
            study.complete = False
    return study


def read_table(path, skip):
    """image -> (patient, split). The table has a row per label."""
    table = {}
    if path:
        for row in read_csv(path, skip, "ImageID", "split"):
            table[row["ImageID"]] = row.get("PatientID"), split_name(row["split"])
    return table
