"""What is asked and what is answered: examples, output formats, mixtures, splits, order.

  Example, open_images              one question about one study; images are opened when needed
  prompt_text, target_text          what the model is asked and what it should say, in 3 formats
  parse_output, parse_boxes         the way back: from what a model wrote to answer and boxes (the
                                    latter is that of readers/study.py)
  study_examples                    the questions about a study that a reader has found
  with_traces                       thinking traces for the cold start
  load_split                        all examples of a split, from all sources, without leaks
  indices, by_study, grpo_batch     which examples make up step t: a function of seed and t

The data flow one way: files -> Study (readers/) -> Example. Nothing here needs torch.
"""

import hashlib
import importlib
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from readers import phantom as phantoms
from readers.phantom import phantom  # noqa: F401
from readers.study import (
    IMAGE,
    LABELS,  # noqa: F401
    UNREADABLE_IMAGE,
    Asked,
    Box,
    Skip,
    Study,
    box_text,
    clean_boxes,
    parse_boxes,  # noqa: F401
    parse_json,
    pick,
    read_lines,
)
from runtime.config import Config, InputError, Source
from runtime.output import moved, progress, warn0

# ------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """One question about one study."""

    id: str
    # How it is answered and scored: "report" | "grounding" | "classification" (SFT only)
    task: str
    # Paths, or phantoms.
    images: tuple
    question: str
    # The reference report, or the reference boxes as text.
    answer: str
    # A reasoning trace, where the data have one.
    thinking: str = ""
    # Grounding: () = not there.
    boxes: tuple[Box, ...] = ()
    # Grounding: what is asked for.
    label: str = ""
    patient: str = ""
    # Output format: plain | tags | suffix, see target_text.
    style: str = "plain"
    # Grounding: "abnormality" | "anatomy" | "phrase" | "detection"
    kind: str = ""
    # Earlier (question, answer) of the same conversation.
    history: tuple = ()
    # Which copy of a study that comes up several times in an epoch.
    copy: int = 0


def is_path(image: Any) -> bool:
    """Images are paths, or phantoms that draw themselves."""
    return isinstance(image, (str, Path))


def open_image(image: Any) -> Image.Image:
    """An image of an example as RGB, opened or drawn now."""
    return load_image(image) if is_path(image) else image.image.convert("RGB")


def open_images(example: Example) -> list[Image.Image]:
    return [open_image(image) for image in example.images]


def load_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB. 16-bit and float files are scaled from their own range."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except UNREADABLE_IMAGE as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable image ({reason})") from None

    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(pixels).all():
            raise InputError(f"{path}: the image has pixels that are not finite")
        pixels = pixels - pixels.min()
        image = Image.fromarray(np.uint8(255 * pixels / max(pixels.max(), 1e-12)))
    return image.convert("RGB")


