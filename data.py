"""Everything that is read: the configuration, datasets, prompts and answer formats, and the built-in phantoms.

In order of appearance
  Config, load_config           one YAML file plus key=value overrides, checked key by key
  Example, open_images          one question about one study; its images are opened only when needed
  prompt_text, target_text      what the model is asked and what it should say, in the three output formats
  read_phantoms, read_iu_xray, read_jsonl, load_split     datasets -> list of Example
  batch                         which examples make up step t: a pure function of (seed, t)
  phantom                       procedurally drawn chest X-rays with findings, boxes, reports and thinking traces

`python data.py config.yaml` prints what a configuration would load.
"""
from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import json
import math
import os
import sys
import typing
import warnings
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFilter


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that says what and what to do."""


def run_main(main):
    """Runs a script's main(); an InputError becomes one line on stderr and exit status 1."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


# ---------------------------------------------------------------------------------------------- configuration

@dataclass
class ModelConfig:
    path: str = "tiny"                  # "tiny": the built-in Qwen3-VL, made from scratch; else a local folder or hub id
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; weights and optimiser stay float32
    min_pixels: int = 1024              # each image is resized to between min_pixels and max_pixels, in multiples of a
    max_pixels: int = 451584            # merged patch; the RadVLM-GRPO values
    max_prompt_tokens: int = 2048       # a longer prompt is an error: cutting it would cut image tokens
    train_vision: bool = True           # false freezes the vision tower
    shared_prefix: bool = True          # run each prompt once for its G completions; false: plain rows (same numbers)
    gradient_checkpointing: bool = False  # needs shared_prefix=false


@dataclass
class DataConfig:
    source: Literal["phantom", "iu_xray", "jsonl"] = "phantom"
    path: str = ""                      # folder of the dataset (iu_xray, jsonl)
    tasks: list[str] = field(default_factory=lambda: ["report", "grounding"])
    report_share: float = 0.5           # share of report examples in a batch; the rest is grounding
    views: Literal["all", "frontal"] = "all"
    thinking: bool = False              # think before answering
    think_format: Literal["tags", "suffix"] = "tags"  # <think>..</think><report>..</report> (MRG-R1) | ..</think>.. (RadVLM)
    train_size: int = 8000              # phantoms per split
    val_size: int = 128
    test_size: int = 1024
    on_error: Literal["stop", "skip"] = "stop"  # an unreadable example: stop, or leave it out, count it and say so


@dataclass
class SFTConfig:
    stage: Literal["sft", "more", "cold_start"] = "sft"  # "more" and "cold_start" continue from the sft checkpoint
    init: str = "auto"                  # where to start: auto (see stage), base (model.path), or a checkpoint folder
    steps: int = 300
    batch_size: int = 32
    micro_batch: int = 32               # sequences per forward pass (and process)
    lr: float = 1e-5                    # peak; linear warm-up, then cosine to zero
    warmup: int = 10
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    plain_share: float = 0.5            # cold_start: share of examples trained without thinking
    eval_every: int = 100               # validation loss
    save_every: int = 100


@dataclass
class GRPOConfig:
    init: str = "auto"                  # where to start: auto (sft, or cold_start when data.thinking), base, or a folder
    steps: int = 300
    prompts: int = 512                  # prompts per rollout, over all processes
    group_size: int = 8                 # G completions per prompt
    mini_batch: int = 0                 # prompts per optimiser step; 0 = all prompts of the rollout
    epochs: int = 1                     # passes over each rollout
    micro_batch: int = 4                # prompts per forward pass (and process)
    sample_batch: int = 16              # prompts sampled together (and process)
    max_new_tokens: int = 1024
    temperature: float = 1.0
    lr: float = 1e-6                    # constant after the warm-up
    warmup: int = 0
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    adv_norm: Literal["group", "none", "batch"] = "group"
    normalize_parts: bool = False       # normalise every reward part in its group before the weighted sum (GDPO)
    drop_degenerate: bool = False       # leave out groups whose rewards are all equal
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance: Literal["token", "sequence"] = "token"  # "sequence": one ratio per completion (GSPO)
    loss_agg: Literal["token", "sequence", "constant"] = "token"
    kl_coef: float = 0.01               # 0 also skips the reference model
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    save_every: int = 25


@dataclass
class RewardsConfig:
    report: dict[str, float] = field(default_factory=lambda: {"mccs": 0.75, "gleu": 0.25})
    grounding: dict[str, float] = field(default_factory=lambda: {"soft_f1": 1.0})
    mccs_margin: float = 0.5
    soft_f1_mode: Literal["radvlm", "pq"] = "radvlm"
    match_empty: bool = True            # pay 1 when nothing is there and no box is given


@dataclass
class EvalConfig:
    split: Literal["train", "val", "test"] = "test"
    limit: int = 0                      # examples per task; 0 = all
    batch_size: int = 64
    bootstrap: int = 1000               # resamples for the 95 % intervals


@dataclass
class LogConfig:
    samples: int = 2                    # prompts per step whose completions go to samples.jsonl
    tensorboard: bool = False
    wandb: bool = False


@dataclass
class Config:
    seed: int = 0
    out: str = "runs/phantom"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


AT_LEAST_ONE = {f"{s}.{k}" for s, keys in {
    "model": ["min_pixels", "max_pixels", "max_prompt_tokens"], "data": ["train_size", "val_size", "test_size"],
    "sft": ["steps", "batch_size", "micro_batch", "eval_every", "save_every"], "eval": ["batch_size"],
    "grpo": ["steps", "prompts", "group_size", "epochs", "micro_batch", "sample_batch", "max_new_tokens", "save_every"],
}.items() for k in keys}
BELOW_ONE = {"rewards.mccs_margin"}                               # 0 <= value < 1
SHARES = {"data.report_share", "sft.plain_share"}                 # 0 <= value <= 1
POSITIVE = {"sft.lr", "grpo.lr", "grpo.temperature", "sft.grad_clip", "grpo.grad_clip", "grpo.clip_high"}


def known_keys(node=Config, prefix=""):
    """Every dotted key of the configuration with its type, e.g. {"grpo.kl_coef": float}."""
    keys = {}
    for name, kind in typing.get_type_hints(node).items():
        keys |= known_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return keys


