"""The configuration: every key with its meaning, default and bounds, and the one error class.

One YAML file with the sections below, then `key=value` on the command line. Where a default comes
from a paper, it is RadVLM-GRPO's for Qwen3-VL-8B. config.yaml has the values of the built-in run.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line: what, where, what to do."""


def bounded(default: float, low: float = 0, above: float = -math.inf, high: float = math.inf):
    """A number with low <= value <= high and value > above."""
    return field(default=default, metadata={"low": low, "above": above, "high": high})


def list_of(*names: str):
    """A list with a default of its own for every configuration."""
    return field(default_factory=lambda: list(names))


Dataset = Literal[
    "phantom",
    "iu_xray",
    "mimic_cxr",
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
    # "tiny" is the built-in Qwen3-VL with random weights. Else a local folder or a hub id.
    path: str = "tiny"
    # Of the forward pass. Weights and optimiser stay in float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    # Every image is resized to between min_pixels and max_pixels, in multiples of a merged patch.
    min_pixels: int = bounded(1024, 1)
    max_pixels: int = bounded(451584, 1)
    # A longer prompt is an error: cutting it would cut image tokens.
    max_prompt_tokens: int = bounded(2048, 1)
    # Run each prompt once for its G completions (Qwen-VL). false: plain rows.
    shared_prefix: bool = True
    # Compute activations again in the backward pass, which saves memory.
    gradient_checkpointing: bool = False
    # shard: weights, gradients and optimiser states are spread over the processes (FSDP2).
    parallel: Literal["replicate", "shard"] = "replicate"
    # The linear layers that get adapters where lora_rank > 0, by the last part of their names.
    lora_targets: list[str] = list_of(
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )


@dataclass
class Source:
    """One of several datasets. What an entry leaves out is taken from the section `data`."""

    source: Dataset = "phantom"
    # Its folder, relative to data.path. Empty: the name of the dataset.
    path: str = ""
    # The folder of its images where they lie elsewhere, relative to data.path.
    images: str = ""
    tasks: list[Task] = list_of()
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
    source: Dataset = "phantom"
    # The folder of the dataset. With several datasets, the folder that theirs lie in.
    path: str = ""
    # The folder of the images where they lie elsewhere.
    images: str = ""
    # Several datasets: [{source: mimic_cxr, weight: 2}, {source: vindr_cxr}]
    train: list[Source] = list_of()
    # Empty: the held-out splits of `train`.
    val: list[Source] = list_of()
    test: list[Source] = list_of()
    # classification is for SFT only.
    tasks: list[Task] = list_of("report", "grounding", "classification")
    # Share of report prompts in a GRPO step. The rest is grounding.
    report_share: float = bounded(0.5, high=1)
    # frontal: only the first frontal view of a study.
    views: Literal["all", "frontal"] = "all"
    # Leave out training reports that repeat a held-out report word for word.
    dedup: bool = False
    # Cold start: JSON lines with id and thinking. Empty: traces are made from the references.
    traces: str = ""
    # Think before answering.
    thinking: bool = False
    # tags: <think>..</think><report>..</report> (MRG-R1). suffix: ..</think>.. (RadVLM).
    think_format: Literal["tags", "suffix"] = "tags"
    # Phantoms with a report, and as many with boxes, in each split.
    train_size: int = bounded(6000, 1)
    val_size: int = bounded(64, 1)
    test_size: int = bounded(768, 1)
    # An example that cannot be used stops the run, or is left out and counted.
    on_error: Literal["stop", "skip"] = "stop"


@dataclass
class SFTConfig:
    # "more" and "cold_start" continue from the checkpoint of "sft".
    stage: Literal["sft", "more", "cold_start"] = "sft"
    # Where to start: auto (see stage), base (model.path), or a checkpoint folder.
    init: str = "auto"
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
    warmup: int = bounded(10)
    # cold_start: share of the examples that are trained without thinking.
    plain_share: float = bounded(0.5, high=1)
    # Steps between two validation losses, and checkpoints.
    eval_every: int = bounded(100, 1)


@dataclass
class GRPOConfig:
    # Where to start: auto (SFT, or its cold start if data.thinking), base, or a folder.
    init: str = "auto"
    steps: int = bounded(300, 1)
    # Prompts per step, over all processes.
    prompts: int = bounded(512, 1)
    # Completions per prompt, G. A completion is compared with the others of its group.
    group_size: int = bounded(8, 2)
    # Prompts per optimiser step. 0: all of the step.
    mini_batch: int = bounded(0)
    # How often each mini-batch is used.
    epochs: int = bounded(1, 1)
    # Prompts per forward pass, on each process.
    micro_batch: int = bounded(4, 1)
    # Prompts that are sampled together, on each process.
    sample_batch: int = bounded(16, 1)
    max_new_tokens: int = bounded(1024, 1)
    temperature: float = bounded(1.0, above=0)
    # optimizer, freeze, lora_rank: as in sft. With adapters, the reference is the policy without.
    optimizer: Literal["adamw", "muon"] = "adamw"
    freeze: list[Part] = list_of()
    lora_rank: int = bounded(0)
    # Constant.
    lr: float = bounded(1e-6, above=0)
    # What advantages are divided by: the std of the group, nothing, or the std of the batch.
    adv_norm: Literal["group", "none", "batch"] = "group"
    # Normalise each component of the reward by itself, then take the weighted sum (GDPO).
    normalize_parts: bool = False
    # Leave out groups whose rewards are all equal.
    drop_degenerate: bool = False
    clip_low: float = bounded(0.2, high=1)
    clip_high: float = bounded(0.28)
    # sequence: one ratio per completion (GSPO).
    importance: Literal["token", "sequence"] = "token"
    # The mean over tokens, of sequence means, or a sum over a constant (Dr. GRPO).
    loss_agg: Literal["token", "sequence", "constant"] = "token"
    # 0 also saves the reference model.
    kl_coef: float = bounded(0.01)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    save_every: int = bounded(25, 1)


@dataclass
class RewardsConfig:
    # Components with their weights, for each task. Own ones: path/to/file.py:function
    report: dict[str, float] = field(default_factory=lambda: {"mccs": 0.4, "label_f1": 0.6})
    grounding: dict[str, float] = field(default_factory=lambda: {"soft_f1": 1.0})
    # chexbert.pth as published: read labels with CheXbert. Empty: with the built-in rules.
    chexbert: str = ""
    # CheXbert's tokenizer: a local folder or hub id.
    bert: str = "bert-base-uncased"
    mccs_margin: float = bounded(0.5, high=math.nextafter(1, 0))
    # overlong pays 0 up to overlong_start tokens, and -1 from overlong_end on.
    overlong_start: int = bounded(256)
    overlong_end: int = bounded(512, 1)
    soft_f1_mode: Literal["radvlm", "pq"] = "radvlm"
    # Pay 1 when nothing is there and no box is given.
    match_empty: bool = True


@dataclass
class EvalConfig:
    split: Literal["train", "val", "test"] = "test"
    # Examples per task. 0: all.
    limit: int = bounded(0)
    batch_size: int = bounded(64, 1)


@dataclass
class LogConfig:
    # The newest checkpoints that a run keeps, beside the best.
    keep_last: int = bounded(1, 1)
    wandb: bool = False


@dataclass
class Config:
    seed: int = bounded(0)
    out: str = "runs/phantom"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


# ------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Key:
    """A key of the configuration: the type of its value, and its bounds if it is a number."""

    kind: Any
    bounds: typing.Mapping[str, float]


@cache
def known_keys(section: type = Config, prefix: str = "") -> dict[str, Key]:
    """Every dotted key, e.g. {"grpo.kl_coef": Key(float, ..)}."""
    kinds = typing.get_type_hints(section)
    keys = {}
    for f in dataclasses.fields(section):
        kind = kinds[f.name]
        if dataclasses.is_dataclass(kind):
            keys |= known_keys(kind, f"{prefix}{f.name}.")
        else:
            keys[prefix + f.name] = Key(kind, f.metadata)
    return keys


def require(condition: bool, key: str, expected: str, value: Any):
    if not condition:
        raise InputError(f"{key}: expected {expected}, got {value!r}")


def parse_number(name: str, value: Any, key: Key) -> float:
    """YAML reads 1e-4 as text, so numbers are accepted in any notation."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    whole = key.kind is int
    kind = "a whole number" if whole else "a number"
    require(math.isfinite(number) and not (whole and number % 1), name, kind, value)

    low = key.bounds.get("low", -math.inf)
    above = key.bounds.get("above", -math.inf)
    high = key.bounds.get("high", math.inf)
    require(number >= low, name, f"at least {low:g}", value)
    require(number > above, name, f"more than {above:g}", value)
    require(number <= high, name, f"at most {high:g}" if high in (0, 1) else "less than 1", value)
    return key.kind(number)


def parse_source(name: str, value: Any) -> Source:
    """An entry of data.train, data.val or data.test."""
    require(isinstance(value, dict), name, "a list of sources, like [{source: iu_xray}]", value)
    keys = known_keys(Source)
    for unknown in set(value) - set(keys):
        raise InputError(f"{name}: expected {', '.join(keys)}, got {unknown!r}")
    return Source(**{key: parse(f"{name}[].{key}", value[key], keys[key]) for key in value})


def parse(name: str, value: Any, key: Key) -> Any:
    """`value` as what the key expects. Raises InputError if it is of another type or impossible."""
    kind, items = typing.get_origin(key.kind), typing.get_args(key.kind)
    if kind is Literal:
        require(value in items, name, f"one of {', '.join(items)}", value)
        return value
    if kind is dict:
        require(isinstance(value, dict), name, "names with numbers, like {mccs: 1}", value)
        number = Key(float, {})
        return {str(k): parse_number(f"{name}.{k}", v, number) for k, v in value.items()}
    if kind is list:
        require(isinstance(value, list), name, "a list, like [a, b]", value)
        if items == (Source,):
            return [parse_source(name, item) for item in value]
        return [parse(name, item, Key(items[0], {})) for item in value]
    if key.kind is bool:
        require(isinstance(value, bool), name, "true or false", value)
        return value
    if key.kind is str:
        text = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        require(text, name, "text", value)
        return str(value)
    return parse_number(name, value, key)


def set_key(config: Config, name: str, value: Any, origin: str):
    """Set one dotted key. Raises InputError for an unknown one and names the nearest."""
    *sections, last = name.split(".")
    # One weight of a reward table. The names of own rewards hold dots, too.
    for task in ("report", "grounding"):
        table = f"rewards.{task}."
        if name.startswith(table):
            weights = getattr(config.rewards, task)
            weights[name.removeprefix(table)] = parse_number(name, value, Key(float, {}))
            return

    keys = known_keys()
    if name not in keys:
        nearest = difflib.get_close_matches(name, keys, 1, 0)[0]
        raise InputError(
            f"{origin}: unknown key {name!r} = {value!r}; the nearest valid key is {nearest!r}"
        )
    section = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, last, parse(name, value, keys[name]))


# What yaml raises for bad input: also a date that cannot be, or `!!int ''`.
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. Raises InputError."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot read the configuration ({reason})") from None
    except NOT_YAML as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections like 'grpo:', got {type(tree).__name__}")
    return tree or {}


def set_section(config: Config, tree: dict, prefix: str, path: str | Path):
    """Set the keys of a section of a file, and of the sections in it."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if any(known.startswith(f"{key}.") for known in known_keys()):
            require(isinstance(value, dict), f"{path}: {key}", "a section with keys", value)
            set_section(config, value, f"{key}.", path)
        else:
            set_key(config, key, value, str(path))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file over the defaults, then `key=value` overrides like "grpo.kl_coef=0".

    Raises InputError for an unknown key, a wrong type or an impossible value.
    """
    config = Config()
    set_section(config, read_yaml(path), "", path)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"argument {item!r}: expected key=value, like grpo.kl_coef=0")
        try:
            value = yaml.safe_load(text) if text else ""
        except NOT_YAML:
            raise InputError(f"argument {item!r}: the value is not valid YAML") from None
        set_key(config, key, value, f"argument {item!r}")

    grpo = config.grpo
    require(bool(config.out), "out", "a folder", config.out)
    require(bool(config.data.tasks), "data.tasks", "at least one task", config.data.tasks)
    if config.model.min_pixels > config.model.max_pixels:
        raise InputError("model.min_pixels is larger than model.max_pixels")
    if grpo.mini_batch > grpo.prompts:
        raise InputError(f"grpo.mini_batch={grpo.mini_batch} is larger than {grpo.prompts=}")
    if grpo.normalize_parts and grpo.adv_norm == "none":
        raise InputError(
            "grpo.normalize_parts=true divides by a std: it takes grpo.adv_norm=group or batch"
        )
    return config


def config_text(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def get_key(config: Config, name: str) -> Any:
    """The value of a dotted key."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