def batched(items: Sequence, size: int) -> list:
    """Consecutive pieces of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


# ------------------------------------------------------------------------------- output formats

ANSWER_TAG = {"report": "report", "grounding": "answer", "classification": "answer"}
TAGS = ("<think>", "</think>", "<report>", "</report>", "<answer>", "</answer>")
NOTHING_THERE = "It is not seen."


def style_of(config: Config) -> str:
    """The output format that a configuration asks for."""
    return config.data.think_format if config.data.thinking else "plain"


# What a model is told that has not learnt it from our SFT.
BOX_FORM = (
    "Give each box as [x1, y1, x2, y2] with numbers from 0 to 1, relative to the image's width and "
    "height. If there is none, say so."
)


def knows_boxes(config: Config) -> bool:
    """Has the policy seen our SFT, whose boxes have numbers from 0 to 1? GRPO with init=base has
    not, unless model.path is a checkpoint of ours."""
    # Only our checkpoints have this file.
    ours = os.path.exists(os.path.join(config.model.path, "training_state.pt"))
    return config.grpo.init != "base" or ours


def with_box_form(examples: list[Example], config: Config) -> list[Example]:
    """Questions for boxes state their form to a policy that does not know it."""
    if knows_boxes(config):
        return examples
    stated = []
    for e in examples:
        question = f"{e.question} {BOX_FORM}" if e.task == "grounding" else e.question
        stated.append(replace(e, question=question))
    return stated


def prompt_text(example: Example) -> str:
    """The user turn. `suffix` is RadVLM-GRPO's switch for thinking; `tags` is MRG-R1's format.

    load_split may have added BOX_FORM to the question.
    """
    if example.style == "tags":
        tag = ANSWER_TAG[example.task]
        return f"{example.question} Think in <think></think>, then answer in <{tag}></{tag}>."
    if example.style == "suffix":
        return f"{example.question} /think"
    return example.question


def target_text(example: Example) -> str:
    """What a supervised model should say, without the end-of-turn token."""
    if example.style == "tags":
        tag = ANSWER_TAG[example.task]
        return f"<think>{example.thinking}</think>\n<{tag}>{example.answer}</{tag}>"
    if example.style == "suffix":
        return f"{example.thinking}</think>\n{example.answer}"
    return example.answer


def after_opened_think(target: str) -> str:
    """The target where the chat template has written <think> already. Without thinking, the tag
    is closed first."""
    if target.startswith("<think>") or "</think>" in target:
        return target.removeprefix("<think>")
    return f"</think>\n\n{target}"


def parse_output(text: str, task: str, style: str) -> tuple[bool, str, str]:
    """(valid, thinking, answer) of a completion: the way back from target_text.

    Valid: the whole text has the format, each tag once and in order, no other tag, neither
    thinking nor answer empty. An empty pair of <think></think> is no thinking: a plain answer may
    follow it. A thinking style without </think> has no answer. Else invalid "tags" still answer if
    exactly one closed block follows </think>, and invalid "suffix" with what follows the last one.
    """
    text = text.strip()
    any_tag = "|".join(TAGS)
    if style == "plain":
        text = re.sub(r"^<think>\s*</think>\s*", "", text)
        valid = bool(text) and not re.search(any_tag, text)
        return valid, "", text

    if style == "suffix":
        # The prompt asks for the end tag only, but some models open the pair, too.
        text = text.removeprefix("<think>")
    tags = re.findall(any_tag, text)
    if "</think>" not in tags:
        return False, text, ""
    if style == "suffix":
        thinking, _, answer = map(str.strip, text.rpartition("</think>"))
        return bool(len(tags) == 1 and thinking and answer), thinking, answer

    tag = ANSWER_TAG[task]
    start, end = f"<{tag}>", f"</{tag}>"
    thinking, _, rest = text.partition("</think>")
    thinking = thinking.removeprefix("<think>").strip()
    # Texts and tags in turn.
    block = re.split(f"({start}|{end})", rest)
    if block[1::2] != [start, end]:
        return False, thinking, ""
    answer = block[2].strip()
    whole = len(tags) == 4 and re.fullmatch(f"<think>.*</think>\\s*{start}.*{end}", text, re.DOTALL)
    return bool(whole and thinking and answer), thinking, answer


def boxes_text(boxes: Sequence[Box]) -> str:
    """The papers' box format, "[0.12, 0.30, 0.45, 0.61], [...] and [...]". parse_boxes reads it."""
    if not boxes:
        return NOTHING_THERE
    *first, last = map(box_text, boxes)
    return f"{', '.join(first)} and {last}" if first else last


# ------------------------------------------------------------------------------- questions

# What data.tasks may name, and the task that it is.
TASK_OF = {
    "report": "report",
    "classification": "classification",
    "grounding": "grounding",
    "abnormality": "grounding",
    "anatomy": "grounding",
    "phrase": "grounding",
    "detection": "grounding",
}
QUESTIONS = {
    "report": (
        "Write the findings of this chest X-ray.",
        "Describe what this chest X-ray shows.",
        "Write a radiology report for this study.",
        "What are the findings in this chest X-ray?",
        "Report this chest radiograph.",
        "Give the findings section for this examination.",
        "Read this chest X-ray and write down your findings.",
        "Compose the findings of the report for these images.",
    ),
    "classification": (
        "List the findings.",
        "Which abnormalities are present?",
        "Name the abnormal findings in this chest X-ray.",
        "What is abnormal here?",
        "Which findings does this radiograph show?",
        "Enumerate the abnormalities, if any.",
    ),
    "abnormality": (
        "Where is the {}? Give its boxes.",
        "Locate the {} in the image.",
        "Give the boxes of the {}.",
        "Mark the {} with boxes.",
        "Find the {} and answer with its boxes.",
        "Which regions show the {}? Answer with boxes.",
    ),
    "anatomy": (
        "Where is the {}? Give its box.",
        "Locate the {} in the image.",
        "Give the box of the {}.",
        "Outline the {} with a box.",
        "Which region of the image is the {}? Answer with a box.",
        "Mark the {} with a box.",
    ),
    "phrase": (
        "Where is {}? Answer with boxes.",
        "Locate this finding and answer with boxes: {}",
        "Which region does this describe? Answer with boxes: {}",
        "Give the boxes for: {}",
        "Find where this is seen and give the boxes: {}",
        "Mark with boxes: {}",
    ),
    "detection": (
        "Where are abnormalities? Name each and give its boxes.",
        "Detect all abnormalities and give their boxes.",
        "Name and locate every abnormal finding with boxes.",
        "List the abnormal findings with their boxes.",
        "Mark everything abnormal: names and boxes.",
        "Find the abnormalities and give names and boxes.",
    ),
}
# About one region.
ANSWERS = ("{}", "It is at {}.", "The box is {}.", "{} in the image.")


