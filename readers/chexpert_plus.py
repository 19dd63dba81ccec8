"""CheXpert Plus: reports, and labels for classification.

df_chexpert_plus_240401.csv, and the images as PNG or as the JPEG of CheXpert, in train/ and valid/
of the folder or of its PNG/. The report is the findings, else the impression. Labels are those of
chexbert_labels/report_fixed.json, where it is there; uncertain ones are findings, too, as RadVLM
takes those of CheXpert. The official valid split is val; there is no test split.
"""

from pathlib import Path

from readers.study import (
    MALFORMED,
    Skip,
    Studies,
    Study,
    choose_views,
    find,
    findings_of,
    first_file,
    locate,
    parse_json,
    read_csv,
    read_lines,
    split_name,
)
from runtime.config import Source

COLUMNS = ("path_to_image", "frontal_lateral", "deid_patient_id", "split")
# As the archive of the PNG unpacks.
FOLDERS = ("", "PNG", "PNG/PNG")
SECTIONS = ("section_findings", "section_impression")


def read(source: Source, split: str, skip: Skip) -> Studies:
    table = locate(source, "df_chexpert_plus_*.csv")
    labels = read_labels(find(source, "chexbert_labels/report_fixed.json"), skip)
    studies = {}
    for row in read_csv(table, skip, *COLUMNS, *SECTIONS):
        if split_name(row["split"]) != split:
            continue
        # train/patient1/study1/view1_frontal.jpg, which may be a .png
        path = Path(row["path_to_image"])
        if not path.name:
            skip(f"{table}: a row of patient {row['deid_patient_id']} has no path_to_image")
            continue
        file = first_file(source.image_root(), FOLDERS, path, path.with_suffix(".png"))
        name = str(path.parent)
        report, impression = (row[section].strip() for section in SECTIONS)
        study = Study(name, f"chexpert/{row['deid_patient_id']}", [], f"{table}, {name}")
        study.report = report or impression
        study.findings = labels.get(str(path))
        studies.setdefault(name, study).images.append((row["frontal_lateral"], file))
    yield from choose_views(studies.values(), source, f"{table}, {split}")


def read_labels(path, skip):
    """image -> its observations, of JSON lines."""
    labels = {}
    for n, line in enumerate(read_lines(path) if path else (), 1):
        try:
            row = parse_json(line)
            labels[row["path_to_image"]] = findings_of(row, 1, -1)
        except (*MALFORMED, RecursionError) as error:
            skip(f"{path}, line {n}: expected path_to_image and the 14 labels ({error!r})")
    return labels
