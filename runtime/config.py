"""The configuration: every key with its meaning, default and bounds, and the one error class.

One YAML file with the sections below, then `key=value` on the command line. Where a default comes
from a paper, it is RadVLM-GRPO's for Qwen3-VL-8B. config.yaml has the values of the built-in run.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line: what, where, what to do."""


def reason_of(error: Exception) -> str:
    """Why a file cannot be read or written, without its name."""
    return getattr(error, "strerror", None) or str(error)


def bounded(default: float, low: float = 0, above: float = -math.inf, high: float = math.inf):
    """A number with low <= value <= high and value > above."""
    return field(default=default, metadata={"low": low, "above": above, "high": high})


UNBOUNDED = bounded(0, low=-math.inf).metadata


def list_of(*names: str):
    """A list with a default of its own for every configuration."""
    return field(default_factory=lambda: list(names))


Dataset = Literal[
    "phantom",
    "iu_xray",
    "mimic_cxr",
    "chexpert_plus",
    "rexgradient",
    "vindr_cxr",
    "ms_cxr",
    "padchest_gr",
    "chest_imagenome",
    "nih",
    "coco",
    "llava",
    "jsonl",
]
# `grounding` stands for all four kinds after it.
Task = Literal[
    "report", "classification", "grounding", "abnormality", "anatomy", "phrase", "detection"
]
Part = Literal["vision", "projector"]


@dataclass
class ModelConfig:
    # "tiny": the built-in Qwen3-VL with random weights. Else a local folder or a hub id.
    path: str = "tiny"
    # Of the forward pass, and of weights that are not trained. Those that are, and the optimiser,
    # stay in float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    # A larger image is reduced to this, in multiples of a merged patch.
    max_pixels: int = bounded(451584, 1)
    # A longer prompt is an error: cutting it would cut image tokens.
    max_prompt_tokens: int = bounded(2048, 1)
    # Run each prompt once for its G completions (Qwen-VL). false: plain rows.
    shared_prefix: bool = True
    # Compute activations again in the backward: a third more work, far less memory. You decide:
    # it pays where otherwise only a prompt or two would fit into a micro-batch.
    gradient_checkpointing: bool = False
    # Compile the layers for updates (torch.compile), once for all lengths. Sampling goes without.
    compile: bool = False
    # shard: weights, gradients and optimiser states are spread over the processes (FSDP2).
    parallel: Literal["replicate", "shard"] = "replicate"
    # The linear layers that get adapters where lora_rank > 0, by the last part of their names.
    lora_targets: list[str] = list_of(
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )


@dataclass
class Source:
    """One of several datasets. What an entry leaves out is taken from the section `data`."""

    # Which dataset it is: the name of a reader.
    source: Dataset = "phantom"
    # Its folder, relative to data.path. Empty: the name of the dataset.
    path: str = ""
    # The folder of its images where they lie elsewhere, relative to data.path.
    images: str = ""
    # What is asked about its studies.
    tasks: list[Task] = list_of()
    # As in `data`.
    views: Literal["", "all", "frontal"] = ""
    # How often its studies come up in an epoch of training.
    weight: float = bounded(1.0, above=0)
    # Use only the first studies of each split. 0: all.
    limit: int = bounded(0)

    def image_root(self) -> Path:
        """The folder that all its images must lie in."""
        if self.images:
            return Path(self.images)
        # These annotate the images of MIMIC-CXR-JPG, which stands beside them.
        on_mimic = self.source in ("ms_cxr", "chest_imagenome")
        if on_mimic and not Path(self.path, "files").is_dir():
            return Path(self.path).absolute().parent / "mimic_cxr"
        return Path(self.path)


