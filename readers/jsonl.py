"""Your own data: SPLIT.jsonl, one JSON object a line.

{"id", "images": [paths from the folder], "report": text} is a report;
{"id", "images", "phrase": text, "boxes": [[x1, y1, x2, y2], ...]} asks for boxes, which are
fractions of the image. Optional: "question", "thinking", "patient".
"""

from pathlib import Path

from readers.study import MALFORMED, Asked, Skip, Studies, Study, parse_json, patient_of, read_lines
from runtime.config import Source


def read(source: Source, split: str, skip: Skip) -> Studies:
    path = Path(source.path) / f"{split}.jsonl"
    for n, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {n}"
        try:
            yield parse_line(line, source, where)
        except (*MALFORMED, AttributeError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            skip(
                f"{where}: expected an object with id, images and report, or phrase and boxes "
                f"[[x1, y1, x2, y2], ..] ({reason})"
            )


def parse_line(line, source, where):
    row = parse_json(line)
    names = row["images"]
    if not isinstance(names, list):
        raise ValueError("images: expected a list of paths")
    images = [source.image_root() / name for name in names]
    patient = patient_of(names[0], source.path, text_of(row, "patient")) if names else ""
    asked = parse_question(row)
    return Study(asked.id, patient, images, where, asked=[asked])


def parse_question(row):
    if "report" in row and "phrase" in row:
        raise ValueError("report and phrase are two examples, with an id each")
    asked = Asked(str(row["id"]), "report")
    if "report" in row:
        report = row["report"] if isinstance(row["report"], str) else ""
        asked.answer = " ".join(report.split())
    elif "phrase" in row:
        asked.task = "grounding"
        asked.kind = "phrase"
        asked.label = str(row["phrase"])
        asked.boxes = [tuple(map(float, box)) for box in row["boxes"]]
    else:
        raise ValueError(f"neither report nor phrase in {', '.join(row)}")
    asked.question = text_of(row, "question")
    asked.thinking = text_of(row, "thinking")
    if "think>" in asked.thinking:
        raise ValueError("thinking: the format's tags are added; leave them out")
    return asked


def text_of(row, key):
    """Nothing for what is missing: no such key, null, or a NaN of pandas."""
    value = row.get(key)
    return "" if value is None or value != value else str(value)
