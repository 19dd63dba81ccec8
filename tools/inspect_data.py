"""What would a run read?  Tables of what is there, what is skipped and why, and a contact sheet.

  python -m tools.inspect_data config.yaml [key=value ...]
  python -m tools.inspect_data config.yaml [key=value ...] --images

Writes OUT/data.png: examples with their boxes. --images decodes every image of all splits and lists
those that cannot be read.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import data
import rewards
from model import load_policy
from readers.study import LABELS, image_size
from runtime.config import InputError
from runtime.output import format_table, progress
from runtime.processes import parse_args, run_main

HEAD = "source,split,task,examples,studies,patients,words,width,height,prompt tokens,answer tokens"
# Of the contact sheet: examples in a row, pixels, and lines of text below each image.
COLUMNS, SIDE, FOOT, LINES = 4, 360, 96, 7
MEASURED = 50  # examples of each row whose images and tokens are looked at
LABELLED = 2000  # reports whose labels are read
SHOWN = 5  # things that cannot be used, of each source and split


def main():
    config, args = parse_args(__doc__, images={"action": "store_true"})
    description = Description(config)
    if args.images:
        description.decode_images()
    print(description.text())
    if not description.shown:
        raise InputError(f"data.path={config.data.path!r}: there is no usable example")
    path = Path(config.out, "data.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(description.shown).save(path)
    print(f"\nexamples: {path}")


class Description:
    """Collects what is to be said about the splits."""

    def __init__(self, config):
        # Everything is read; what would stop a run is counted.
        self.config = replace(config, data=replace(config.data, on_error="skip"))
        self.stops = config.data.on_error == "stop"
        self.rng = np.random.default_rng(config.seed)
        self.counts = [HEAD.split(",")]
        self.labels = [["positive or uncertain", *LABELS]]
        self.notices = []
        # The tokenizer of the tiny model is made from the data, if they can be read.
        self.policy = self.tried(load_policy, self.config, None, False)
        self.images = set()
        self.shown = []
        for split in ("train", "val", "test"):
            self.add_split(split)

    def tried(self, function, *args):
        """What the function gives; None and a notice if it raises InputError."""
        try:
            return function(*args)
        except InputError as error:
            self.notices.append(f"cannot be read: {error}")

    def add_split(self, split):
        parts = self.tried(data.read_split, self.config, split) or []
        if split == "train":
            parts, leaks = self.tried(data.without_leaks, self.config, parts) or (parts, [])
            self.notices += leaks
        reports = []
        for source, part, problems in parts:
            name = f"{split}, {source.source}"
            if problems:
                self.add_problems(name, problems)
            self.images.update(*(e.images for e in part))
            reports += [e.answer for e in part if e.task == "report"]
            part = data.with_traces(self.config, split, part, self.notices)
            # The first are looked at.
            self.rng.shuffle(part)
            for kind in sorted({kind_of(e) for e in part}):
                own = [e for e in part if kind_of(e) == kind]
                self.add_kind([source.source, split, kind], own)
        if reports:
            self.rng.shuffle(reports)
            self.add_labels(split, reports[:LABELLED])

    def add_problems(self, name, problems):
        counted = data.count_problems(problems)
        if self.stops:
            counted = f"would stop a run; with data.on_error=skip: {counted}"
        self.notices += [f"{name}: {counted}, such as", *problems[:SHOWN]]

    def add_kind(self, names, examples):
        """A row of counts, and some examples for the contact sheet."""
        studies = {e.images for e in examples}
        patients = {e.patient for e in examples}
        counts = [str(len(items)) for items in (examples, studies, patients)]
        few = examples[:MEASURED] if self.policy else []
        numbers = {e: self.tried(self.measure, e) for e in few}
        usable = [e for e in numbers if numbers[e]]
        columns = list(zip(*(numbers[e] for e in usable))) or [()] * 5
        self.counts.append([*names, *counts, *map(spread, columns)])
        # With boxes first.
        usable.sort(key=lambda e: not e.boxes)
        self.shown += usable[: 4 if "train" in names else 1]

    def measure(self, example):
        """Words, width and height of the first image, tokens as they are trained."""
        image = example.images[0]
        size = image_size(image) if data.is_path(image) else image.size
        words = example.answer.split()
        example = replace(example, style=data.style_of(self.config))
        prompt = self.policy.encode(example)
        answer = self.policy.encode_target(example)
        return len(words), *size, len(prompt), len(answer)

    def add_labels(self, split, reports):
        label = rewards.labeler(self.config.rewards)
        seen = np.isin(label(reports), (rewards.POSITIVE, rewards.UNCERTAIN))
        shares = [f"{share:.1%}" for share in seen.mean(0)]
        self.labels.append([f"{split}, {len(reports)} reports", *shares])

    def decode_images(self):
        """Try the files of all images."""

        def fails(path):
            return self.tried(data.load_image, path) is None

        paths = sorted(filter(data.is_path, self.images))
        # Decoding leaves the interpreter free for the other threads.
        with ThreadPoolExecutor() as pool:
            failed = sum(progress(pool.map(fails, paths), "decode", total=len(paths)))
        self.notices.append(f"{failed} of {len(paths)} images cannot be read")

    def text(self):
        prompt = self.config.model.max_prompt_tokens
        answer = self.config.grpo.max_new_tokens
        limits = f"model.max_prompt_tokens={prompt}, grpo.max_new_tokens={answer}"
        tables = [f"{format_table(self.counts)}\n(min / median / max; limits: {limits})"]
        # Without reports, there is but the column of names.
        if len(self.labels) > 1:
            tables.append(format_table(list(zip(*self.labels))))
        tables.append("\n".join(dict.fromkeys(self.notices)) or "nothing was skipped")
        return "\n\n".join(tables)


def kind_of(example):
    return example.kind or example.task


def spread(values):
    """min / median / max"""
    if not values:
        return "-"
    points = np.percentile(values, (0, 50, 100), method="nearest")
    return " / ".join(f"{point:.0f}" for point in points)


def contact_sheet(examples):
    """One picture: each example's first image with its boxes, and question and answer below."""
    rows = -(-len(examples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + FOOT)), "white")
    pen = ImageDraw.Draw(sheet)
    for n, e in enumerate(examples):
        row, column = divmod(n, COLUMNS)
        x, y = column * SIDE, row * (SIDE + FOOT)
        sheet.paste(with_boxes(e), (x + 4, y + 4))
        lines = wrap(f"{e.id} ({kind_of(e)}): {e.question} - {e.answer}", 60)
        text = "\n".join(lines[:LINES])
        pen.multiline_text((x + 6, y + SIDE), text, "black", font_size=11, spacing=2)
    return sheet


def with_boxes(example):
    """A square with the example's first image and its boxes."""
    inner = (SIDE - 8, SIDE - 8)
    image = ImageOps.contain(data.open_image(example.images[0]), inner)
    pen = ImageDraw.Draw(image)
    for box in example.boxes:
        corners = np.multiply(box, image.size * 2)
        pen.rectangle(list(corners), outline="red", width=2)
    return ImageOps.pad(image, inner, color="white")


if __name__ == "__main__":
    run_main(main)