@dataclass
class DataConfig:
    # The dataset, unless `train` names several.
    source: Dataset = "phantom"
    # The folder of the dataset. With several datasets, the folder that theirs lie in.
    path: str = ""
    # The folder of the images where they lie elsewhere.
    images: str = ""
    # Several datasets: [{source: mimic_cxr, weight: 2}, {source: vindr_cxr}]
    train: list[Source] = list_of()
    # The validation data. Empty: the held-out splits of `train`.
    val: list[Source] = list_of()
    # The test data. Empty: the held-out splits of `train`.
    test: list[Source] = list_of()
    # What is asked about a study. classification is for SFT only.
    tasks: list[Task] = list_of("report", "grounding", "classification")
    # Share of report prompts in a GRPO step. The rest is grounding.
    report_share: float = bounded(0.5, high=1)
    # frontal: only the first frontal view of a study.
    views: Literal["all", "frontal"] = "all"
    # Leave out training reports that repeat a held-out report word for word.
    dedup: bool = False
    # Processes that decode images while the device computes. 0: none.
    workers: int = bounded(0)
    # Cold start: JSON lines with id and thinking. Empty: traces are made from the references.
    traces: str = ""
    # Think before answering.
    thinking: bool = False
    # tags: <think>..</think><report>..</report> (MRG-R1). suffix: ..</think>.. (RadVLM).
    think_format: Literal["tags", "suffix"] = "tags"
    # Phantoms as they come, and as many chosen for their findings, with boxes; both with a report.
    train_size: int = bounded(6000, 1)
    # For validation losses: as many with a report, and as many with boxes.
    val_size: int = bounded(64, 1)
    # The same for the evaluation.
    test_size: int = bounded(768, 1)
    # An example that cannot be used stops the run, or is left out and counted.
    on_error: Literal["stop", "skip"] = "stop"


@dataclass
class SFTConfig:
    # "more" and "cold_start" continue from the checkpoint of "sft".
    stage: Literal["sft", "more", "cold_start"] = "sft"
    # Where to start: auto (see stage), base (model.path), or a checkpoint folder.
    init: str = "auto"
    # Optimiser steps of sft.stage=sft and cold_start.
    steps: int = bounded(300, 1)
    # Steps of sft.stage=more: about the compute of the GRPO stage.
    more_steps: int = bounded(150, 1)
    # Studies per step. All questions about a study are trained together.
    batch_size: int = bounded(32, 1)
    # Studies per forward pass, on each process.
    micro_batch: int = bounded(32, 1)
    # muon learns more from random weights in as many steps.
    optimizer: Literal["adamw", "muon"] = "adamw"
    # Parts that this stage does not train: the vision tower, what maps its features to text.
    freeze: list[Part] = list_of()
    # Above 0: train low-rank adapters of model.lora_targets, with alpha = 2 rank.
    lora_rank: int = bounded(0)
    # The peak: linear warm-up, then cosine to zero.
    lr: float = bounded(1e-5, above=0)
    # Steps until the peak.
    warmup: int = bounded(10)
    # Steps between two validation losses, and checkpoints.
    eval_every: int = bounded(100, 1)


@dataclass
class GRPOConfig:
    # Where to start: auto (SFT, or its cold start if data.thinking), base, or a folder.
    init: str = "auto"
    # Rollouts, each with its updates.
    steps: int = bounded(300, 1)
    # Prompts per step, over all processes.
    prompts: int = bounded(512, 1)
    # Completions per prompt, G. A completion is compared with the others of its group.
    group_size: int = bounded(8, 2)
    # Prompts per optimiser step. 0: all of the step.
    mini_batch: int = bounded(0)
    # How often each mini-batch is used.
    epochs: int = bounded(1, 1)
    # Tokens of prompts and completions per forward pass of an update, on each process; a prompt
    # and its completions stay together. 0: as many as the memory takes.
    micro_tokens: int = bounded(0)
    # Prompts that are sampled together, on each process.
    sample_batch: int = bounded(16, 1)
    # A completion that is longer is cut.
    max_new_tokens: int = bounded(1024, 1)
    # Of sampling, and of the log-probs that are trained.
    temperature: float = bounded(1.0, above=0)
    # muon learns more from random weights in as many steps.
    optimizer: Literal["adamw", "muon"] = "adamw"
    # Parts that this stage does not train: the vision tower, what maps its features to text.
    freeze: list[Part] = list_of()
    # Above 0: train low-rank adapters of model.lora_targets, with alpha = 2 rank. The reference is
    # the policy without them.
    lora_rank: int = bounded(0)
    # Constant.
    lr: float = bounded(1e-6, above=0)
    # An advantage is the reward minus the group's mean, divided by the group's std, by nothing, or
    # by the batch's std.
    adv_norm: Literal["group", "none", "batch"] = "group"
    # Normalise each component of the reward by itself, then take the weighted sum (GDPO).
    normalize_parts: bool = False
    # Leave out groups whose advantages are all zero: those of equal rewards.
    drop_degenerate: bool = False
    # The ratio of new to old probability counts from 1 - clip_low ...
    clip_low: float = bounded(0.2, high=1)
    # ... to 1 + clip_high.
    clip_high: float = bounded(0.28)
    # sequence: one ratio per completion (GSPO).
    importance: Literal["token", "sequence"] = "token"
    # The mean over tokens, of sequence means, or a sum over a constant (Dr. GRPO).
    loss_agg: Literal["token", "sequence", "constant"] = "token"
    # Weight of the KL to the reference. 0 also saves the reference model.
    kl_coef: float = bounded(0.01)
    # k3 is never negative, see kl_terms in train_grpo.py.
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    # Steps between two checkpoints.
    save_every: int = bounded(25, 1)