def study_examples(
    study: Study, source: Source, split: str, seed: int, skip: Skip
) -> Iterator[Example]:
    """The questions that source.tasks ask about a study, and those that its dataset asks."""
    # "grounding" asks for all four kinds of boxes, "detection" for one of them.
    chosen = set(source.tasks)
    wanted = {kind for kind, task in TASK_OF.items() if {kind, task} & chosen}
    # What nobody asks about is not looked at. Detection asks about all boxes.
    study.asked = [a for a in study.asked if (a.kind or a.task) in wanted]
    if not (study.complete and "detection" in wanted):
        study.boxes = boxes_of_kinds(study, wanted)
    # It may find the boxes incomplete.
    clean_study(study, skip)
    asked = [*study.asked]
    if study.report is not None and "report" in wanted:
        asked.append(ask_report(study))
    if study.findings is not None and "classification" in wanted:
        asked.append(ask_findings(study))
    regions = boxes_of_kinds(study, wanted)
    detection = study.complete and "detection" in wanted
    if not (asked or regions or detection):
        return
    if problem := image_problem(study.images, source.image_root()):
        skip(f"{study.where}: {problem}")
        return

    # Training wordings vary with seed and id, held-out ones do not.
    key = int(hashlib.sha1(study.id.encode()).hexdigest()[:12], 16)
    rng = np.random.default_rng([seed, key])
    regions = one_anatomy(regions, rng)
    choose = partial(pick, rng) if split == "train" else itemgetter(0)

    images = tuple(str(image) if is_path(image) else image for image in study.images)
    about_regions = region_questions(study, regions, detection, choose)
    for item in chain(asked, about_regions):
        if item.task == "report" and not item.answer.strip():
            skip(f"{study.where}: the report is empty")
            continue
        # An Asked has the fields of an Example that are not those of its study.
        item.question = item.question or usual_question(item, choose)
        item.answer = answer_text(item)
        item.boxes = tuple(item.boxes)
        yield Example(images=images, patient=study.patient, **vars(item))


def boxes_of_kinds(study, kinds):
    """{(kind, name): boxes} of these kinds."""
    return {key: boxes for key, boxes in study.boxes.items() if key[0] in kinds}


def ask_report(study):
    """The report as one line."""
    return Asked(study.id, "report", answer=" ".join(study.report.split()))


def ask_findings(study):
    """A list of what is to be seen. For SFT only."""
    names = ", ".join(study.findings).lower() or "none"
    return Asked(f"{study.id}-list", "classification", answer=f"{names}.")


def region_questions(study, regions, detection, choose):
    """A question about each of the regions, {(kind, name): boxes}, and one about all."""
    for (kind, name), boxes in regions.items():
        answer = choose(ANSWERS).format(boxes_text(boxes))
        yield Asked(f"{study.id}-{name}", "grounding", "", answer, boxes, name, kind)
    if detection:
        yield ask_detection(study)


def ask_detection(study):
    """All abnormalities, each with its boxes."""
    places = [f"{name} {boxes_text(boxes)}" for (_, name), boxes in study.boxes.items()]
    answer = "; ".join(places) + "." if places else NOTHING_THERE
    boxes = list(chain.from_iterable(study.boxes.values()))
    return Asked(f"{study.id}-detect", "grounding", "", answer, boxes, "abnormalities", "detection")


