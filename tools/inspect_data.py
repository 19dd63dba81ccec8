"""What would a run read?  Tables of what is there, what is skipped and why, and a contact sheet.

  python -m tools.inspect_data config.yaml [key=value ...]

Writes OUT/data.png: examples with their boxes.
"""

import dataclasses
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
import rewards
from model import load_policy
from readers.study import LABELS, image_size
from runtime.config import InputError
from runtime.output import format_table
from runtime.processes import parse_args, run_main

HEAD = [
    "source",
    "split",
    "task",
    "examples",
    "studies",
    "patients",
    "words (min / median / max)",
    "image width",
    "image height",
]
COLUMNS, SIDE, FOOT = 4, 360, 96  # of the contact sheet: examples in a row, pixels
MEASURED = 50  # examples whose images are looked at
LABELLED = 2000  # reports whose labels are read
ENCODED = 32  # examples that are turned into tokens


def spread(values):
    """min / median / max"""
    if not len(values):
        return "-"
    return " / ".join(f"{v:.0f}" for v in np.percentile(values, (0, 50, 100), method="nearest"))


def contact_sheet(examples):
    """One picture: each example's first image with its boxes, and question and answer below."""
    rows = -(-len(examples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + FOOT)), "white")
    font = ImageFont.load_default(11)
    for n, e in enumerate(examples):
        x, y = n % COLUMNS * SIDE, n // COLUMNS * (SIDE + FOOT)
        try:
            (image,) = data.open_images(dataclasses.replace(e, images=e.images[:1]))
        except InputError:
            # The description says so.
            image = Image.new("RGB", (SIDE, SIDE))
        image = ImageOps.contain(image, (SIDE - 8, SIDE - 8))
        pen = ImageDraw.Draw(image)
        for box in e.boxes:
            corners = [v * size for v, size in zip(box, image.size * 2)]
            pen.rectangle(corners, outline="red", width=2)
        sheet.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
        question, answer = textwrap.wrap(e.question, 60)[:2], textwrap.wrap(e.answer, 60)[:4]
        text = "\n".join([f"{e.id}  ({e.kind or e.task})", *question, *answer])
        ImageDraw.Draw(sheet).multiline_text((x + 6, y + SIDE), text, "black", font, spacing=2)
    return sheet


class Description:
    """Collects what is to be said about the splits."""

    def __init__(self, config):
        # Everything is read; what would stop a run is counted.
        self.stops = config.data.on_error == "stop"
        section = dataclasses.replace(config.data, on_error="skip")
        self.config = dataclasses.replace(config, data=section)
        self.rng = np.random.default_rng(config.seed)
        self.notices, self.shown = [], []
        self.counts = [HEAD]
        self.labels = {}
        self.lengths = [["tokens, min / median / max", "of", "prompt", "answer"]]
        self.policy = load_policy(config, weights=False)

    def tried(self, function, *args):
        """What the function gives; None and a notice if it raises InputError."""
        try:
            return function(*args)
        except InputError as error:
            self.notices.append(f"cannot be read: {error}")
            return None

    def draw(self, items, count):
        """Some of the items, in a random order."""
        return [items[i] for i in self.rng.permutation(len(items))[:count]]

    def add_split(self, split):
        parts = self.tried(data.read_split, self.config, split) or []
        if split == "train":
            parts, leaks = self.tried(data.without_leaks, self.config, parts) or (parts, [])
            self.notices += [f"{split}: {leak}" for leak in leaks]
        for source, _, problems in parts:
            self.add_problems(split, source, problems)
        everything = [e for _, part, _ in parts for e in part]
        traced = self.tried(data.with_traces, self.config, split, everything, self.notices)
        style = data.style_of(self.config)
        written = [dataclasses.replace(e, style=style) for e in traced or everything]
        for source, part, _ in parts:
            for kind in sorted({e.kind or e.task for e in part}):
                self.add_kind(split, source, kind, [e for e in part if (e.kind or e.task) == kind])
        self.add_labels(split, [e.answer for e in everything if e.task == "report"])
        self.add_lengths(split, self.draw(written, ENCODED))

    def add_problems(self, split, source, problems):
        if not problems:
            return
        fate = "left out"
        if self.stops:
            fate = "would stop a run (data.on_error=skip leaves such examples out)"
        self.notices.append(f"{split}, {source.source}: {fate}: {len(problems)}, such as")
        self.notices += [f"  {problem}" for problem in problems[:3]]

    def add_kind(self, split, source, kind, examples):
        """A row of counts, and some examples for the contact sheet."""
        few = [examples[i] for i in sorted(self.rng.permutation(len(examples))[:MEASURED])]
        sizes = []
        for image in (image for e in few for image in e.images):
            size = self.tried(image_size, image) if data.is_path(image) else image.size
            if size:
                sizes.append(size)
        sizes = np.array(sizes).reshape(-1, 2)
        counts = [
            len(examples),
            len({e.images for e in examples}),
            len({e.patient for e in examples}),
        ]
        words = spread([len(e.answer.split()) for e in examples])
        row = [source.source, split, kind, *map(str, counts), words]
        self.counts.append([*row, spread(sizes[:, 0]), spread(sizes[:, 1])])
        with_boxes_first = sorted(few, key=lambda e: not e.boxes)
        self.shown += with_boxes_first[:4] if split == "train" else few[:1]

    def add_labels(self, split, reports):
        if reports:
            reports = self.draw(reports, LABELLED)
            label = rewards.labeler(self.config.rewards)
            seen = np.isin(label(reports), (rewards.POSITIVE, rewards.UNCERTAIN))
            self.labels[f"{split}, {len(reports)} reports"] = seen.mean(0)

    def add_lengths(self, split, examples):
        pairs = [self.tried(self.encode, e) for e in examples]
        pairs = [pair for pair in pairs if pair]
        if pairs:
            prompts, answers = zip(*pairs)
            self.lengths.append([split, str(len(pairs)), spread(prompts), spread(answers)])

    def encode(self, example):
        """The number of prompt and of answer tokens."""
        return len(self.policy.encode(example)), len(self.policy.encode_target(example))

    def text(self):
        tables = [format_table(self.counts)]
        if self.labels:
            rows = [["positive or uncertain", *self.labels]]
            for i, name in enumerate(LABELS):
                rows.append([name, *(f"{share[i]:.1%}" for share in self.labels.values())])
            tables.append(format_table(rows))
        config = self.config
        limits = (
            f"limits: model.max_prompt_tokens={config.model.max_prompt_tokens}, "
            f"grpo.max_new_tokens={config.grpo.max_new_tokens}"
        )
        tables.append(f"{format_table(self.lengths)}\n{limits}")
        tables.append("\n".join(dict.fromkeys(self.notices)) or "nothing was skipped")
        return "\n\n".join(tables)


def describe(config):
    """What a run with this configuration would read: text, and a contact sheet or None."""
    description = Description(config)
    for split in ("train", "val", "test"):
        description.add_split(split)
    shown = description.shown
    return description.text(), contact_sheet(shown) if shown else None


def main():
    config, _ = parse_args(__doc__)
    text, sheet = describe(config)
    print(text)
    if sheet is None:
        raise InputError(f"data.path={config.data.path!r}: there is no usable example")
    path = Path(config.out, "data.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"\nexamples: {path}")


if __name__ == "__main__":
    run_main(main)
