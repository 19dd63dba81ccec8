"""The papers' claims in miniature: train and evaluate a grid of runs, and write RESULTS.md.

  python -m tools.reproduce configs/ablations/grid.yaml

Every run leaves a record, results/ROW-SEED.json: what was measured, on each study too, with which
commands, by the code of which commit. RESULTS.md is made from the records after each run, and its
verdicts are computed (see `judge`). What has a record is not run again, here or on another machine,
as long as its commands, those of what it starts from, and tests/trajectories.json stay as they are.
What was interrupted goes on from its last checkpoint. The same command in a second terminal takes
rows that the first is not at. The grid file explains its format.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval import soft_f1_of
from rewards import extract_labels, mccs
from runtime.checkpoint import last_step
from runtime.config import InputError, load_config, read_yaml
from runtime.output import write_atomically
from runtime.processes import argument_parser, run_main

ROOT = Path(__file__).parents[1]
GRID_KEYS = ("config", "out", "records", "results", "start", "set", "rows", "claims")
CLAIM_KEYS = ("title", "paper", "seeds", "rows", "metrics", "checks")
PARTS = 10  # of a run, in the table of what its training went through
# Student's t of a 95 % interval, for 1, 2, .. degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# ------------------------------------------------------------------------------- the grid


@dataclass
class Run:
    """A row of the grid with one seed."""

    row: str
    seed: int
    stage: str  # "sft" | "more" | "cold_start" | "grpo"
    folder: Path
    record: Path
    start: str | None  # the row whose checkpoint it starts from
    commands: list[list[str]]
    history: list[list[str]]  # from random weights on, its own last


def find_row(grid, name):
    """A row with its defaults."""
    if name not in grid["rows"]:
        raise InputError(f"grid: no row {name!r}; the rows are {', '.join(grid['rows'])}")
    return {"stage": "grpo", "start": grid["start"], "set": [], **(grid["rows"][name] or {})}


def file_name(row):
    return re.sub(r"\W+", "_", row).strip("_").lower()


def grid_run(grid, name, seed):
    """The commands of a row. All but plain SFT are evaluated beside the row they start from."""
    row = find_row(grid, name)
    stage, start = row["stage"], row["start"]
    folder = Path(grid["out"], file_name(name), f"seed{seed}")
    record = Path(grid["records"], f"{file_name(name)}-{seed}.json")
    settings = [grid["config"], f"seed={seed}", *grid["set"], *row["set"], f"out={folder}"]
    train = ["train_sft.py", *settings]
    evaluate = ["eval.py", *settings, "--checkpoint", str(folder / stage)]
    if stage == "sft":
        commands = [train, evaluate]
        return Run(name, seed, stage, folder, record, None, commands, commands)

    earlier = grid_run(grid, start, seed)
    before = earlier.folder / earlier.stage
    if stage == "grpo":
        # It ends with an evaluation.
        commands = [["train_grpo.py", *settings, f"grpo.init={before}/best"]]
    else:
        train += [f"sft.stage={stage}", f"sft.init={before}/best"]
        evaluate.insert(-1, str(before))
        commands = [train, evaluate]
    history = earlier.history + commands
    return Run(name, seed, stage, folder, record, start, commands, history)


def check_keys(where, tree, keys):
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            raise InputError(f"{where}: no key {key!r}; a grid is like configs/ablations/grid.yaml")


def read_grid(path):
    grid = read_yaml(path)
    check_keys(path, grid, GRID_KEYS)
    for n, claim in enumerate(grid["claims"]):
        where = f"{path}, claims[{n}]"
        check_keys(where, claim, CLAIM_KEYS)
        if len(claim["seeds"]) > len(T_95) + 1:
            raise InputError(f"{where}: expected at most {len(T_95) + 1} seeds")
        for m, check in enumerate(claim["checks"]):
            check_keys(f"{where}, checks[{m}]", check, ("metric", "row", "against"))
            if ("above" in check) == ("below" in check):
                raise InputError(f"{where}, checks[{m}]: expected either above or below")
            for name in (check["row"], check["against"]):
                if name not in claim["rows"]:
                    raise InputError(f"{where}, checks[{m}]: {name!r} is none of its rows")
    return grid


def all_runs(grid):
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


def runs_left(runs):
    """Those without a record, and starts whose checkpoint they need."""
    left = {}
    for run in runs.values():
        if read_record(run):
            continue
        left[run.row, run.seed] = run
        while run.start:
            run = runs[run.start, run.seed]
            if read_state(run)["done"] and Path(run.folder, run.stage, "best").exists():
                break
            left[run.row, run.seed] = run
    return left


# ------------------------------------------------------------------------------- running it


def reproduce(path: str):
    """Run the grid of a file."""
    grid = read_grid(path)
    runs = all_runs(grid)
    left = runs_left(runs)
    bar = tqdm(desc="grid", total=len(runs), initial=len(runs) - len(left))
    write_atomically(Path(grid["results"]), grid_text(grid, path))
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
            # The lock ends with the last of the processes that have it, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not (read_state(run)["done"] and Path(run.folder, run.stage, "last").exists()):
            run_commands(run, where, lock)
        write_record(run)
    return True


def read_state(run):
    """Is a run done, and how many CPU minutes has it taken so far? One of another history or other
    code has not begun."""
    state = {"history": run.history, "trajectories": trajectories()}
    path = run.folder / "state.json"
    if path.exists():
        found = json.loads(path.read_text())
        if state.items() <= found.items():
            return found
    return state | {"done": False, "cpu_minutes": 0.0, "commit": ""}


def clear_folder(run):
    """Delete what runs of another history or other code have left: nothing of it may go on."""
    for part in (run.stage, "eval"):
        shutil.rmtree(run.folder / part, ignore_errors=True)


def write_state(run, state):
    write_atomically(run.folder / "state.json", json.dumps(state))


def child_minutes():
    """CPU minutes of the commands that have ended."""
    times = os.times()
    return (times.children_user + times.children_system) / 60


def run_commands(run, where, lock):
    """Run the commands of a row and keep its state.json. InputError if one stops before its end."""
    state = read_state(run)
    if not state["commit"]:
        # It has not begun.
        clear_folder(run)
    if state["done"]:
        # Its checkpoint is gone.
        state |= {"done": False, "cpu_minutes": 0.0}
    state["commit"] = commit()
    write_state(run, state)
    _, config_path, *overrides = run.commands[0]
    config = load_config(config_path, overrides)
    steps = {"grpo": config.grpo.steps, "more": config.sft.more_steps}
    n_steps = steps.get(run.stage, config.sft.steps)
    metrics = run.folder / "eval" / "metrics.json"
    metrics.unlink(missing_ok=True)
    for script, *args in run.commands:
        text = " ".join(["python", script, *args])
        tqdm.write(text)
        command = [sys.executable, ROOT / script, *args]
        before = child_minutes()
        try:
            # It keeps the lock, too, should this process end before it.
            done = subprocess.run(command, stdout=subprocess.DEVNULL, pass_fds=[lock.fileno()])
            code = done.returncode
        finally:
            # What it took counts, however it and this process end.
            state["cpu_minutes"] += child_minutes() - before
            write_state(run, state)
        # A signal stops a script without an error code.
        if code or last_step(run.folder / run.stage) < n_steps:
            break
    state["done"] = not code and metrics.exists()
    write_state(run, state)
    if not state["done"]:
        raise InputError(
            f"{where}: `{text}` did not end; started again, the grid goes on from there"
        )


def commit():
    """The commit of this code, or "unknown" in a copy without git."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or "unknown"


