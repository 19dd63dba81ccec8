"""What the benchmarks share: the clock, peak memory, and a Qwen3-VL larger than the built-in one.

Importing this puts the project on the path.
"""

import copy
import dataclasses
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model  # noqa: E402
from data import Example  # noqa: E402
from runtime.config import Config, load_config  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MIB = 2**20


# ------------------------------------------------------------------------------- measuring


def machine() -> str:
    """The device and the version of torch, for the first line of a benchmark."""
    name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if CUDA:
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def now() -> float:
    """Seconds, once all work on the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(works: list[Callable], cycles: int) -> np.ndarray:
    """Median seconds of each function. They take turns, after one turn that does not count."""
    times = []
    for _ in range(cycles + 1):
        seconds = []
        for work in works:
            start = now()
            work()
            seconds.append(now() - start)
        times.append(seconds)
    return np.median(times[1:], axis=0)


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at the peak. Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 2**10


def peak_memory(work: Callable) -> tuple[float, float]:
    """(MiB when work() starts, MiB at its peak): of the process, on CUDA what torch has allocated.

    Without CUDA, Linux only.
    """
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
        work()
        return before, torch.cuda.max_memory_allocated() / MIB

    # Forget the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return before, resident("VmHWM")


def own_process(file: str, *arguments: object) -> list[float]:
    """The last line that `python file arguments` prints, as floats."""
    command = [sys.executable, file, *map(str, arguments)]
    # With this, glibc gives freed memory back at once.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{file} {arguments}: {done.stderr[-2000:]}")
    last_line = done.stdout.split("\n")[-2]
    return [float(word) for word in last_line.split()]


def print_head(head: str) -> None:
    """Print the head of a Markdown table, "| a | b |", and the line below it."""
    columns = head.count("|") - 1
    print(head)
    print("|---" * columns + "|")


# ------------------------------------------------------------------------------- the model


def build_model(text: dict, vision: dict, rope: dict, side: int) -> tuple[nn.Module, Any]:
    """The built-in Qwen3-VL with other sizes and random weights, on the device, and its processor.

    text, vision, rope: what differs in the parts of its configuration. Its images have side x side
    pixels.
    """
    pixels = {"min_pixels": side * side, "max_pixels": side * side}
    small, processor = model.build_tiny(0, pixels, data.corpus(Config()))
    config = copy.deepcopy(small.config)
    config.text_config.update(text)
    config.text_config.rope_parameters |= rope
    config.vision_config.update(vision)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    processor.image_processor.patch_size = config.vision_config.patch_size

    torch.manual_seed(0)
    with torch.device(DEVICE):
        large = type(small)(config)
    large.generation_config = small.generation_config
    return large, processor


def save_model(folder: Path, vocabulary: int, side: int) -> None:
    """Write a random Qwen3-VL as a model folder.

    Hidden 256, 4 layers, 4 heads over 2, a head of its own; vision tower 4 x 128, images of side x
    side pixels, which are (side / 28)^2 tokens.
    """
    text = dict(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
    )
    vision = dict(
        depth=4, intermediate_size=512, out_hidden_size=256, deepstack_visual_indexes=[0, 1, 2]
    )
    large, processor = build_model(text, vision, {"mrope_section": [12, 10, 10]}, side)
    model.Policy(large, processor, Config()).save(folder)


def model_config(folder: str | Path, side: int, *overrides: str) -> Config:
    """config.yaml with the model that save_model has written, and overrides."""
    pixels = side * side
    # Smaller films are enlarged to this size, so that prompts have the length that is asked for.
    model.MIN_PIXELS = pixels
    of_model = [f"model.path={folder}", f"model.max_pixels={pixels}"]
    return load_config(ROOT / "config.yaml", [*of_model, *overrides])


def questions(config: Config, count: int, words: int) -> list[Example]:
    """`count` report examples on different images, each question longer by `words` words."""
    reports = [e for e in data.load_split(config, "train") if e.task == "report"]
    more = ["heart"] * words
    return [dataclasses.replace(e, question=" ".join([e.question, *more])) for e in reports[:count]]