def checked(key, value, kind):
    """`value` as `kind`; InputError when it is of another type or impossible."""
    def wrong(expected):
        return InputError(f"{key}: expected {expected}, got {value!r}")
    origin = typing.get_origin(kind)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise wrong("one of " + ", ".join(typing.get_args(kind)))
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong("a mapping of names to weights")
        return {str(name): checked(f"{key}.{name}", weight, float) for name, weight in value.items()}
    if origin is list:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise wrong("a list of names, like [report, grounding]")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if kind is str:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise wrong("text")
        return str(value)
    try:                                   # YAML reads 1e-4 as text: numbers are accepted in any notation
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number) or kind is int and number != int(number):
        raise wrong("a whole number" if kind is int else "a number")
    low, strict = (1, False) if key in AT_LEAST_ONE else (0, key in POSITIVE)
    if not key.startswith(("rewards.report", "rewards.grounding")) and (number < low or strict and number == low):
        raise wrong(f"a number {'above' if strict else 'of at least'} {low}")
    if key in SHARES and number > 1 or key in BELOW_ONE and number >= 1:
        raise wrong("a number from 0 to 1")
    return kind(number)


def set_key(config, key, value, origin):
    """Sets one dotted key of `config`; InputError names the nearest valid key."""
    keys = known_keys()
    parent, _, name = key.rpartition(".")
    node = config
    if parent in ("rewards.report", "rewards.grounding"):         # one weight of a reward table
        getattr(config.rewards, parent.split(".")[1])[name] = checked(key, value, float)
        return
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 1, 0) or ["seed"]
        raise InputError(f"{origin}: unknown key {key!r} = {value!r}; the nearest valid key is {near[0]!r}")
    for part in parent.split(".") if parent else []:
        node = getattr(node, part)
    setattr(node, name, checked(key, value, keys[key]))


def read_yaml(path):
    """The mapping in a YAML file."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the configuration ({getattr(error, 'strerror', 0) or error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections like 'grpo:', got {type(tree).__name__}")
    return tree or {}


def load_config(path, overrides=()):
    """Reads a YAML file over the defaults above, then `key=value` overrides (e.g. "grpo.kl_coef=0").

    Raises InputError for an unknown key, a wrong type or an impossible value.
    """
    config = Config()

    def walk(tree, prefix):
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if any(k.startswith(key + ".") for k in known_keys()):
                if not isinstance(value, dict):
                    raise InputError(f"{path}: {key}: expected a section with keys, got {value!r}")
                walk(value, key + ".")
            else:
                set_key(config, key, value, path)
    walk(read_yaml(path), "")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"argument {item!r}: expected key=value, like grpo.kl_coef=0")
        try:
            set_key(config, key, yaml.safe_load(text) if text else "", f"argument {item!r}")
        except yaml.YAMLError:
            raise InputError(f"argument {item!r}: the value is not valid YAML") from None
    if set(config.data.tasks) - {"report", "grounding"} or not config.data.tasks:
        raise InputError(f"data.tasks: expected some of report, grounding, got {config.data.tasks}")
    if config.model.min_pixels > config.model.max_pixels:
        raise InputError("model.min_pixels is larger than model.max_pixels")
    if config.model.gradient_checkpointing and config.model.shared_prefix:
        raise InputError("model.gradient_checkpointing=true needs model.shared_prefix=false")
    if config.grpo.mini_batch > config.grpo.prompts:
        raise InputError(f"grpo.mini_batch={config.grpo.mini_batch} is larger than grpo.prompts={config.grpo.prompts}")
    return config


def get_key(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def config_text(config):
    """The resolved configuration as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


# ---------------------------------------------------------------------------------------------- examples

@dataclass(frozen=True)
class Example:
    """One question about one study."""
    id: str
    task: str                           # "report" | "grounding"
    images: tuple                       # paths, or phantoms
    question: str
    answer: str                         # the reference report, or the reference boxes as text
    thinking: str = ""                  # a reasoning trace, where the data has one
    boxes: tuple = ()                   # grounding: (x1, y1, x2, y2), fractions of the original image; () = not there
    label: str = ""                     # grounding: what is asked for
    patient: str = ""
    style: str = "plain"                # output format: plain | tags | suffix (DESIGN of both papers, see target_text)


def load_image(path):
    """An image file as 8-bit RGB. 16-bit and float files are scaled from their own range; alpha is dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: not a readable image ({' '.join(str(error).split())})") from None
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        low, high = pixels.min(), pixels.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError(f"{path}: the image has pixels that are not finite")
        image = Image.fromarray(np.uint8(255 * (pixels - low) / max(high - low, 1e-12)))
    return image.convert("RGB")


def open_images(example):
    """The example's images as RGB, opened or drawn now."""
    return [load_image(i) if isinstance(i, (str, Path)) else i.image.convert("RGB") for i in example.images]


# ---------------------------------------------------------------------------------------------- prompts and answers

REPORT_QUESTION = "Write the findings of this chest X-ray."
ANSWER_TAG = {"report": "report", "grounding": "answer"}
NOTHING_THERE = "It is not seen."
BOX_INSTRUCTION = "Answer with boxes."


def style_of(config):
    """The output format that a configuration asks for."""
    return config.data.think_format if config.data.thinking else "plain"


def prompt_text(example):
    """The user turn. `suffix` is RadVLM-GRPO's switch for thinking; `tags` spells out MRG-R1's format."""
    if example.style == "tags":
        tag = ANSWER_TAG[example.task]
        return f"{example.question} Think in <think></think>, then answer in <{tag}></{tag}>."
    return example.question + (" /think" if example.style == "suffix" else "")


def target_text(example):
    """What a supervised model should say (without the end-of-turn token)."""
    if example.style == "tags":
        tag = ANSWER_TAG[example.task]
        return f"<think>{example.thinking}</think>\n<{tag}>{example.answer}</{tag}>"
    return f"{example.thinking}</think>\n{example.answer}" if example.style == "suffix" else example.answer


def boxes_text(boxes):
    """The papers' box format: "[0.12, 0.30, 0.45, 0.61], [...] and [...]"."""
    texts = ["[" + ", ".join(f"{value:.2f}" for value in box) + "]" for box in boxes]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]])) if texts else NOTHING_THERE


# ---------------------------------------------------------------------------------------------- datasets

SPLIT_START = {"train": 0, "val": 10_000_000, "test": 20_000_000}   # phantom indices: disjoint by construction


def read_phantoms(config, split, _skip):
    """One report example per phantom; grounding questions about what is there and, for one in three, what is not."""
    for n in range(getattr(config.data, f"{split}_size")):
        index = SPLIT_START[split] + n
        study = phantom(config.seed, index)
        common = dict(images=(study,), patient=str(index))
        yield Example(id=f"{index}", task="report", question=REPORT_QUESTION, answer=study.report,
                      thinking=study.thinking, **common)
        rng = np.random.default_rng([config.seed, index, 7])
        absent = [label for label in PHANTOM_LABELS if label not in study.boxes]
        asked = list(study.boxes) + ([str(rng.choice(absent))] if rng.random() < 1 / 3 else [])
        for label in asked:
            boxes = tuple(tuple(round(float(v), 2) for v in box) for box in study.boxes.get(label, ()))
            yield Example(id=f"{index}-{label}", task="grounding", question=grounding_questions(label, rng),
                          answer=boxes_text(boxes), thinking=grounding_thinking(study, label), boxes=boxes, label=label,
                          **common)


