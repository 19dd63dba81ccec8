"""What would a run read?  Tables of what is there, what is skipped and why, and a contact sheet.

  python -m tools.inspect_data config.yaml [key=value ...]
  python -m tools.inspect_data config.yaml [key=value ...] --images

Writes OUT/data.png: examples with their boxes. --images decodes every image of all splits and lists
those that cannot be read.
"""

import itertools
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
import rewards
from model import load_policy
from readers.study import LABELS, image_size
from runtime.config import InputError
from runtime.output import format_table, progress
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


def kind_of(example):
    return example.kind or example.task


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
    inner = (SIDE - 8, SIDE - 8)
    for n, e in enumerate(examples):
        x, y = n % COLUMNS * SIDE, n // COLUMNS * (SIDE + FOOT)
        try:
            image = ImageOps.contain(data.open_image(e.images[0]), inner)
        except InputError:
            # The description says so.
            image = Image.new("RGB", inner)
        pen = ImageDraw.Draw(image)
        for box in e.boxes:
            corners = [v * size for v, size in zip(box, image.size * 2)]
            pen.rectangle(corners, outline="red", width=2)
        sheet.paste(ImageOps.pad(image, inner, color="white"), (x + 4, y + 4))
        question, answer = textwrap.wrap(e.question, 60)[:2], textwrap.wrap(e.answer, 60)[:4]
        text = "\n".join([f"{e.id}  ({kind_of(e)})", *question, *answer])
        ImageDraw.Draw(sheet).multiline_text((x + 6, y + SIDE), text, "black", font, spacing=2)
    return sheet


class Description:
    """Collects what is to be said about the splits."""

    def __init__(self, config):
        # Everything is read; what would stop a run is counted.
        self.config = replace(config, data=replace(config.data, on_error="skip"))
        self.fate = "left out"
        if config.data.on_error == "stop":
            self.fate = "would stop a run (data.on_error=skip leaves such examples out)"
        self.rng = np.random.default_rng(config.seed)
        self.notices, self.shown = [], []
        self.counts, self.labels = [HEAD], {}
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
        everything = []
        for source, part, problems in parts:
            everything += part
            if problems:
                fate = f"{self.fate}: {len(problems)}, such as"
                self.notices.append(f"{split}, {source.source}: {fate}")
                self.notices += [f"  {problem}" for problem in problems[:3]]
            for kind in sorted({kind_of(e) for e in part}):
                own = [e for e in part if kind_of(e) == kind]
                self.add_kind([source.source, split, kind], own)
        self.add_labels(split, [e.answer for e in everything if e.task == "report"])
        self.add_lengths(split, everything)

    def add_kind(self, names, examples):
        """A row of counts, and some examples for the contact sheet."""
        few = self.draw(examples, MEASURED)
        sizes = []
        for image in itertools.chain.from_iterable(e.images for e in few):
            size = self.tried(image_size, image) if data.is_path(image) else image.size
            if size:
                sizes.append(size)
        widths, heights = np.array(sizes).reshape(-1, 2).T
        studies, patients = {e.images for e in examples}, {e.patient for e in examples}
        words = [len(e.answer.split()) for e in examples]
        counts = map(str, map(len, (examples, studies, patients)))
        self.counts.append([*names, *counts, *map(spread, (words, widths, heights))])
        with_boxes_first = sorted(few, key=lambda e: not e.boxes)
        self.shown += with_boxes_first[:4] if "train" in names else few[:1]

    def add_labels(self, split, reports):
        if reports:
            reports = self.draw(reports, LABELLED)
            label = rewards.labeler(self.config.rewards)
            seen = np.isin(label(reports), (rewards.POSITIVE, rewards.UNCERTAIN))
            self.labels[f"{split}, {len(reports)} reports"] = seen.mean(0)

    def add_lengths(self, split, examples):
        """A row of lengths as they are trained, with traces and the output format."""
        traced = self.tried(data.with_traces, self.config, split, examples, self.notices)
        style = data.style_of(self.config)
        pairs = []
        for e in self.draw(traced or examples, ENCODED):
            pair = self.tried(self.encode, replace(e, style=style))
            if pair:
                pairs.append(pair)
        if pairs:
            self.lengths.append([split, str(len(pairs)), *map(spread, zip(*pairs))])

    def encode(self, example):
        """The number of prompt and of answer tokens."""
        return len(self.policy.encode(example)), len(self.policy.encode_target(example))

    def text(self):
        tables = [format_table(self.counts)]
        if self.labels:
            rows = [["positive or uncertain", *self.labels]]
            for name, *shares in zip(LABELS, *self.labels.values()):
                rows.append([name, *(f"{share:.1%}" for share in shares)])
            tables.append(format_table(rows))
        prompt, answer = self.config.model.max_prompt_tokens, self.config.grpo.max_new_tokens
        limits = f"limits: model.max_prompt_tokens={prompt}, grpo.max_new_tokens={answer}"
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


def unreadable_images(config):
    """(how many image files there are, what is wrong with those that cannot be decoded)."""
    paths = set()
    for split in ("train", "val", "test"):
        for example in data.load_split(config, split):
            paths.update(filter(data.is_path, example.images))
    paths = sorted(paths)
    # Decoding leaves the interpreter free for the other threads.
    with ThreadPoolExecutor() as pool:
        found = progress(pool.map(image_problem, paths), "decode", total=len(paths))
        return len(paths), list(filter(None, found))


def image_problem(path):
    try:
        data.load_image(path)
    except InputError as error:
        return str(error)
    return ""


def main():
    config, args = parse_args(__doc__, images={"action": "store_true"})
    text, sheet = describe(config)
    print(text)
    if sheet is None:
        raise InputError(f"data.path={config.data.path!r}: there is no usable example")
    path = Path(config.out, "data.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"\nexamples: {path}")
    if args.images:
        count, problems = unreadable_images(config)
        print("\n".join([*problems, f"{len(problems)} of {count} images cannot be read"]))


if __name__ == "__main__":
    run_main(main)
