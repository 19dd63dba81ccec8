"""The papers' claims in miniature: train and evaluate a grid of runs, and write RESULTS.md.

  python -m tools.reproduce configs/ablations/grid.yaml

RESULTS.md is written after each row and seed. What is done is kept, what was interrupted continues
from its last checkpoint. The same command in a second terminal takes rows that the first is not at.
The grid file explains its format.
"""

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.checkpoint import last_step
from runtime.config import InputError, load_config, read_yaml
from runtime.output import write_atomically
from runtime.processes import run_main

ROOT = Path(__file__).parents[1]
METRICS = "eval/metrics.json"  # in the folder of a run
# The metrics that are shown, with their blocks; those whose difference to the start is shown, too.
SHOWN = {
    "ce_f1_macro13": "reports",
    "ce_f1_macro5": "reports",
    "ce_f1_micro13": "reports",
    "ce_recall_micro13": "reports",
    "bleu4": "reports",
    "mean_words": "reports",
    "soft_f1": "grounding",
    "map50": "grounding",
}
GAINS = ("ce_f1_macro13", "ce_recall_micro13", "soft_f1", "map50")

# ------------------------------------------------------------------------------- the grid


@dataclass
class Run:
    """A row of the grid with one seed."""

    stage: str  # "sft" | "more" | "cold_start" | "grpo"
    folder: Path
    start: str | None  # the row whose checkpoint it starts from
    commands: list[list[str]]


def find_row(grid, name):
    """A row with its defaults."""
    if name not in grid["rows"]:
        raise InputError(f"grid: no row {name!r}; the rows are {', '.join(grid['rows'])}")
    return {"stage": "grpo", "start": grid["start"], "set": [], **(grid["rows"][name] or {})}


def folder_of(grid, name, seed):
    return Path(grid["out"], re.sub(r"\W+", "_", name).strip("_").lower(), f"seed{seed}")


def grid_run(grid, name, seed):
    """The commands of a row. All but plain SFT are evaluated beside the row they start from."""
    row = find_row(grid, name)
    stage, start = row["stage"], row["start"]
    folder = folder_of(grid, name, seed)
    settings = [grid["config"], f"seed={seed}", *grid["set"], *row["set"], f"out={folder}"]
    train = ["train_sft.py", *settings]
    evaluate = ["eval.py", *settings, "--checkpoint", str(folder / stage)]
    if stage == "sft":
        return Run(stage, folder, None, [train, evaluate])

    before = str(folder_of(grid, start, seed) / find_row(grid, start)["stage"])
    if stage == "grpo":
        # It ends with an evaluation.
        train = ["train_grpo.py", *settings, f"grpo.init={before}/best"]
        return Run(stage, folder, start, [train])
    train += [f"sft.stage={stage}", f"sft.init={before}/best"]
    evaluate.insert(-1, before)
    return Run(stage, folder, start, [train, evaluate])


def check_keys(where, tree, keys):
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            raise InputError(f"{where}: no key {key!r}; a grid is like configs/ablations/grid.yaml")


def needed_runs(grid):
    """{(row, seed): run} of all claims, with the rows that they start from."""
    runs = {}
    for claim in grid["claims"]:
        for seed in claim["seeds"]:
            for name in claim["rows"]:
                while name and (name, seed) not in runs:
                    run = grid_run(grid, name, seed)
                    runs[name, seed] = run
                    name = run.start
    return runs


# ------------------------------------------------------------------------------- running it


def reproduce(path: str) -> None:
    """Run the grid of a file."""
    grid = read_yaml(path)
    check_keys(path, grid, ("config", "out", "results", "start", "set", "rows", "claims"))
    for n, claim in enumerate(grid["claims"]):
        check_keys(f"{path}, claims[{n}]", claim, ("title", "paper", "rows", "seeds"))

    left = needed_runs(grid)
    bar = tqdm(total=len(left), desc="grid")
    while left:
        done = run_next(left, path)
        if done is None:
            # All that can be run is being run by others.
            time.sleep(5)
            continue
        del left[done]
        write_atomically(Path(grid["results"]), grid_text(grid, path))
        bar.update()