# ------------------------------------------------------------------------------- records


def trajectories():
    """What all numbers hang on: it changes when training or decoding does."""
    return hashlib.sha256((ROOT / "tests" / "trajectories.json").read_bytes()).hexdigest()[:16]


def rounded(value):
    return None if value is None else round(float(value), 4)


def write_record(run):
    """What a run has measured: its start first, where it has one, then itself."""
    blocks = json.loads((run.folder / "eval" / "metrics.json").read_text())
    metrics, models = {}, []
    for block, prefix in {"reports": "", "grounding": "", "labels": "F1 of "}.items():
        for metric, by_model in blocks.get(block, {}).items():
            models = list(by_model)
            values = [rounded(by_model[model]["value"]) for model in models]
            metrics[prefix + metric] = values
    state = read_state(run)
    record = {
        "row": run.row,
        "seed": run.seed,
        "history": state["history"],
        "trajectories": state["trajectories"],
        "commit": state["commit"],
        "cpu_minutes": round(state["cpu_minutes"], 2),
        "metrics": metrics,
        "training": training_course(run),
        "eval_loss": validation_losses(run),
        "studies": [study_scores(run.folder / "eval" / f"{model}.jsonl") for model in models],
    }
    write_atomically(run.record, json.dumps(record, separators=(",", ":")) + "\n")


