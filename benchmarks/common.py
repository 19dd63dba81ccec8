"""What the benchmarks share: the clock, peak memory, and a Qwen3-VL somewhat larger than the built-in one."""

import copy
import dataclasses
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import model  # noqa: E402
from runtime.config import Config  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def machine():
    name = (
        torch.cuda.get_device_name() if CUDA else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    return f"{name}, torch {torch.__version__}"


def cpu_name():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(works, cycles):
    """Median seconds of each function; they take turns, after one turn that does not count."""
    times = []
    for _ in range(cycles + 1):
        times.append([])
        for work in works:
            start = now()
            work()
            times[-1].append(now() - start)
    return np.median(times[1:], axis=0)


def resident(key):
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def peak_memory(work):
    """(MiB when work() starts, MiB at its peak): of the process, on CUDA what torch has allocated. Linux only."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        work()
        return before, torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    work()
    return before, resident("VmHWM")


def own_process(file, *arguments):
    """The last line that `python file arguments` prints, as floats."""
    back = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }  # glibc gives freed memory back at once
    done = subprocess.run(
        [sys.executable, file, *map(str, arguments)], capture_output=True, text=True, env=back
    )
    if done.returncode:
        raise SystemExit(f"{file} {arguments}: {done.stderr[-2000:]}")
    return [float(word) for word in done.stdout.split("\n")[-2].split()]


def save_model(folder, vocabulary, side):
    """A random Qwen3-VL as a model folder: hidden 256, 4 layers, 4 heads over 2, head of its own; vision tower 4 x 128, images
    of side x side pixels (side / 28 squared tokens)."""
    small, processor = model.build_tiny(0, {"min_pixels": side * side, "max_pixels": side * side})
    config = copy.deepcopy(small.config)
    config.text_config.update(
        dict(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=False,
        )
    )
    config.text_config.rope_parameters |= {"mrope_section": [12, 10, 10]}
    config.vision_config.update(
        dict(
            depth=4, intermediate_size=512, out_hidden_size=256, deepstack_visual_indexes=[0, 1, 2]
        )
    )
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    large = type(small)(config)
    large.generation_config = small.generation_config
    model.Policy(large, processor, Config()).save(folder)


def questions(config, count, words):
    """`count` report examples on different images, the question made longer by `words` words."""
    examples = [e for e in data.load_split(config, "train") if e.task == "report"][:count]
    return [
        dataclasses.replace(e, question=" ".join([e.question] + ["heart"] * words))
        for e in examples
    ]