def one_anatomy(regions, rng):
    """Only one of the anatomical regions. Every image has dozens: RadVLM asks for one, too."""
    others = [key for key in regions if key[0] == "anatomy"]
    if others:
        others.remove(pick(rng, others))
    return {key: boxes for key, boxes in regions.items() if key not in others}


def usual_question(asked, choose):
    """One of our wordings. A phrase keeps its capitals."""
    phrase = asked.label if asked.kind == "phrase" else asked.label.lower()
    return choose(QUESTIONS[asked.kind or asked.task]).format(phrase)


def answer_text(asked):
    return boxes_text(asked.boxes) if asked.answer is None else asked.answer


def image_problem(images, root):
    """Why these images cannot be used, or ""."""
    folder = os.path.abspath(root)
    for image in filter(is_path, images):
        if os.path.commonpath([folder, os.path.abspath(image)]) != folder:
            return f"image {image} lies outside {folder}"
        if not os.path.isfile(image):
            return f"image {image} does not exist"
    return "" if images else "the study has no image"


def clean_study(study, skip):
    """Clip boxes to the image and leave out what is no box. Each is counted, the others stay."""
    boxes = {}
    for key, given in study.boxes.items():
        kept = clean_boxes(given, study.where, skip)
        if len(kept) < len(given):
            # Not all that is to be seen has its box.
            study.complete = False
        if kept:
            # Of a box that is given twice, a perfect answer could match but one.
            boxes[key] = list(dict.fromkeys(kept))
    study.boxes = boxes
    asked = []
    for item in study.asked:
        given = item.boxes
        if item.answer is None:
            item.boxes = clean_boxes(given, study.where, skip)
        # Without its only box, a question would have "It is not seen" for an answer.
        if item.boxes or not given:
            asked.append(item)
    study.asked = asked


# ------------------------------------------------------------------------------- thinking traces


# A sentence belongs to the first of these regions whose words it has.
REGIONS = {
    "Devices": r"tube|catheter|line tip|\bpicc|\bport\b|pacemaker|lead|wire|clip|stent|valve",
    "Pleura": r"pleura|effusion|pneumothora|costophrenic",
    "Bones": r"bon[ey]|rib|osseous|spin|skelet|fracture|vertebra|clavic|degenerat",
    "Heart": r"heart|cardi",
    "Mediastinum": r"mediastin|aort|hil[aiu]|trache",
    "Lungs": r"lung|pulmon|opaci|consolid|atelect|edema|airspace|nodul|mass|pneumonia|interstit"
    r"|vascul|lobe|basilar",
}
READING_ORDER = ("Heart", "Mediastinum", "Lungs", "Pleura", "Bones", "Devices")


def with_traces(
    config: Config, split: str, examples: list[Example], notices: list[str]
) -> list[Example]:
    """Examples with thinking, if it is configured.

    In training from data.traces if it is given; else their own traces, or some made from report and
    boxes.
    """
    if not config.data.thinking:
        return examples
    if config.data.traces and split == "train":
        traces = texts_by_id(config.data.traces, "thinking")
        found = sum(e.id in traces for e in examples)
        notices.append(f"{found} of {len(examples)} examples have a trace in {config.data.traces}")
        return [replace(e, thinking=traces.get(e.id, "")) for e in examples]
    return [replace(e, thinking=e.thinking or made_trace(e)) for e in examples]


