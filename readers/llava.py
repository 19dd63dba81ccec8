"""Conversations in LLaVA's format, as RadVLM's tools write them.

SPLIT.json, or one *.json that is divided by patients. Each turn asks a question, with the turns
before it as its history. A turn whose answer has boxes is grounding, one that asks for a report is
a report, the others are for SFT alone. An image whose <image> stands in a later turn is seen from
there on. Texts are kept, but boxes in thousandths or pixels become fractions of the image.
"""

import math
import re
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, chain

from readers.study import (
    BOX,
    IMAGE,
    MALFORMED,
    Asked,
    Skip,
    Studies,
    Study,
    box_text,
    clean_boxes,
    first_file,
    image_size,
    normalize_box,
    of_split,
    parse_boxes,
    patient_of,
    read_list,
    split_json,
)
from runtime.config import InputError, Source
from runtime.output import warn_once

# "Document the findings.", "Can you write a report?", but not "Where are the findings?" or "Can you
# report where they are?"
ASKS_FOR_REPORT = re.compile(
    r"""(?:^|[.!?,:\n]|\band\b|\bthen\b)\s*(?:(?:please|then|now)\s+)*(?:
        report\b
      | (?:analy[sz]e|compose|create|describe|document|draft|generate|give|interpret|offer|outline
          |prepare|produce|provide|read|summari[sz]e|write)\b
        [^.!?]*\b(?:report|findings|analysis|description|interpretation)\b
      | (?:analy[sz]e|describe|interpret|read)\s+(?:what\s+)?th(?:e|is)\s+
        (?:chest\s+)?(?:image|radiograph|x-?ray|scan)\b
      | what\ are\ the\ (?:\w+\s)?findings\b
      | (?:can|could|would|will)\s+you\b[^.!?]*\ba\b[^.!?]*\breport\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
# A box with a larger number, which would reach far outside, is no fractions of the image.
FRACTION = 2


def read(source: Source, split: str, skip: Skip) -> Studies:
    path, alone = split_json(source, split)
    paths = [path] if alone else split_files(source)
    large = list(chain.from_iterable(large_in(path, source.image_root()) for path in paths))
    pixels = are_pixels(large)
    if large:
        unit = "pixels" if pixels else "thousandths of the image"
        text = f"{path.parent}: {len(large)} boxes have numbers above 1, which are read as {unit}"
        warn_once(text, text)
    studies = []
    for n, row in enumerate(read_list(path, "conversations")):
        where = f"{path}, [{n}]"
        try:
            names, turns = parse_conversation(row)
            patient = patient_of(names[0], source.path)
            images = [first_file(source.image_root(), ("", "images"), name) for name in names]
            scale = image_size(images[0]) if pixels and large_boxes(turns) else (1000, 1000)
        except InputError as error:
            skip(f"{where}: {error}")
            continue
        except MALFORMED as error:
            skip(
                f"{where}: expected an object with image and conversations of human and gpt "
                f"({error!r})"
            )
            continue
        study = Study(str(row.get("id", n)), patient, images, where)
        studies += ask_turns(study, turns, scale, skip)
    yield from of_split(studies, split) if alone else studies


def parse_conversation(row):
    """The names of the images, and (question, answer) of each turn."""
    turns = row["conversations"]
    texts = [turn["value"] for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a value that is no text")
    speakers = [turn["from"] for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError("turns of human and gpt in turn")
    texts[0] = texts[0].replace(IMAGE, "").strip()
    image = row["image"]
    names = [image] if isinstance(image, str) else list(map(str, image))
    if "".join(texts).count(IMAGE) > len(names):
        raise ValueError(f"more {IMAGE} than images")
    return names, list(zip(texts[::2], texts[1::2]))


def split_files(source):
    """The files of all splits: a unit that was found for each by itself could differ."""
    found = []
    for split in ("train", "val", "test"):
        try:
            found.append(split_json(source, split)[0])
        except InputError:
            continue
    return found


@lru_cache
def large_in(path, root):
    """[(box, size of its image)] of the boxes of a file that are no fractions of the image."""
    found = []
    for row in read_list(path, "conversations"):
        try:
            names, turns = parse_conversation(row)
            boxes = large_boxes(turns)
            size = image_size(first_file(root, ("", "images"), names[0])) if boxes else None
        except MALFORMED:
            # Said where the row is read.
            continue
        found += [(box, size) for box in boxes]
    return found


def large_boxes(turns):
    """The boxes of a conversation that are no fractions of the image."""
    boxes = parse_boxes(" ".join(chain.from_iterable(turns)))
    return [box for box in boxes if max(box) > FRACTION]


def are_pixels(large):
    """Are these boxes, [(box, size of its image)], pixels? Else they are thousandths.

    No number of thousandths is above 1000. Without such numbers, boxes are pixels if no image has
    more than 1000 of them on a side, and each box lies in its image.
    """
    small = all(max(size) <= 1000 for _, size in large)
    inside = all(max(normalize_box(box, *size)) <= 1.01 for box, size in large)
    return (small and inside) or any(max(box) > 1000 for box, _ in large)


def ask_turns(study, turns, scale, skip):
    """A question for each turn of human and gpt: a study for each number of images seen so far."""
    shown = [question.count(IMAGE) for question, _ in turns]
    # Images without a marker in a later turn are seen from the first on.
    shown[0] = len(study.images) - sum(shown)
    parts = {}
    history = ()
    for k, ((question, answer), seen) in enumerate(zip(turns, accumulate(shown))):
        question, _ = to_fractions(question, scale, study.where, skip)
        answer, boxes = to_fractions(answer, scale, study.where, skip)
        item = Asked(f"{study.id}-{k}", "classification", question, answer, boxes, history=history)
        if boxes:
            item.task = "grounding"
            item.kind = "phrase"
            item.label = question
        elif ASKS_FOR_REPORT.search(question):
            item.task = "report"
        part = replace(study, images=study.images[:seen], asked=[])
        parts.setdefault(seen, part).asked.append(item)
        history += ((question, answer),)
    return parts.values()


def to_fractions(text, scale, where, skip):
    """The text with its boxes as fractions of the image, and these boxes. What is no box stays."""
    boxes = []

    def convert(match):
        given = tuple(map(float, match.groups()))
        if not all(map(math.isfinite, given)):
            return match[0]
        fractions = normalize_box(given, *(scale if max(given) > FRACTION else (1, 1)))
        kept = clean_boxes([fractions], where, skip)
        boxes.extend(kept)
        for box in kept or [fractions]:
            return match[0] if box == given else box_text(box)

    return BOX.sub(convert, text), boxes
