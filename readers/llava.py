"""Conversations in LLaVA's format, as RadVLM's tools write them.

SPLIT.json, or one *.json that is divided by patients. Texts are kept as they are; each turn asks a
question, with the turns before it as its history. A turn whose answer has boxes is grounding, one
that asks for a report or findings is a report, the others are for SFT alone.
"""

import re
from pathlib import Path

from readers.study import (
    MALFORMED,
    Asked,
    Skip,
    Studies,
    Study,
    first_file,
    locate,
    of_split,
    parse_boxes,
    patient_of,
    read_list,
)
from runtime.config import Source

# A question with yes or no for an answer asks for no report. "Document the findings." does.
ASKS_FOR_REPORT = re.compile(
    r"(?is)(?!(is|are|does|do|can|could)\b).*\b(report|findings|detailed (analysis|description))\b"
)


def read(source: Source, split: str, skip: Skip) -> Studies:
    root, images = Path(source.path), source.image_root()
    files = list(root.glob("*.json"))
    alone = len(files) == 1
    path = files[0] if alone else locate(source, f"{split}.json", f"*{split}*.json")
    studies = []
    for n, row in enumerate(read_list(path, "conversations")):
        where = f"{path}, [{n}]"
        try:
            names, turns = parse_conversation(row)
            name = str(row.get("id", n))
        except MALFORMED as error:
            skip(
                f"{where}: expected an object with image and conversations of human and gpt "
                f"({error!r})"
            )
            continue
        files = [first_file(images, ("", "images"), name) for name in names]
        patient = patient_of(names[0], root)
        studies.append(
            Study(name, patient, files, where, asked=questions(name, turns, where, skip))
        )
    yield from of_split(studies, split) if alone else studies


def parse_conversation(row):
    """The names of the images, and (question, answer) of each turn."""
    turns = row["conversations"]
    texts = [str(turn["value"]) for turn in turns]
    speakers = [turn["from"] for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError("turns of human and gpt in turn")
    image = row["image"]
    names = [image] if isinstance(image, str) else list(map(str, image))
    if not names:
        raise ValueError("no image")
    return names, list(zip(texts[::2], texts[1::2]))


def questions(name, turns, where, skip):
    """A question for each turn of human and gpt."""
    asked = []
    history = ()
    for k, (question, answer) in enumerate(turns):
        question = question.replace("<image>", "").strip()
        item = Asked(f"{name}-{k}", "classification", question, answer, history=history)
        boxes = parse_boxes(answer)
        if any(max(box) > 2 for box in boxes):
            skip(
                f"{where}: the boxes of turn {k + 1} are pixels or thousandths; convert them to "
                f"fractions of the image, from 0 to 1"
            )
            continue
        item.boxes = [box for box in boxes if min(box) >= 0 and max(box) <= 1]
        if item.boxes:
            item.task = "grounding"
            item.kind = "phrase"
            item.label = question
        elif ASKS_FOR_REPORT.match(question):
            item.task = "report"
        asked.append(item)
        history += ((question, answer),)
    return asked