@dataclass
class RewardsConfig:
    # Components of the reward of a report with their weights. Own ones: path/to/file.py:function
    report: dict[str, float] = field(default_factory=lambda: {"mccs": 0.4, "label_f1": 0.6})
    # The same for grounding.
    grounding: dict[str, float] = field(default_factory=lambda: {"soft_f1": 1.0})
    # chexbert.pth as published: read labels with CheXbert. Empty: with the built-in rules.
    chexbert: str = ""
    # CheXbert's tokenizer: a local folder or hub id.
    bert: str = "bert-base-uncased"
    # MCCS is 0 up to this cosine.
    mccs_margin: float = bounded(0.5, high=math.nextafter(1, 0))
    # The component overlong is 0 up to this number of tokens ...
    overlong_start: int = bounded(256)
    # ... and -1 from this one on.
    overlong_end: int = bounded(512, 1)
    # What 2 T is divided by: as in the code of RadVLM-GRPO, or as in its figure.
    soft_f1_mode: Literal["radvlm", "pq"] = "radvlm"
    # soft_f1 is 1 when nothing is there and the answer is [], or words without brackets.
    match_empty: bool = True


@dataclass
class EvalConfig:
    # The data that are predicted.
    split: Literal["train", "val", "test"] = "test"
    # Examples per task. 0: all.
    limit: int = bounded(0)
    # Scores of reports from the package radeval, NAME or NAME:KEY: see scorers/radeval.py.
    radeval: list[str] = list_of()


@dataclass
class LogConfig:
    # The newest checkpoints that a run keeps, beside the best.
    keep_last: int = bounded(1, 1)
    # Send the metrics to Weights & Biases, too.
    wandb: bool = False


@dataclass
class Config:
    # Of data, order and samples.
    seed: int = bounded(0, high=2**53)
    # The folder of the runs and their evaluation.
    out: str = "runs/phantom"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


# ------------------------------------------------------------------------------- reading

# Keys that older configurations may have, and what to do instead.
GONE = {
    "grpo.micro_batch": "set grpo.micro_tokens, or leave it out: the memory decides",
    "model.min_pixels": "leave it out; images are at least 32 x 32 pixels",
}


class UniqueKeys(yaml.SafeLoader):
    """Of two equal keys YAML keeps the last: here they are an error."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands there twice")
        return node


# What yaml raises for bad input: also a date that cannot be, or `!!int ''`.
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file over the defaults, then `key=value` overrides like "grpo.kl_coef=0".

    Raises InputError for an unknown key, a wrong type or an impossible value.
    """
    config = Config()
    for name, value in read_yaml(path).items():
        # A key of the whole configuration, or a section with keys.
        if not any(known.startswith(f"{name}.") for known in known_keys()):
            set_key(config, f"{name}", value, path)
            continue
        require(isinstance(value, dict), f"{path}: {name}", "a section with keys", value)
        for key in value:
            set_key(config, f"{name}.{key}", value[key], path)

    for item in overrides:
        origin = f"argument {item!r}"
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"{origin}: expected key=value, like grpo.kl_coef=0")
        try:
            value = yaml.load(text, UniqueKeys) if text else ""
        except NOT_YAML:
            raise InputError(f"{origin}: the value is not valid YAML") from None
        set_key(config, key, value, origin)

    check_together(config)
    return config