def grounding_thinking(study, label):
    """A one-line trace for a grounding question."""
    sides = [f.side for f in study.findings if f.label == label]
    seen = {"": "It is there", "both": "It is there on both sides"}
    return f"Looking for {QUESTION_NAMES.get(label, label.lower())}. " + (
        seen.get(sides[0], f"It is there on the {sides[0]}") if sides else "It is not there") + "."


def phantom_corpus(studies=2000):
    """Texts of the first training phantoms of seed 0: what the built-in tokenizer is trained on."""
    config = Config()
    config.data.train_size = studies
    examples = list(read_phantoms(config, "train", None))
    return [text for e in examples for text in (e.question, e.answer, e.thinking)]


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def read_csv(path, columns, skip):
    """Rows of a CSV file as dicts; a missing column is an error, a row with too few or too many cells is bad."""
    csv.field_size_limit(1 << 24)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [c for c in columns if c not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path}: no column {missing[0]!r}; it has {', '.join(reader.fieldnames or ['none'])}")
            for row in reader:
                if None in row or None in row.values():
                    skip(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames)} cells")
                    continue
                yield row
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a valid CSV file ({error})") from None


def thirds(ids, seed=0):
    """id -> split, 70 / 10 / 20 % by a hash of the id (at least one each), for datasets published without a split."""
    ranked = sorted(set(ids), key=lambda i: hashlib.sha1(f"{seed}:{i}".encode()).hexdigest())
    n_val, n_test = max(1, round(0.1 * len(ranked))), max(1, round(0.2 * len(ranked)))
    names = ["val"] * n_val + ["test"] * n_test + ["train"] * len(ranked)
    return dict(zip(ranked, names))


def study_example(uid, images, report, where, skip):
    """A report example, or None after skip() when the study has no text or no image file."""
    report = " ".join(report.split()) if isinstance(report, str) else ""
    missing = [i for i in images if not os.path.isfile(i)]
    if not report:
        return skip(f"{where}: the report is empty")
    if missing or not images:
        return skip(f"{where}: image {missing[0]} does not exist" if missing else f"{where}: the study has no image")
    return Example(id=str(uid), task="report", images=tuple(map(str, images)), question=REPORT_QUESTION, answer=report,
                   patient=str(uid))


def read_iu_xray(config, split, skip):
    """IU X-Ray as R2Gen distributes it (annotation.json, images/), or as Kaggle does (two CSV files, images_normalized/).

    R2Gen's first image is the frontal view. Kaggle's files have no split (see `thirds`) and keep the original
    sections: the report is the findings, else the impression.
    """
    root = Path(config.data.path)
    if (root / "annotation.json").is_file():
        path = root / "annotation.json"
        tree = read_json(path)
        rows = tree.get(split) if isinstance(tree, dict) else None
        if not isinstance(rows, list):
            raise InputError(f"{path}: expected a list under {split!r}, the layout of R2Gen")
        for n, row in enumerate(rows):
            where = f"{path}, {split}[{n}]"
            if not (isinstance(row, dict) and "id" in row and isinstance(row.get("image_path"), list)
                    and all(isinstance(p, str) for p in row["image_path"])):
                skip(f"{where}: expected an object with id, report and image_path")
                continue
            images = [root / "images" / p for p in row["image_path"]]
            yield study_example(row["id"], images[:1] if config.data.views == "frontal" else images,
                                row.get("report"), where, skip)
    elif (root / "indiana_reports.csv").is_file():
        views = {}
        for row in read_csv(root / "indiana_projections.csv", ["uid", "filename", "projection"], skip):
            if config.data.views == "all" or row["projection"].strip().lower() == "frontal":
                views.setdefault(row["uid"], []).append((row["projection"], root / "images_normalized" / row["filename"]))
        path = root / "indiana_reports.csv"
        rows = list(read_csv(path, ["uid", "findings", "impression"], skip))
        splits = thirds(row["uid"] for row in rows)
        for row in rows:
            if splits[row["uid"]] == split:
                images = [image for _, image in sorted(views.get(row["uid"], []))]   # "Frontal" sorts before "Lateral"
                yield study_example(row["uid"], images, row["findings"].strip() or row["impression"],
                                    f"{path}, uid {row['uid']}", skip)
    else:
        raise InputError(f"data.path={root}: expected annotation.json (R2Gen) or indiana_reports.csv (Kaggle) there")