def texts_by_id(path: str | Path, key: str) -> dict[str, str]:
    """{id: text} of a file of JSON lines with `id` and `key`."""
    texts = {}
    for n, line in enumerate(read_lines(Path(path)), 1):
        try:
            row = parse_json(line)
            text = row[key]
            if not isinstance(text, str):
                raise ValueError(f"{key}: expected text, got {text!r}")
            if key == "thinking" and re.search("|".join(TAGS), text):
                raise ValueError("thinking: the format's tags are added; leave them out")
            name = str(row["id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}, line {n}: expected an object with id and {key} ({error!r})"
            ) from None
        if name in texts:
            raise InputError(f"{path}, line {n}: a second line has the id {name!r}; keep one")
        texts[name] = text
    return texts


def made_trace(example):
    if example.task == "report":
        return systematic_reading(example.answer)
    return looking_for(example.label, example.boxes) if example.task == "grounding" else ""


def systematic_reading(report: str) -> str:
    """A trace for the cold start from the reference report: its sentences region by region."""
    sentences = defaultdict(list)
    for sentence in re.split(r"(?<=[.!?])\s+", report.strip()):
        hits = (region for region, words in REGIONS.items() if re.search(words, sentence, re.I))
        sentences[next(hits, "Other")].append(sentence)
    parts = []
    for region in (*READING_ORDER, "Other"):
        text = " ".join(sentences[region])
        if text or region != "Other":
            parts.append(f"{region}: {text or 'not described.'}")
    return " ".join(parts)


def looking_for(label: str, boxes: Sequence[Box]) -> str:
    """A trace for a grounding question. The left of the patient is on the right of the image."""
    if not boxes:
        return f"Looking for {label}. It is not there."
    sides = {"right" if box[0] + box[2] < 1 else "left" for box in boxes}
    where = "both sides" if len(sides) == 2 else f"the {sides.pop()}"
    return f"Looking for {label}. It is there on {where}."


# ------------------------------------------------------------------------------- mixtures

# A source, its examples, and what cannot be used.
Part = tuple[Source, list[Example], list[str]]


def sources(config: Config, split: str) -> list[Source]:
    """The datasets of a split: its entries, or the one that the section `data` itself names.

    What an entry leaves out, the section gives; its paths are relative to data.path.
    """
    d = config.data
    entries = getattr(d, split) or d.train
    if not entries:
        return [Source(d.source, d.path, d.images, d.tasks, d.views)]
    complete = []
    for entry in map(replace, entries):
        entry.path = os.path.join(d.path, entry.path or entry.source)
        if images := entry.images or d.images:
            entry.images = os.path.join(d.path, images)
        entry.tasks = entry.tasks or d.tasks
        entry.views = entry.views or d.views
        complete.append(entry)
    return complete


def check_tasks(config: Config):
    """Raises InputError if there is nothing that GRPO can train on."""
    tasks = set(chain.from_iterable(source.tasks for source in sources(config, "train")))
    if tasks <= {"classification"}:
        raise InputError(f"data.tasks={sorted(tasks)}: GRPO needs report or grounding examples")


WITHOUT_VIEWS = ("jsonl", "llava")  # readers of several images that know no views


def read_source(config, source, split, skip):
    """All examples of one source, in the plain output format."""
    # The module that has its name reads its studies.
    if source.source == "phantom":
        size = getattr(config.data, f"{split}_size")
        studies = phantoms.read(config.seed, split, size, QUESTIONS)
    elif os.path.isdir(source.path):
        if source.views == "frontal" and source.source in WITHOUT_VIEWS:
            raise InputError(f"data.views=frontal: {source.source} does not say what is frontal")
        reader = importlib.import_module(f"readers.{source.source}")
        studies = reader.read(source, split, skip)
    else:
        raise InputError(
            f"data.path={source.path!r}: no such folder; set it to the {source.source} dataset"
        )

    studies = islice(studies, source.limit or None)
    examples = {}
    for study in progress(studies, f"{source.source} {split}", unit="", delay=5, leave=False):
        for e in study_examples(study, source, split, config.seed, skip):
            if e.id in examples:
                skip(f"{source.path}, {split}: a second example has the id {e.id!r}")
            else:
                examples[e.id] = e
    return list(examples.values())


def read_split(config: Config, split: str) -> list[Part]:
    """All sources; their names begin the ids of a mixture. data.on_error=stop raises InputError for
    the first example that fails."""

    def stop(message):
        raise InputError(f"{message} (data.on_error=skip leaves such examples out)")

    parts = []
    every = sources(config, split)
    for source, name in zip(every, source_names(every)):
        problems = []
        skip = stop if config.data.on_error == "stop" else problems.append
        part = read_source(config, source, split, skip)
        if len(every) > 1:
            part = [replace(e, id=f"{name}/{e.id}") for e in part]
        parts.append((source, part, problems))
    return parts


def oversample(examples, weight, seed):
    """Every study `weight` times; a fraction is a random part of the studies.

    Copies have their own ids, and so their own samples.
    """
    groups = by_study(examples)
    order = np.random.default_rng([seed, 13]).permutation(len(groups))
    result = []
    for copy in range(math.ceil(weight)):
        count = round(min(1, weight - copy) * len(groups))
        for i in sorted(order[:count]):
            for e in groups[i]:
                result.append(replace(e, id=f"{e.id}#{copy}", copy=copy) if copy else e)
    return result


def source_names(sources):
    """A name for each source of a mixture, so that ids stay unique."""
    names = [os.path.basename(os.path.normpath(s.path)) or s.source for s in sources]
    return [name if names.count(name) == 1 else f"{name}.{n}" for n, name in enumerate(names)]


# ------------------------------------------------------------------------------- splits


CORPUS = 4000  # examples of each source that the tiny model's tokenizer is trained on
TRIED = 4  # examples of each source whose images are decoded at the start of a training


def load_split(config: Config, split: str, images: bool = True) -> list[Example]:
    """All examples of "train", "val" or "test" for the configured tasks and output format.

    Training examples come as often as the weight of their source says, and never from held-out
    patients (unless all are held out, which is said). With data.on_error=skip, examples that cannot
    be used are left out, counted and reported; otherwise the first one raises InputError. Some
    images of each source are tried, unless images=False.
    """
    parts = read_split(config, split)
    notices = []
    for source, _, problems in parts:
        if problems:
            notices.append(f"{source.source}: {count_problems(problems)}, the first: {problems[0]}")
    if split == "train":
        parts, leaks = without_leaks(config, parts)
        notices += leaks

    examples = []
    for source, part, _ in parts:
        if not part and split == "train":
            where = f"data.path={source.path!r}"
            nothing = f"{where}: no usable example of {source.source} in split {split!r}"
            raise InputError("; ".join([nothing, *notices]))
        part = with_traces(config, split, part, notices)
        if images:
            try_images(part, config, notices)
        if split == "train":
            part = oversample(part, source.weight, config.seed)
        examples += [replace(e, style=style_of(config)) for e in part]
    examples = with_box_form(examples, config)
    for text in notices:
        warn0(f"{split}: {text}")
    if not examples:
        raise InputError(f"data.path={config.data.path!r}: no usable example in split {split!r}")
    return examples


def count_problems(problems: list[str]) -> str:
    """How many messages are about what is left out, and how many about clipped boxes."""
    clipped = sum(problem.endswith("clipped") for problem in problems)
    return f"skipped {len(problems) - clipped} examples or boxes, clipped {clipped} boxes"


def try_images(part, config, notices):
    """Decode the images of some examples: a wrong download shows now, and not after hours."""
    for example in part[:: max(1, len(part) // TRIED)][:TRIED]:
        try:
            open_images(example)
        except InputError as error:
            if config.data.on_error == "stop":
                raise
            notices.append(f"{error} (of {TRIED} examples that were tried)")


def without_leaks(config: Config, parts: list[Part]) -> tuple[list[Part], list[str]]:
    """Training parts without the patients and images of val and test, and notices about it.

    With data.dedup also without reports that repeat one of theirs word for word. Phantoms of
    different splits are different by construction.
    """
    if all(source.source == "phantom" for source, *_ in parts):
        return parts, []
    held = []  # examples can be hashed: they do not change
    for split in ("val", "test"):
        for source, part, _ in read_split(config, split):
            if source.source != "phantom":
                held += part
    patients = {e.patient for e in held} - {""}
    images = {image for e in held for image in e.images}
    reports = {plain_words(e.answer) for e in held if e.task == "report"}

    every = list(chain.from_iterable(part for _, part, _ in parts))
    # Two files of JSON lines may share images, and know nothing of each other's patients.
    leaked = {e for e in every if e.patient in patients or images & {*e.images}}
    texts = [e for e in every if e.task == "report" and e not in leaked]
    duplicates = {e for e in texts if plain_words(e.answer) in reports}
    out = leaked | duplicates if config.data.dedup else leaked
    if leaked and out == set(every):
        notice = (
            "all patients are also held out: kept, but what is measured on the held-out splits "
            "means nothing"
        )
        return parts, [notice]
    kept = []
    for source, part, problems in parts:
        part = [e for e in part if e not in out]
        kept.append((source, part, problems))

    notices = []
    if leaked:
        names = {e.patient for e in leaked}
        notices.append(
            f"left out {len(leaked)} examples of {len(names)} patients, such as {min(names)}: they "
            f"or their images are also held out"
        )
    if duplicates:
        fate = "are left out" if config.data.dedup else "stay (data.dedup=true leaves them out)"
        notices.append(
            f"{len(duplicates)} of {len(texts)} reports ({len(duplicates) / len(texts):.0%}) "
            f"repeat a held-out report word for word, and {fate}"
        )
    return kept, notices


def plain_words(text: str) -> str:
    """Lower-cased words only: what makes two reports the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


# ------------------------------------------------------------------------------- order

# Every stage reads the data in its own order.
STREAMS = {"sft": 0, "more": 1, "cold_start": 2, "grpo": 3}


def grpo_batch(examples: list[Example], step: int, config: Config) -> list[Example]:
    """The examples of one GRPO step: data.report_share of them reports, the rest grounding.

    All are of one task if the data have only one. An example that comes up again in the step has
    another id there, and so other random numbers: its groups differ. A function of its arguments,
    so that a run can resume.
    """
    chosen = []
    for pool, size in grpo_pools(examples, config):
        chosen += [pool[i] for i in indices(len(pool), size, step, config.seed, "grpo")]
    generator = np.random.default_rng([config.seed, STREAMS["grpo"], step, 1])
    batch = []
    seen = Counter()
    for i in generator.permutation(len(chosen)):
        example = chosen[i]
        times = seen[example.id]
        seen[example.id] += 1
        batch.append(replace(example, id=f"{example.id}, again {times}") if times else example)
    return batch


def grpo_pools(examples: list[Example], config: Config) -> list[tuple[list[Example], int]]:
    """The examples of each task, and how many of them a GRPO step takes."""
    count = config.grpo.prompts
    reports = [e for e in examples if e.task == "report"]
    boxes = [e for e in examples if e.task == "grounding"]
    share = config.data.report_share if boxes else 1
    n_reports = round(count * share) if reports else 0
    return [(reports, n_reports), (boxes, count - n_reports)]


def say_repeats(examples: list[Example], config: Config):
    """Say if a GRPO step has to ask the same question more than once."""
    for pool, size in grpo_pools(examples, config):
        if size and not pool:
            raise InputError("the training data have neither reports nor boxes: GRPO needs them")
        if len(pool) < size:
            warn0(
                f"only {len(pool)} examples for {size} of grpo.prompts={config.grpo.prompts}: some "
                f"come up several times in a step, each time with samples of their own"
            )


def indices(n: int, count: int, step: int, seed: int, stream: str) -> list[int]:
    """The `count` of n examples of a step: consecutive slices of endless shuffled epochs."""
    places = range(step * count, (step + 1) * count)
    return [shuffled(n, seed, STREAMS[stream], p // n)[p % n] for p in places]


@lru_cache(maxsize=8)
def shuffled(n, seed, stream, epoch):
    """The order of an epoch of a stage."""
    return np.random.default_rng([seed, stream, epoch]).permutation(n).tolist()


def by_study(examples: list[Example]) -> list[list[Example]]:
    """Examples grouped by their images: lists of questions about the same study."""
    groups = defaultdict(list)
    for example in examples:
        groups[example.images, example.copy, before_images(example)].append(example)
    return list(groups.values())


def before_images(example: Example) -> tuple:
    """The turns before that of the last image: questions about it can share what comes first."""
    turns = [*example.history, (example.question, "")]
    shown = [n for n, (question, _) in enumerate(turns) if IMAGE in question]
    return example.history[: max(shown, default=0)]


def corpus(config: Config) -> list[str]:
    """Texts of training data, on which the tokenizer of the tiny model is trained.

    Its own data, so that their words are few tokens. Phantoms: the first ones of seed 0, so that
    runs with other seeds share a tokenizer. Raises InputError.
    """
    texts = []
    if all(source.source == "phantom" for source in sources(config, "train")):
        for study in phantoms.read(0, "train", 1000, QUESTIONS):
            for asked in study.asked:
                texts += [asked.question, answer_text(asked), asked.thinking]
        return texts
    for _, part, _ in read_split(config, "train"):
        for example in part[:CORPUS]:
            texts += [example.question, example.answer]
    return texts


if __name__ == "__main__":
    moved("data.py", {"what a run would read": "tools.inspect_data config.yaml"})
