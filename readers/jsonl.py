"""Your own data: SPLIT.jsonl, one JSON object a line.

{"id", "images": [paths from the folder], "report": text} is a report;
{"id", "images", "phrase": text, "boxes": [[x1, y1, x2, y2], ...]} asks for boxes, which are
fractions of the image. Optional: "question", "thinking", "patient".
"""

import json
from pathlib import Path

from readers.study import Asked, Study, read_lines


def read(source, split, skip):
    path = Path(source.path) / f"{split}.jsonl"
    for n, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {n}"
        try:
            yield parse_line(line, source, where)
        except json.JSONDecodeError as error:
            skip(f"{where}: not valid JSON ({error})")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            skip(
                f"{where}: expected an object with id, images and report, or phrase and boxes "
                f"[[x1, y1, x2, y2], ..] ({reason})"
            )


def parse_line(line, source, where):
    row = json.loads(line)
    if not isinstance(row["images"], list):
        raise ValueError("images: expected a list of paths")
    if "report" in row and "phrase" in row:
        raise ValueError("report and phrase are two examples, with an id each")
    if "report" in row:
        report = row["report"] if isinstance(row["report"], str) else ""
        asked = Asked(str(row["id"]), "report", answer=" ".join(report.split()))
    elif "phrase" in row:
        boxes = [tuple(map(float, box)) for box in row["boxes"]]
        phrase = str(row["phrase"])
        asked = Asked(str(row["id"]), "grounding", boxes=boxes, label=phrase, kind="phrase")
    else:
        raise ValueError(f"neither report nor phrase in {', '.join(row)}")
    asked.question = str(row.get("question") or "")
    asked.thinking = str(row.get("thinking", ""))
    images = [source.image_root() / image for image in row["images"]]
    patient = f"{Path(source.path)}/{row['patient']}" if row.get("patient") else ""
    return Study(asked.id, patient, images, where, asked=[asked])