def read_jsonl(config, split, skip):
    """Your own data: `data.path/{split}.jsonl`, one JSON object a line.

    {"id", "images": [paths from data.path], "report": text} is a report example;
    {"id", "images", "phrase": text, "boxes": [[x1, y1, x2, y2], ...]} (fractions of the image) a grounding example.
    Optional: "question", "thinking", "patient".
    """
    root, path = Path(config.data.path), Path(config.data.path) / f"{split}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read ({getattr(error, 'strerror', 0) or error})") from None
    for n, line in enumerate(lines, 1):
        where = f"{path}, line {n}"
        try:
            row = json.loads(line)
            images = [root / image for image in row["images"]]
            patient = str(row.get("patient", row["id"]))
            thinking = str(row.get("thinking", ""))
            if "report" in row:
                example = study_example(row["id"], images, row["report"], where, skip)
                yield example and dataclasses.replace(example, question=row.get("question", REPORT_QUESTION),
                                                      patient=patient, thinking=thinking)
                continue
            boxes = tuple(tuple(float(v) for v in box) for box in row["boxes"])
            phrase = str(row["phrase"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            skip(f"{where}: expected an object with id, images and report, or phrase and boxes ({error!r})")
            continue
        bad = [b for b in boxes if len(b) != 4 or not (0 <= b[0] < b[2] <= 1 and 0 <= b[1] < b[3] <= 1)]
        if bad:
            skip(f"{where}: box {list(bad[0])} is not x1 < x2, y1 < y2 inside the image (fractions from 0 to 1)")
        elif not all(map(os.path.isfile, images)) or not images:
            skip(f"{where}: an image of {list(map(str, images))} does not exist")
        else:
            yield Example(id=str(row["id"]), task="grounding", images=tuple(map(str, images)),
                          question=row.get("question", f"Where is {phrase}? {BOX_INSTRUCTION}"),
                          answer=boxes_text(boxes), thinking=thinking, boxes=boxes, label=phrase, patient=patient)


READERS = {"phantom": read_phantoms, "iu_xray": read_iu_xray, "jsonl": read_jsonl}


def load_split(config, split):
    """All examples of `split` ("train", "val", "test") for the configured tasks, in the configured output format.

    With data.on_error=skip, examples that cannot be used are left out, counted and reported; otherwise the first one
    raises InputError.
    """
    if config.data.source != "phantom" and not Path(config.data.path).is_dir():
        raise InputError(f"data.path={config.data.path!r}: no such folder; set it to the {config.data.source} dataset")
    problems = []

    def skip(message):
        if config.data.on_error == "stop":
            raise InputError(f"{message} (data.on_error=skip leaves such examples out)")
        problems.append(message)
    examples = [dataclasses.replace(e, style=style_of(config))
                for e in READERS[config.data.source](config, split, skip) if e and e.task in config.data.tasks]
    if problems:
        print(f"{split}: skipped {len(problems)} examples, the first: {problems[0]}", file=sys.stderr)
    if not examples:
        raise InputError(f"data.path={config.data.path!r}: no usable example in split {split!r}")
    return examples


# ---------------------------------------------------------------------------------------------- data order

STREAMS = {"sft": 0, "more": 1, "cold_start": 2, "grpo": 3}        # every stage reads the data in its own order


@lru_cache(maxsize=8)
def shuffled(n, seed, stream, epoch):
    return np.random.default_rng([seed, stream, epoch]).permutation(n)


def indices(n, count, step, seed, stream):
    """Indices of the `count` examples of step `step` out of n: consecutive slices of endless shuffled epochs."""
    places = range(step * count, (step + 1) * count)
    return [int(shuffled(n, seed, STREAMS[stream], p // n)[p % n]) for p in places]


def batch(examples, count, step, seed, stream, report_share):
    """The examples of one step: `report_share` of them reports, the rest grounding (all of one task if only one).

    A pure function of its arguments, so that a resumed run goes on where it was.
    """
    by_task = {task: [e for e in examples if e.task == task] for task in ("report", "grounding")}
    n_report = round(count * report_share) if by_task["grounding"] else count
    n_report = n_report if by_task["report"] else 0
    return [pool[i] for pool, k in ((by_task["report"], n_report), (by_task["grounding"], count - n_report)) if k
            for i in indices(len(pool), k, step, seed, stream)]


# ---------------------------------------------------------------------------------------------- phantoms

PHANTOM_LABELS = ("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema", "Consolidation",
                  "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
                  "Support Devices")
LABELS = ("No Finding", *PHANTOM_LABELS)
# Half of the studies are normal; the others draw one clinical picture, whose findings then co-occur: (weight, P(label)).
PICTURES = (
    (0.19, {"Cardiomegaly": .85, "Edema": .50, "Pleural Effusion": .50, "Support Devices": .25, "Atelectasis": .15}),
    (0.17, {"Pneumonia": .55, "Consolidation": .40, "Lung Opacity": .50, "Pleural Effusion": .20, "Atelectasis": .06}),
    (0.15, {"Atelectasis": .90, "Pleural Effusion": .30, "Support Devices": .25, "Lung Opacity": .12}),
    (0.07, {"Fracture": .65, "Pneumothorax": .45, "Pleural Effusion": .15, "Support Devices": .30, "Pleural Other": .05}),
    (0.10, {"Lung Lesion": .95, "Enlarged Cardiomediastinum": .12, "Lung Opacity": .10, "Pleural Effusion": .08}),
    (0.12, {"Cardiomegaly": .85, "Enlarged Cardiomediastinum": .15, "Support Devices": .15}),
    (0.08, {"Enlarged Cardiomediastinum": .65, "Support Devices": .30, "Edema": .12, "Pneumothorax": .06}),
    (0.06, {"Pleural Other": .90, "Lung Opacity": .20, "Lung Lesion": .06}),
    (0.06, {"Lung Opacity": .95, "Atelectasis": .10}),
)
SIZES, DEGREES = ("small", "moderate", "large"), ("mild", "moderate", "severe")
LUNG = ("Lung Lesion", "Lung Opacity", "Edema", "Consolidation", "Pneumonia", "Atelectasis")  # these unclear the lungs
REGIONS = {"Cardiomegaly": "heart", "Enlarged Cardiomediastinum": "mediastinum", **{x: "lungs" for x in LUNG},
           "Pneumothorax": "pleura", "Pleural Effusion": "pleura", "Pleural Other": "pleura", "Fracture": "bones",
           "Support Devices": "devices"}
ORDERS = (("heart", "mediastinum", "lungs", "pleura", "bones", "devices"),
          ("lungs", "pleura", "heart", "mediastinum", "bones", "devices"),
          ("devices", "heart", "mediastinum", "lungs", "pleura", "bones"),
          ("devices", "lungs", "pleura", "heart", "mediastinum", "bones"))

# label: (certain, hedged) wordings. {what} is the noun phrase, {a} its article, {be} its verb, {place} where it is.
WORDINGS = {
    "Enlarged Cardiomediastinum": (
        ("the mediastinum is widened.", "there is widening of the mediastinum.", "mediastinal widening is present."),
        ("the mediastinum may be widened.", "possible widening of the mediastinum.")),
    "Cardiomegaly": (
        ("there is {degree} cardiomegaly.", "the heart is {degree}ly enlarged.", "{degree} cardiomegaly is present.",
         "the cardiac silhouette is {degree}ly enlarged."),
        ("the heart may be enlarged.", "possible {degree} cardiomegaly.")),
    "Lung Lesion": (
        ("there {be} {a}{what} in the {place}.", "{a}{what} {be} seen in the {place}.", "{place} {what} {be} noted."),
        ("possible {what} in the {place}.", "there may be {a}{what} in the {place}.")),
    "Lung Opacity": (
        ("there is a hazy opacity in the {place}.", "a hazy opacity is seen in the {place}.",
         "hazy {place} opacity is noted.", "ill-defined opacity in the {place}."),
        ("possible hazy opacity in the {place}.", "there may be an opacity in the {place}.")),
    "Edema": (
        ("there is {degree} pulmonary edema.", "{degree} pulmonary edema is present.",
         "findings are consistent with {degree} pulmonary edema.", "perihilar haze of {degree} pulmonary edema."),
        ("possible {degree} pulmonary edema.", "findings may represent {degree} pulmonary edema.")),
    "Consolidation": (
        ("there is consolidation in the {place}.", "{place} consolidation is present.",
         "dense consolidation is seen in the {place}."),
        ("possible consolidation in the {place}.", "there may be consolidation in the {place}.")),
    "Pneumonia": (
        ("there is {place} pneumonia.", "findings are consistent with {place} pneumonia.",
         "patchy {place} pneumonia is present."),
        ("possible {place} pneumonia.", "findings may represent {place} pneumonia.")),
    "Atelectasis": (
        ("there is atelectasis at the {base}.", "linear atelectasis is seen at the {base}.",
         "{side} basilar atelectasis is present.", "bandlike {side} basilar atelectasis."),
        ("possible {side} basilar atelectasis.", "there may be atelectasis at the {base}.")),
    "Pneumothorax": (
        ("there is a {size} {side} pneumothorax.", "{size} {side} pneumothorax is present.",
         "a {size} {side} pneumothorax is seen."),
        ("possible {size} {side} pneumothorax.", "there may be a {size} {side} pneumothorax.")),
    "Pleural Effusion": (
        ("there {be} {a}{size} {side} {what}.", "{size} {side} {what} {be} present.", "{a}{size} {side} {what} {be} seen."),
        ("possible {size} {side} {what}.", "there may be {a}{size} {side} {what}.")),
    "Pleural Other": (
        ("there is {side} {what}.", "{side} {what} is present.", "{what} is seen on the {side}."),
        ("possible {side} {what}.", "there may be {side} {what}.")),
    "Fracture": (
        ("there {be} {a}displaced {side} {what}.", "displaced {side} {what} {be} present.", "{side} {what} {be} seen."),
        ("possible {side} {what}.", "there may be {a}{side} {what}.")),
    "Support Devices": (
        ("{a}{what} is in place.", "{a}{what} is present.", "there is {a}{what}.", "{a}{what} is seen."), ()),
}
# (probability, region, labels denied, wordings): taken in this order when every label is absent and not yet denied.
NEGATIONS = (
    (.20, "heart", ("Cardiomegaly", "Enlarged Cardiomediastinum"),
     ("the cardiomediastinal silhouette is normal.", "cardiomediastinal silhouette is within normal limits.")),
    (.90, "heart", ("Cardiomegaly",),
     ("heart size is normal.", "the heart is normal in size.", "heart size is within normal limits.")),
    (.65, "mediastinum", ("Enlarged Cardiomediastinum",),
     ("the mediastinal contours are normal.", "mediastinal contours are unremarkable.")),
    (.85, "lungs", LUNG, ("the lungs are clear.", "lungs are clear bilaterally.", "both lungs are clear.")),
    (.25, "pleura", ("Consolidation", "Pleural Effusion", "Pneumothorax"),
     ("no focal consolidation, pleural effusion, or pneumothorax.",
      "there is no focal consolidation, pleural effusion, or pneumothorax.")),
    (.80, "pleura", ("Pleural Effusion", "Pneumothorax"),
     ("no pleural effusion or pneumothorax.", "there is no pleural effusion or pneumothorax.",
      "no evidence of pneumothorax or pleural effusion.")),
    (.35, "lungs", ("Consolidation",), ("no focal consolidation.", "there is no focal consolidation.")),
    (.10, "lungs", ("Pneumonia",), ("no evidence of pneumonia.", "there is no pneumonia.")),
    (.15, "lungs", ("Edema",), ("no pulmonary edema.", "there is no pulmonary edema.")),
    (.70, "pleura", ("Pneumothorax",), ("no pneumothorax.", "there is no pneumothorax.")),
    (.60, "pleura", ("Pleural Effusion",), ("no pleural effusion.", "there is no pleural effusion.")),
    (.08, "bones", ("Fracture",), ("no rib fracture is seen.", "there is no rib fracture.")),
)
FILLERS = (.45, ("the bones are intact.", "osseous structures are unremarkable.", "no acute bony abnormality.")), \
          (.35, ("no acute cardiopulmonary abnormality.", "no acute cardiopulmonary process."))
ZONES = {"upper": ("upper lobe", -.20), "mid": ("mid lung", -.02), "lower": ("lower lobe", .14)}  # name, centre height
DEVICES = ("pacemaker", "endotracheal tube", "central venous catheter", "enteric tube", "chest tube")
QUESTION_NAMES = {"Enlarged Cardiomediastinum": "widened mediastinum", "Cardiomegaly": "enlarged heart",
                  "Lung Lesion": "lung lesion", "Lung Opacity": "hazy opacity", "Edema": "pulmonary edema",
                  "Pleural Other": "pleural thickening", "Fracture": "rib fracture", "Support Devices": "support device"}
QUESTIONS = ("Where is the {}? Give its boxes.", "Locate the {} in the image.", "Give the boxes of the {}.",
             "Mark the {} with boxes.", "Is there {}? If so, where?")


@dataclass(frozen=True)
class Finding:
    """One drawn observation; boxes are fractions (x1, y1, x2, y2) of the image, shapes one primitive list per box."""
    label: str
    side: str       # "left", "right" (the patient's), "both" or ""
    zone: str       # "upper", "mid", "lower" or ""
    severity: int   # 0, 1, 2
    what: str       # the noun the report uses
    certain: bool
    mentioned: bool
    boxes: tuple
    shapes: tuple = field(repr=False)


@dataclass(frozen=True)
class Phantom:
    seed: int
    index: int
    findings: tuple
    report: str
    thinking: str
    states: tuple   # 14 ints in LABELS order, as the report says: 0 blank, 1 positive, 2 negative, 3 uncertain
    boxes: dict     # label -> list of boxes of everything drawn, mentioned or not
    size: tuple     # width, height in pixels
    anatomy: dict = field(repr=False)

    @cached_property
    def image(self):
        """PIL image, mode "L", drawn on first use."""
        return draw(self)


def phantom(seed, index):
    """The study `index` of the endless data set `seed`; texts and boxes now, pixels on first use of `.image`."""
    rng = np.random.default_rng([seed, index, 0])
    anatomy = _anatomy(rng)
    findings = _findings(rng, anatomy)
    report, thinking, states = _texts(np.random.default_rng([seed, index, 1]), findings)
    boxes = {f.label: list(f.boxes) for f in findings}
    return Phantom(seed, index, findings, report, thinking, states, boxes, anatomy["size"], anatomy)


def grounding_questions(label, rng):
    """One wording of "where is `label`?"."""
    return _pick(rng, QUESTIONS).format(QUESTION_NAMES.get(label, label.lower()))


def _pick(rng, items):
    return items[int(rng.random() * len(items))]


def _anatomy(rng):
    """Geometry in the thorax frame: u to the image's right (the patient's left), v down, origin mid-chest, unit ~ image side."""
    width = int(rng.integers(112, 145))
    height = int(np.clip(width * rng.uniform(.92, 1.12), 112, 144))
    angle, lung_w, dome = math.radians(rng.uniform(-5, 5)), rng.uniform(.365, .405), rng.uniform(.25, .30)
    return dict(size=(width, height), angle=angle, scale=rng.uniform(.94, 1.04), cx=.5 + rng.uniform(-.02, .02),
                cy=.5 + rng.uniform(-.02, .02), lung_w=lung_w, lung_h=rng.uniform(.40, .44),
                dome=(dome, dome + rng.uniform(.01, .035)), curve=rng.uniform(1.2, 1.8), heart=lung_w * rng.uniform(.37, .46),
                med=rng.uniform(.05, .065), rib=rng.uniform(.085, .10), rib_phase=rng.random())


def _findings(rng, anatomy):
    """Sample what the patient has, where, and its drawing primitives; crowded places are used once."""
    if rng.random() < .5:
        labels = {"Support Devices"} if rng.random() < .06 else set()
    else:
        pick, picture = rng.random() * sum(w for w, _ in PICTURES), None
        for weight, picture in PICTURES:
            pick -= weight
            if pick < 0:
                break
        labels = {label for label, p in picture.items() if rng.random() < p}
    slots = [(s, z) for s in ("right", "left") for z in ZONES
             if not (s == "left" and z != "upper" and "Cardiomegaly" in labels)]  # a large heart hides the left base
    rng.shuffle(slots)
    tops, found = {"right": .19, "left": .19}, []
    for label in sorted(labels, key=("Cardiomegaly", "Pleural Effusion", "Atelectasis", "Pneumothorax").__contains__,
                        reverse=True):
        side, zone, severity, what = "", "", min(int(rng.random() * 3), 2), label.lower()
        if label in ("Lung Lesion", "Lung Opacity", "Consolidation", "Pneumonia"):
            if not slots:
                continue
            side, zone = slots.pop()
        elif label in ("Pleural Effusion", "Atelectasis"):
            side = ("right", "left", "both")[min(int(rng.random() * 3), 2)]
        elif label in ("Pneumothorax", "Pleural Other", "Fracture"):
            side = _pick(rng, ("right", "left"))
        elif label == "Edema":
            side = "both"
        what, groups = _shapes(rng, label, side, zone, severity, anatomy, tops, found)
        boxes = tuple(_box(group, anatomy) for group in groups)
        certain = label == "Support Devices" or rng.random() > (.25, .12, .08)[severity]
        found.append(Finding(label, side, zone, severity, what, certain, rng.random() > .05, boxes, groups))
        for s in ("right", "left") if side == "both" else (side,):
            gone = {"Pleural Effusion": ("lower", "mid")[:1 + (severity == 2)], "Atelectasis": ("lower",),
                    "Pneumothorax": ("upper",)}.get(label, ())
            slots = [slot for slot in slots if not (slot[0] == s and slot[1] in gone)]
    return tuple(found)


def _shapes(rng, label, side, zone, severity, an, tops, found):
    """(noun, groups): each group is the primitives of one box, in the thorax frame; updates `tops` of the fluid."""
    uni, lung_w = rng.uniform, an["lung_w"]
    signs = {"right": (-1,), "left": (1,), "both": (-1, 1), "": (1,)}[side]
    sign, v = signs[0], ZONES[zone][1] + uni(-.02, .02) if zone else 0
    u = sign * (uni(.18, .24) if zone != "lower" else uni(.22, .27))
    if label == "Cardiomegaly":
        return "", ((("heart", lung_w * (.56, .61, .67)[severity]),),)
    if label == "Enlarged Cardiomediastinum":
        return "", ((("mediastinum", uni(.115, .15)),),)
    if label == "Lung Lesion":
        if severity == 0 and rng.random() < .5:
            spots = ((u, v - .05), (u + sign * .05, v + .05))[:2]
            return "nodules", tuple((("blob", a, b, uni(.03, .04), uni(.03, .04), .8, .3),) for a, b in spots)
        radius = (.036, .05, .075)[severity] * uni(.9, 1.1)
        return "mass" if severity == 2 else "nodule", ((("blob", u, v, radius, radius * uni(.85, 1.1), .85, .3),),)
    if label == "Lung Opacity":
        return "", ((("blob", u, v, uni(.12, .15), uni(.11, .14), .62, 1.),),)
    if label == "Pneumonia":
        return "", (tuple(("blob", u + uni(-.08, .08), v + uni(-.08, .08), uni(.03, .05), uni(.03, .05), .75, .8)
                          for _ in range(10)),)
    if label == "Consolidation":
        return "", ((("slab", sign, v - uni(.09, .12), v + uni(.07, .10), uni(-.2, .2)),),)
    if label == "Edema":
        return "", tuple((("blob", s * .17, -.0, .17, .25, (.5, .62, .75)[severity], .8),) for s in signs)
    if label == "Pleural Effusion":
        groups = []
        for s in signs:
            corner = an["dome"][s > 0] + an["curve"] * (lung_w - .16) ** 2
            top = corner - (.15, .23, .35)[severity] + uni(-.02, .02)
            tops["left" if s > 0 else "right"] = top - .03
            groups.append((("fluid", s, top),))
        return "pleural effusion" + "s" * (side == "both"), tuple(groups)
    if label == "Atelectasis":
        groups = []
        for s in signs:
            v, tilt = tops["left" if s > 0 else "right"] - uni(0, .03), uni(-.03, .05)
            inner = .14 if s < 0 else min(.2, lung_w - .14)
            lines = [("line", ((s * inner, v + tilt), (s * (inner + lung_w) / 2, v + tilt * .3),
                               (s * (lung_w - .04), v)), .024, .70)]
            if severity:
                lines.append(("line", ((s * (inner + .03), v + tilt - .05), (s * (lung_w - .07), v - .05)), .018, .66))
            groups.append(tuple(lines))
        return "", tuple(groups)
    if label == "Pneumothorax":
        return "", ((("rim", sign, (.055, .09, .14)[severity], (.02, .10, .18)[severity]),),)
    if label == "Pleural Other":
        kind = _pick(rng, ("apical pleural thickening", "lateral pleural thickening", "pleural plaque"))
        top, bottom = {"a": (-.5, -.27), "l": (-.16, .14), "p": (-.02, .12)}[kind[0]]
        return kind, ((("wall", sign, top, bottom, .055 if kind[0] != "l" else .045),),)
    if label == "Fracture":
        groups, v = [], uni(-.22, .05)
        for i in range(1 + (severity == 2)):
            a, b = lung_w - uni(.08, .10), v + .11 * i
            groups.append((("line", ((sign * (a - .06), b - .015), (sign * (a - .008), b)), .026, .86),
                           ("line", ((sign * (a + .008), b + .04), (sign * (a + .055), b + .06)), .026, .86)))
        return "rib fracture" + "s" * (severity == 2), tuple(groups)
    kind = "chest tube" if any(f.label == "Pneumothorax" for f in found) else _pick(rng, DEVICES[:4])
    s = next((1 if f.side == "left" else -1 for f in found if f.label == "Pneumothorax"), _pick(rng, (-1, 1, 1)))
    path = {"pacemaker": ((s * .30, -.24), (s * .16, -.30), (.01 * s, -.20), (-.03, .05), (.08, .18)),
            "endotracheal tube": ((0, -.5), (.005, -.35), (0, -.13)),
            "central venous catheter": ((-.2, -.42), (-.12, -.37), (-.065, -.28), (-.055, .0)),
            "enteric tube": ((0, -.5), (.01, -.2), (.015, .2), (.06, .32), (.13, .36)),
            "chest tube": ((s * .46, .16), (s * .33, .08), (s * .27, -.08), (s * .24, -.27))}[kind]
    can = (("line", ((s * .27, -.25), (s * .33, -.25)), .085, .97),) if kind == "pacemaker" else ()
    return kind, (can + (("line", path, .016 if kind != "chest tube" else .022, .97),),)


def _outline(shape, an):
    """Points (N, 2) on the border of one primitive, thorax frame."""
    kind, *p = shape
    lung_w, turn = an["lung_w"], np.linspace(0, 2 * np.pi, 17)
    if kind == "blob":
        r = 1 - .2 * p[5]                                   # where a soft edge stops being visible
        return np.stack([p[0] + p[2] * r * np.cos(turn), p[1] + p[3] * r * np.sin(turn)], 1)
    if kind == "heart":
        return np.stack([_heart_u(p[0]) + p[0] * np.cos(turn), an["dome"][0] - .09 + .85 * p[0] * np.sin(turn)], 1)
    if kind == "line":
        path, half = np.array(p[0]), p[1] / 2
        return np.concatenate([path - half, path + half])
    if kind == "mediastinum":
        return np.array([(-p[0], -.36), (p[0], -.36), (-p[0], .05), (p[0], .05)])
    if kind == "slab":
        sign, top, bottom, tilt = p
        top_wall = _wall_u(max(top, -.38), an)
        return np.array([(sign * a, w + tilt * (a - .2)) for a in (.08, top_wall) for w in (max(top, -.38), bottom)])
    if kind == "fluid":
        a = np.linspace(.08, lung_w, 24)
        surface, floor = _surface(a, p[1], an), an["dome"][p[0] > 0] + an["curve"] * (a - .16) ** 2
        heart = ((p[0] * a - _heart_u(an["heart"])) / an["heart"]) ** 2 < .8
        keep = (surface < floor) & ~heart
        a = a[keep]
        return np.concatenate([np.stack([p[0] * a, surface[keep]], 1), np.stack([p[0] * a, floor[keep]], 1)])
    sign, top, bottom, thick = (p[0], -.5, p[2], p[1]) if kind == "rim" else p
    v = np.linspace(max(top, -an["lung_h"]), bottom, 16)
    outer = np.array([_wall_u(w, an) for w in v])
    inner = np.maximum(outer - thick, an["med"])
    return np.stack([sign * np.concatenate([outer, inner]), np.concatenate([v, v])], 1)


def _box(shapes, an):
    """Bounding box of the primitives in image fractions, clipped to the image."""
    u, v = np.concatenate([_outline(s, an) for s in shapes]).T
    x = an["cx"] + an["scale"] * (u * math.cos(an["angle"]) - v * math.sin(an["angle"]))
    y = an["cy"] + an["scale"] * (u * math.sin(an["angle"]) + v * math.cos(an["angle"]))
    return tuple(float(min(max(z, 0), 1)) for z in (x.min(), y.min(), x.max(), y.max()))


def _heart_u(half_width):
    return .055 + .3 * (half_width - .16)


def _wall_u(v, an):
    return .05 + (an["lung_w"] - .05) * math.sqrt(max(1 - (max(-v, 0) / an["lung_h"]) ** 2, 0))


def _surface(a, top, an):
    return top + .11 * (1 - np.exp((a - an["lung_w"]) / .08))   # meniscus: fluid climbs the lateral wall


def _soft(distance, width):
    return np.clip(.5 + distance / width, 0, 1)


def draw(phantom, without=None):
    """Pixels of a phantom as a PIL "L" image, optionally without the finding `without` (same anatomy and noise)."""
    an, (w, h) = phantom.anatomy, phantom.size
    rng = np.random.default_rng([phantom.seed, phantom.index, 2])
    shapes = [s for f in phantom.findings if f.label != without for group in f.shapes for s in group]
    of = {kind: [s[1:] for s in shapes if s[0] == kind]
          for kind in ("heart", "mediastinum", "blob", "slab", "fluid", "rim", "wall", "line")}
    x = ((np.arange(w, dtype=np.float32) + .5) / w - an["cx"])[None] / an["scale"]
    y = ((np.arange(h, dtype=np.float32) + .5) / h - an["cy"])[:, None] / an["scale"]
    cos, sin = np.float32(math.cos(an["angle"])), np.float32(math.sin(an["angle"]))
    u, v = x * cos + y * sin, y * cos - x * sin
    a, left = np.abs(u), u > 0
    low = rng.standard_normal((h // 6, w // 6), dtype=np.float32)
    low = np.asarray(Image.fromarray(low).resize((w, h), Image.Resampling.BICUBIC))

    wall = (1 - np.hypot(np.maximum(a - .05, 0) / (an["lung_w"] - .05), np.maximum(-v, 0) / an["lung_h"])) \
        * (an["lung_w"] - .05)                                                       # distance from the chest wall
    floor = np.where(left, an["dome"][1], an["dome"][0]).astype(np.float32) + an["curve"] * (a - .16) ** 2
    air = _soft(wall, .02) * _soft(floor - v, .02) * _soft(a - an["med"], .03)
    streaks = np.cos(11 * np.arctan2(v + .03, a - .07) + 2 * low) * np.exp(-np.hypot(a - .10, v + .02) / .13)
    opaque = .10 * low.clip(-2, 2) * .5 + .22 * np.maximum(streaks, 0)                        # lung markings
    lines = Image.new("L", (2 * w, 2 * h))
    pen = ImageDraw.Draw(lines)
    for u0, v0, ru, rv, amount, soft in of["blob"]:
        inside = 1 - np.hypot((u - u0) / ru, (v - v0) / rv)
        opaque = opaque + (1 - opaque) * amount * np.clip(inside / soft, 0, 1)
    for sign, top, bottom, tilt in of["slab"]:
        cut = v - tilt * (a - .2)
        inside = _soft(cut - top, .02) * _soft(bottom - cut, .02) * (left == (sign > 0))
        opaque = opaque + (1 - opaque) * .92 * inside * (1 - .5 * np.maximum(streaks, 0))
    for sign, top in of["fluid"]:
        opaque = opaque + (1 - opaque) * _soft(v - _surface(a, top, an), .015) * (left == (sign > 0))
    rim = line = plaque = 0
    for sign, thick, end in of["rim"]:
        here = _soft(end - v, .06) * (left == (sign > 0))
        rim = here * _soft(thick - wall, .01)
        line = here * np.clip(1 - np.abs(wall - thick) / .009, 0, 1)
    for sign, top, bottom, thick in of["wall"]:
        lumps = thick * (1 + .15 * low.clip(-1, 1)) - wall
        plaque = _soft(lumps, .012) * _soft(v - top, .03) * _soft(bottom - v, .03) * (left == (sign > 0))
    opaque = opaque * (1 - rim) - .30 * rim                                          # free air has no markings
    density = .60 + .12 * _soft(v - floor, .04) * _soft(.46 - a, .05) + .03 * low    # soft tissue, denser abdomen
    density = density - .36 * air * (1 - opaque)
    half = max([an["med"]] + [m[0] for m in of["mediastinum"]])
    centre = _soft(np.where(v < .05, half, an["med"]) - a - .02 * _soft(v - .0, .1), .02)
    ru = max([an["heart"]] + [m[0] for m in of["heart"]])
    heart = np.clip((1 - np.hypot((u - _heart_u(ru)) / ru, (v - an["dome"][0] + .09) / (.85 * ru))) / .12, 0, 1)
    solid = np.maximum(centre * .9, heart)
    density = density + np.maximum(.68 - density, 0) * solid + .05 * _soft(.035 - a, .02)
    density = density - .12 * _soft(.018 - a, .01) * _soft(-.14 - v, .04)             # trachea
    ribs = np.cos((v + .9 * a * a - .55 * a) * (2 * np.pi / an["rib"]) + 6.28 * an["rib_phase"])
    density = density + .09 * np.maximum(ribs - .1, 0) * _soft(wall + .03, .02) * _soft(floor + .02 - v, .08) * _soft(a - .04, .02)
    clavicle = np.clip(1 - np.abs(v + .32 + .16 * a) / .018, 0, 1) * _soft(a - .05, .02) * _soft(.36 - a, .04)
    density = density + .10 * clavicle + .25 * line + (.92 - density) * plaque * (np.abs(wall) < .1)
    for path, width, value in of["line"]:
        pixels = [(2 * w * (an["cx"] + an["scale"] * (p * cos - q * sin)), 2 * h * (an["cy"] + an["scale"] * (p * sin + q * cos)))
                  for p, q in path]
        pen.line(pixels, fill=int(255 * value), width=max(2, round(2 * width * w * an["scale"])), joint="curve")
    if of["line"]:
        density = np.maximum(density, np.asarray(lines.reduce(2), dtype=np.float32) / 255)
    density = density * _soft(.20 + .34 * _soft(v + .40, .14) - a, .03)               # outside the body
    gain, offset, gamma, grain = rng.uniform(.88, 1.08), rng.uniform(-.03, .03), rng.uniform(.85, 1.15), rng.uniform(2, 6)
    pixels = 255 * np.clip(density * gain + offset, 0, 1) ** np.float32(gamma)
    pixels = pixels + grain * rng.standard_normal((h, w), dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "L")


def _say(finding, wording):
    """Fill one wording for one finding and capitalise it."""
    plural = finding.side == "both" or finding.what.endswith("s") and finding.what != "mass"
    side = "bilateral" if finding.side == "both" else finding.side
    what = finding.what
    article = "" if plural else "an " if what[:1] in "ae" and what[:1] and "{size}" not in wording else "a "
    text = wording.format(what=what, a=article, be="are" if plural else "is", side=side, size=SIZES[finding.severity],
                          degree=DEGREES[finding.severity], base="lung bases" if plural else f"{side} lung base",
                          place=f"{side} {ZONES[finding.zone][0]}" if finding.zone else side)
    return text[0].upper() + text[1:]


def _texts(rng, findings):
    """(report, thinking, states) in the words of a reader who mentions most findings and denies some others."""
    drawn, states = {f.label for f in findings}, [0] * 14
    stock = not findings and rng.random() < .3                       # the report that says normal in the usual words
    pick = (lambda items: items[0]) if stock else (lambda items: _pick(rng, items))
    parts = {region: [] for region in ORDERS[0]}
    for f in findings:
        if f.mentioned:
            states[LABELS.index(f.label)] = 1 if f.certain else 3
            parts[REGIONS[f.label]].append(_say(f, pick(WORDINGS[f.label][0 if f.certain else 1])))
    denied = set()
    for chance, region, labels, wordings in NEGATIONS:
        if not drawn.intersection(labels) and not denied.intersection(labels) and (.5 if stock else rng.random()) < chance:
            parts[region].append(pick(wordings).capitalize())
            if labels != LUNG:                                       # "the lungs are clear" denies no single observation
                denied.update(labels)
                for label in labels:
                    states[LABELS.index(label)] = 2
    normal = not any(s in (1, 3) for s in states[1:13])
    if "Fracture" not in drawn and not stock and rng.random() < FILLERS[0][0]:
        parts["bones"].append(pick(FILLERS[0][1]).capitalize())
    order = ORDERS[0] if stock else _pick(rng, ORDERS[:2] if rng.random() < .7 else ORDERS)
    sentences = [s for region in order for s in parts[region]]
    if normal and rng.random() < FILLERS[1][0] or not sentences:
        sentences.append(pick(FILLERS[1][1]).capitalize())
    states[0] = int(normal)
    return " ".join(sentences), _thinking(findings), tuple(states)


def _thinking(findings):
    """A systematic reading, region by region, of what the report mentions."""
    def describe(labels, side=""):
        said = []
        for f in findings:
            if f.mentioned and f.label in labels and (not side or f.side in (side, "both")):
                name = f.what or f.label.lower()
                words = {"Cardiomegaly": f"{DEGREES[f.severity]} cardiomegaly", "Lung Opacity": "hazy opacity",
                         "Enlarged Cardiomediastinum": "widened", "Edema": f"{DEGREES[f.severity]} edema",
                         "Pneumothorax": f"{SIZES[f.severity]} {f.side} pneumothorax"}.get(f.label, name)
                if f.label in ("Pleural Effusion", "Pleural Other", "Fracture"):
                    size = SIZES[f.severity] + " " if f.label == "Pleural Effusion" else ""
                    words = f"{size}{'bilateral' if f.side == 'both' else f.side} {name}"
                zone = " in the " + ZONES[f.zone][0] if f.zone else ""
                said.append(("" if f.certain else "possible ") + words + zone)
        return ", ".join(said)
    rows = (("Heart", ("Cardiomegaly",), "", "normal size"), ("Mediastinum", ("Enlarged Cardiomediastinum",), "", "normal"),
            ("Right lung", LUNG, "right", "clear"), ("Left lung", LUNG, "left", "clear"),
            ("Pleura", ("Pneumothorax", "Pleural Effusion", "Pleural Other"), "", "normal"),
            ("Bones", ("Fracture",), "", "intact"), ("Devices", ("Support Devices",), "", "none"))
    return " ".join(f"{name}: {describe(labels, side) or default}." for name, labels, side, default in rows)