def run_next(left, path):
    """Run one of those that are left. Its key, or None if none can be run now."""
    for (name, seed), run in left.items():
        waits = (run.start, seed) in left
        if not waits and run_unless_locked(run, f"{path}: {name!r}, seed {seed}"):
            return name, seed
    return None


def run_unless_locked(run, where):
    """False if another process is at it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "lock", "w") as lock:
        try:
            # The lock ends with this process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not read_state(run.folder)["done"]:
            run_commands(run, where)
    return True


def read_state(folder):
    """Is a run done, and how many CPU minutes has it taken so far?"""
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"done": False, "cpu_minutes": 0.0}


def child_minutes():
    """CPU minutes of the commands that have ended."""
    times = os.times()
    return (times.children_user + times.children_system) / 60


def run_commands(run, where):
    """Run the commands of a row and keep its state.json. InputError if one stops before its end."""
    state, before = read_state(run.folder), child_minutes()
    _, config_path, *overrides = run.commands[0]
    config = load_config(config_path, overrides)
    steps = {"grpo": config.grpo.steps, "more": config.sft.more_steps}
    n_steps = steps.get(run.stage, config.sft.steps)
    metrics = run.folder / METRICS
    metrics.unlink(missing_ok=True)
    try:
        for script, *args in run.commands:
            text = " ".join(["python", script, *args])
            tqdm.write(text)
            command = [sys.executable, ROOT / script, *args]
            code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
            # A signal stops a script without an error code.
            if code or last_step(run.folder / run.stage) < n_steps:
                break
        state["done"] = not code and metrics.exists()
    finally:
        state["cpu_minutes"] += child_minutes() - before
        write_atomically(run.folder / "state.json", json.dumps(state))
    if not state["done"]:
        raise InputError(
            f"{where}: `{text}` did not end; started again, the grid goes on from there"
        )


# ------------------------------------------------------------------------------- RESULTS.md


def grid_text(grid, path):
    """RESULTS.md: a table for each claim."""
    states = [read_state(run.folder) for run in needed_runs(grid).values()]
    minutes = [state["cpu_minutes"] for state in states if state["done"]]
    parts = [
        "# The papers' claims in miniature",
        f"`python -m tools.reproduce {path}`: phantoms and the built-in 2.4 M-parameter model. "
        f"Mean [lowest, highest] over the seeds that are done. {len(minutes)} of {len(states)} "
        f"runs, {sum(minutes) / 60:.1f} CPU-hours, the longest {max(minutes, default=0):.0f} "
        f"CPU-minutes.",
        grid.get("setting", "").strip(),
    ]
    for claim in grid["claims"]:
        parts += [f"## {claim['title']}", claim["paper"].strip(), claim_table(grid, claim)]
        parts.append(claim.get("reading", "").strip())
    return "\n\n".join(filter(None, parts)) + "\n"


def claim_table(grid, claim):
    head = ["", "seeds", *SHOWN, *(f"{metric} - start" for metric in GAINS)]
    rows = [table_row(grid, name, claim["seeds"]) for name in claim["rows"]]

    # A column compares rows, so one with a single value says nothing.
    most = max(len(rows) - 2, 0)
    kept = [column for column in zip(head, *rows) if column.count("-") <= most]
    head, *rows = zip(*kept)
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows])


def table_row(grid, name, seeds):
    results = []
    for seed in seeds:
        folder = folder_of(grid, name, seed)
        if read_state(folder)["done"]:
            results.append(json.loads((folder / METRICS).read_text()))

    values, gains = [], []
    for metric, block in SHOWN.items():
        # The last model is the row's own. Its start stands before it.
        measured = [blocks.get(block, {}).get(metric, {}) for blocks in results]
        models = [list(by_model.values()) for by_model in measured if by_model]
        values.append(spread([own["value"] for *_, own in models]))
        if metric in GAINS:
            changes = [own["difference"][0] for *start, own in models if start]
            gains.append(spread(changes, "+"))
    return [name, str(len(results)), *values, *gains]


def spread(values, sign=""):
    """Mean, lowest and highest over the seeds."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{np.mean(values):{sign}.3f} [{min(values):{sign}.3f}, {max(values):{sign}.3f}]"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid")
    reproduce(parser.parse_args().grid)


if __name__ == "__main__":
    run_main(main)