def read_record(run):
    """None if there is none, or one of another history or other code."""
    if not run.record.exists():
        return None
    try:
        record = json.loads(run.record.read_text())
    except ValueError:
        raise InputError(f"{run.record}: no valid JSON; delete it, and it is run again") from None
    current = (run.history, trajectories())
    return record if (record.get("history"), record["trajectories"]) == current else None


def read_steps(run):
    """What was logged of each step of its training."""
    lines = (run.folder / run.stage / "metrics.jsonl").read_text().splitlines()
    return list(map(json.loads, lines))


def validation_losses(run):
    """{step: loss}: SFT keeps the checkpoint of the lowest one."""
    steps = read_steps(run)
    return {s["step"]: rounded(s["eval_loss"]) for s in steps if "eval_loss" in s}


def training_course(run):
    """{metric: its means in each tenth of the steps}, of what every step has."""
    steps = read_steps(run)
    course = {}
    # Sorted, so that a record does not differ from run to run.
    for metric in sorted(set.intersection(*map(set, steps))):
        parts = np.array_split([step[metric] for step in steps], PARTS)
        course[metric] = [rounded(part.mean()) for part in parts if len(part)]
    return course


def study_scores(path):
    """MCCS of each report and soft-F1 of each answer with boxes, in the order of a file."""
    scores = []
    for prediction in map(json.loads, path.read_text().splitlines()):
        if prediction["task"] == "grounding":
            scores.append(rounded(soft_f1_of(prediction)))
            continue
        answer, reference = prediction["answer"], prediction["reference"]
        (score,) = mccs(extract_labels([answer]), extract_labels([reference]))
        scores.append(rounded(score))
    return scores