def check_together(config):
    """What is possible by itself, and not together."""
    data, grpo = config.data, config.grpo
    require(config.out, "out", "a folder", config.out)
    require(data.tasks, "data.tasks", "at least one task", data.tasks)
    for task in ("report", "grounding"):
        paid = getattr(config.rewards, task)
        require(paid or task not in data.tasks, f"rewards.{task}", "a reward", paid)
    if data.train and data.source != DataConfig.source:
        raise InputError(
            f"data.source={data.source} would not be read, because data.train names the datasets; "
            f"add data.train=[], or name it there"
        )
    if grpo.mini_batch > grpo.prompts:
        raise InputError(f"grpo.mini_batch={grpo.mini_batch} is larger than {grpo.prompts=}")
    if grpo.normalize_parts and grpo.adv_norm not in ("group", "batch"):
        raise InputError(
            "grpo.normalize_parts=true divides by a std: it takes grpo.adv_norm=group or batch"
        )


def config_text(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Raises InputError."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the configuration ({reason_of(error)})") from None
    except NOT_YAML as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections like 'grpo:', got {type(tree).__name__}")
    return tree or {}


@cache
def known_keys(section: type = Config) -> dict[str, tuple]:
    """Every dotted key with the type of its value and its bounds: {"grpo.kl_coef": (float, ..)}."""
    types = get_type_hints(section)
    keys = {}
    for f in fields(section):
        kind = types[f.name]
        if is_dataclass(kind):
            keys |= {f"{f.name}.{name}": known for name, known in known_keys(kind).items()}
        else:
            keys[f.name] = kind, f.metadata
    return keys


def set_key(config: Config, name: str, value: Any, origin: str | Path):
    """Set one dotted key. Raises InputError for an unknown one and names the nearest."""
    # One weight of a reward table. The names of own rewards hold dots, too.
    if weight := re.fullmatch(r"rewards\.(report|grounding)\.(.*)", name, re.DOTALL):
        task, component = weight.groups()
        getattr(config.rewards, task)[component] = parse_number(name, value)
        return
    keys = known_keys()
    if name in GONE:
        raise InputError(f"{origin}: {name} is gone: {GONE[name]}")
    if name not in keys:
        nearest = difflib.get_close_matches(name, keys, 1, 0)[0]
        raise InputError(
            f"{origin}: unknown key {name!r} = {value!r}; the nearest valid key is {nearest!r}"
        )
    *sections, last = name.split(".")
    section = getattr(config, sections[0]) if sections else config
    setattr(section, last, parse(name, value, *keys[name]))


def parse(name: str, value: Any, kind: Any, bounds: Mapping = UNBOUNDED) -> Any:
    """`value` as a `kind`. Raises InputError if it is of another type or impossible."""
    items = get_args(kind)
    if get_origin(kind) is Literal:
        require(value in items, name, f"one of {', '.join(items)}", value)
        return value
    if get_origin(kind) is dict:
        require(isinstance(value, dict), name, "names with numbers, like {mccs: 1}", value)
        return {str(k): parse_number(f"{name}.{k}", v) for k, v in value.items()}
    if get_origin(kind) is list:
        require(isinstance(value, list), name, "a list, like [a, b]", value)
        return [parse(name, item, *items) for item in value]
    if kind is Source:
        return parse_source(name, value)
    if kind is bool:
        require(isinstance(value, bool), name, "true or false", value)
        return value
    if kind is str:
        text = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        require(text, name, "text", value)
        return str(value)
    return parse_number(name, value, kind, bounds)


def parse_source(name, value):
    """An entry of data.train, data.val or data.test."""
    require(isinstance(value, dict), name, "a list of sources, like [{source: iu_xray}]", value)
    keys = known_keys(Source)
    for unknown in value.keys() - keys:
        raise InputError(f"{name}: expected {', '.join(keys)}, got {unknown!r}")
    return Source(**{key: parse(f"{name}[].{key}", value[key], *keys[key]) for key in value})


def parse_number(name, value, kind=float, bounds=UNBOUNDED):
    """YAML reads 1e-4 as text, so numbers are accepted in any notation."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if kind is int:
        require(number % 1 == 0, name, "a whole number", value)
    require(math.isfinite(number), name, "a number", value)

    low, above, high = bounds["low"], bounds["above"], bounds["high"]
    require(number >= low, name, f"at least {low:g}", value)
    require(number > above, name, f"more than {above:g}", value)
    require(number <= high, name, f"at most {high:g}" if high >= 1 else "less than 1", value)
    return kind(number)


def require(condition, key, expected, value):
    if not condition:
        raise InputError(f"{key}: expected {expected}, got {value!r}")