# ------------------------------------------------------------------------------- verdicts


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % t-interval over the seeds: infinite for a single one."""
    mean, half = np.mean(values), math.inf
    if len(values) > 1:
        half = T_95[len(values) - 2] * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(mean), float(mean - half), float(mean + half)


def judge(differences: Sequence[float], bound: float, above: bool) -> tuple[str, int]:
    """Does "the difference lies above (or below) the bound" hold? And for how many seeds?

    "holds" if the 95 % t-interval of the mean lies on the claimed side of the bound, "reversed" if
    it lies on the other one, else "not shown". differences: one for each seed, of two rows that
    were measured on the same studies.
    """
    sign = 1 if above else -1
    gaps = [sign * (difference - bound) for difference in differences]
    _, low, high = interval(gaps)
    verdict = "not shown"
    if low > 0:
        verdict = "holds"
    elif high < 0:
        verdict = "reversed"
    return verdict, sum(gap > 0 for gap in gaps)


# ------------------------------------------------------------------------------- RESULTS.md

VERDICT_HEAD = ("row", "against", "claim", "difference, 95 % t-interval", "seeds for it", "verdict")


def grid_text(grid, path):
    """RESULTS.md: the first check of each claim; then for each claim its verdicts, a table of its
    rows, and what they went through."""
    runs = all_runs(grid)
    records = {key: record for key, run in runs.items() if (record := read_record(run))}
    minutes = [record["cpu_minutes"] for record in records.values()]
    commits = sorted({record["commit"] for record in records.values()})
    head = [
        "# The papers' claims in miniature",
        f"`python -m tools.reproduce {path}`: phantoms and the built-in 2.4 M-parameter model. "
        f"{len(records)} of {len(runs)} runs, {sum(minutes) / 60:.1f} CPU-hours, the longest "
        f"{max(minutes, default=0):.0f} CPU-minutes. Code: {', '.join(commits) or '-'}.",
        grid.get("setting", "").strip(),
    ]
    summary, parts = [("", *VERDICT_HEAD)], []
    for claim in grid["claims"]:
        found = {}
        for name in claim["rows"]:
            found[name] = [records[name, s] for s in claim["seeds"] if (name, s) in records]
        verdicts = [verdict_cells(check, found, claim["seeds"]) for check in claim["checks"]]
        summary += [[claim["title"], *cells] for cells in verdicts[:1]]
        parts += [f"## {claim['title']}", f"**The paper.** {claim['paper'].strip()}"]
        parts += [markdown([VERDICT_HEAD, *verdicts]) if verdicts else ""]
        parts += [value_table(claim, found, runs, records)]
        parts += [course_table(claim["course"], found)] if "course" in claim else []
        parts += [f"**Here.** {claim['reading'].strip()}"] if "reading" in claim else []
    parts = [*head, markdown(summary), *parts]
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown(rows):
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict_cells(check, found, seeds):
    metric, row, other = check["metric"], check["row"], check["against"]
    side = "above" if "above" in check else "below"
    bound = check[side]
    claimed = (row, other, f"{metric} {side} {bound:g}")
    own, others = values_by_seed(found[row], metric), values_by_seed(found[other], metric)
    differences = [own[seed] - others[seed] for seed in own.keys() & others.keys()]
    if not differences:
        return (*claimed, "-", "-", "no runs yet")
    verdict, n = judge(differences, bound, side == "above")
    if len(differences) < len(seeds):
        verdict = "unfinished"
    counted = f"{n} of {len(differences)}"
    return (*claimed, interval_cell(differences), counted, f"**{verdict}**")


def interval_cell(differences):
    mean, low, high = interval(differences)
    bounds = f" [{low:+.3f}, {high:+.3f}]" if len(differences) > 1 else ""
    return f"{mean:+.3f}{bounds}"


def values_by_seed(records, metric):
    """{seed: value} of a row, where it was measured."""
    values = {}
    for record in records:
        # Of its start, if it has one, and of the row. A cold start's start is measured in a format
        # that it has not learnt, so only the last is used.
        *_, value = record["metrics"].get(metric, [None])
        if value is not None:
            values[record["seed"]] = value
    return values


def value_table(claim, found, runs, records):
    """Means over the seeds, and in brackets the mean difference to the row it starts from."""
    rows = [["", "starts from", "seeds", "CPU min", *claim["metrics"]]]
    for name, own in found.items():
        if not own:
            continue
        start = runs[name, claim["seeds"][0]].start
        starts = [records[start, s] for s in claim["seeds"] if (start, s) in records]
        minutes = np.mean([record["cpu_minutes"] for record in own])
        cells = [value_cell(own, starts, metric) for metric in claim["metrics"]]
        rows.append([name, start or "random weights", str(len(own)), f"{minutes:.1f}", *cells])
    return markdown(rows) if len(rows) > 1 else ""


def value_cell(records, starts, metric):
    own, before = values_by_seed(records, metric), values_by_seed(starts, metric)
    if not own:
        return "-"
    text = f"{np.mean([*own.values()]):.3f}"
    gains = [own[seed] - before[seed] for seed in own.keys() & before.keys()]
    return text + (f" ({np.mean(gains):+.3f})" if gains else "")


def course_table(course, found):
    """How a row's training went, in tenths of it: means over the seeds."""
    courses = [record["training"] for record in found[course["row"]]]
    rows = [[f"{course['row']}, tenths", *map(str, range(1, PARTS + 1))]]
    for metric in course["metrics"]:
        values = [training[metric] for training in courses if metric in training]
        if values:
            rows.append([metric, *(f"{value:.3f}" for value in np.mean(values, 0))])
    return markdown(rows) if courses else ""


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("grid")
    reproduce(parser.parse_args().grid)


if __name__ == "__main__":
    run_main(main)
