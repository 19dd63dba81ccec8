"""tools/reproduce.py: rows in the right order, kept when done, RESULTS.md with their numbers."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT, SHORT, load

from runtime.config import InputError, read_yaml
from tools import reproduce

GRID = ROOT / "configs" / "ablations" / "grid.yaml"

# ------------------------------------------------------------------------------- the shipped grid


def test_every_row_is_in_a_claim_and_every_claim_has_its_rows():
    grid = read_yaml(GRID)
    named = {name for claim in grid["claims"] for name in claim["rows"]}
    assert named == set(grid["rows"])
    folders = {reproduce.grid_run(grid, name, 0).folder for name in grid["rows"]}
    assert len(folders) == len(grid["rows"])


@pytest.mark.parametrize("name", read_yaml(GRID)["rows"])
def test_a_row_begins_at_its_start_with_settings_of_the_configuration(name):
    grid = read_yaml(GRID)
    run = reproduce.grid_run(grid, name, 0)
    script, path, *settings = run.commands[0]
    config = load(*settings, config=path)
    assert config.out == str(run.folder)
    assert config.data.thinking or "thinking" not in name
    begins = config.grpo.init if script == "train_grpo.py" else config.sft.init
    checkpoints = {
        "weak SFT": "runs/ablations/weak_sft/seed0/sft/best",
        "SFT": "runs/ablations/sft/seed0/more/best",
        "more SFT": "runs/ablations/more_sft/seed0/more/best",
        "cold start": "runs/ablations/cold_start/seed0/cold_start/best",
        None: "auto",
    }
    assert begins == checkpoints[run.start]
    plain = script == "train_sft.py" and config.sft.stage == "sft"
    assert plain == (run.start is None)


def test_continued_sft_is_evaluated_beside_its_start():
    train, evaluate = reproduce.grid_run(read_yaml(GRID), "more SFT", 2).commands
    assert train[0] == "train_sft.py"
    assert evaluate[0] == "eval.py"
    folders = ["runs/ablations/sft/seed2/more", "runs/ablations/more_sft/seed2/more"]
    assert evaluate[-3:] == ["--checkpoint", *folders]


# ------------------------------------------------------------------------------- a small grid


@pytest.fixture
def grid(tmp_path):
    claim = {"title": "A", "paper": "p", "seeds": [0, 1], "reading": "r"}
    grid = {
        "config": "config.yaml",
        "out": str(tmp_path / "runs"),
        "results": str(tmp_path / "RESULTS.md"),
        "start": "SFT",
        "set": ["eval.limit=5"],
        "rows": {"SFT": {"stage": "sft"}, "more": {"stage": "more"}, "GRPO": None},
        "claims": [claim | {"rows": ["SFT", "more", "GRPO"]}],
    }
    write_grid(tmp_path / "grid.yaml", grid)
    return tmp_path / "grid.yaml"


def write_grid(path, grid):
    path.write_text(yaml.safe_dump(grid, sort_keys=False))


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class Scripts:
    """Stands in for the scripts: writes down what is started, and random metrics."""

    def __init__(self):
        self.calls = []
        self.failing = ""
        self.stopped = None
        self.rng = np.random.default_rng(0)

    def run(self, command, **_):
        script = command[1].name
        (out,) = (word[4:] for word in command[2:] if word.startswith("out="))
        self.calls.append((script, out[-10:]))
        failed = bool(self.failing) and self.failing in out
        if not failed and script != "train_sft.py":
            self.write_metrics(Path(out))
        return subprocess.CompletedProcess(command, int(failed))

    def write_metrics(self, out):
        models = ["own"] if "/sft/" in str(out) else ["start", "own"]
        values, empty = {}, {}
        for name in models:
            change = float(self.rng.normal()) if name == "own" else 0.0
            values[name] = {"value": float(self.rng.random()), "difference": [change, 0, 0]}
            empty[name] = {"value": None}
        metrics = {"reports": {"ce_f1_macro13": values, "bleu4": empty}}
        write_json(out / "eval" / "metrics.json", metrics)

    def last_step(self, run):
        """As if all scripts got to their last step but one."""
        return 399 if run == self.stopped else 9999


@pytest.fixture
def scripts(monkeypatch):
    scripts = Scripts()
    monkeypatch.setattr(subprocess, "run", scripts.run)
    monkeypatch.setattr(reproduce, "last_step", scripts.last_step)
    return scripts


def table_lines(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines]


def shown(numbers, sign):
    return f"{np.mean(numbers):{sign}.3f} [{min(numbers):{sign}.3f}, {max(numbers):{sign}.3f}]"


def test_a_row_that_a_signal_stopped_is_not_evaluated(grid, tmp_path, scripts):
    # It ends well, but not at its last step.
    scripts.stopped = tmp_path / "runs" / "more" / "seed1" / "more"
    with pytest.raises(InputError, match="'more', seed 1"):
        reproduce.reproduce(grid)
    assert scripts.calls[-1][0] == "train_sft.py"


def test_a_failed_row_is_run_again_and_no_other(grid, tmp_path, scripts):
    scripts.failing = "more/seed1"
    with pytest.raises(InputError, match="'more', seed 1"):
        reproduce.reproduce(grid)
    # What it has taken so far counts.
    path = tmp_path / "runs" / "more" / "seed1" / "state.json"
    write_json(path, json.loads(path.read_text()) | {"cpu_minutes": 3})

    scripts.failing = ""
    scripts.calls.clear()
    reproduce.reproduce(grid)
    assert scripts.calls == [
        ("train_sft.py", "more/seed1"),
        ("eval.py", "more/seed1"),
        ("train_grpo.py", "grpo/seed1"),
    ]

    scripts.calls.clear()
    reproduce.reproduce(grid)
    assert not scripts.calls
    expected = "6 of 6 runs, 0.1 CPU-hours, the longest 3 CPU-minutes"
    assert expected in (tmp_path / "RESULTS.md").read_text()


def test_results_hold_the_numbers_of_the_rows(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"`python -m tools.reproduce {grid}`" in text
    header, _, *lines = table_lines(text)
    # bleu4 has no value, so it has no column. Nor have those that nobody measured.
    assert header == ["seeds", "ce_f1_macro13", "ce_f1_macro13 - start"]
    for (title, seeds, value, gain), name in zip(lines, ("SFT", "more", "GRPO"), strict=True):
        values, changes = [], []
        for seed in ("seed0", "seed1"):
            path = tmp_path / "runs" / name.lower() / seed / "eval" / "metrics.json"
            own = json.loads(path.read_text())["reports"]["ce_f1_macro13"]["own"]
            values.append(own["value"])
            changes.append(own["difference"][0])
        assert (title, seeds) == (name, "2")
        assert value == shown(values, "")
        assert gain == ("-" if name == "SFT" else shown(changes, "+"))


def test_a_row_that_is_not_there_is_one_line(grid):
    tree = read_yaml(grid)
    tree["claims"][0]["rows"].append("GRPP")
    write_grid(grid, tree)
    with pytest.raises(InputError, match="no row 'GRPP'; the rows are SFT, more, GRPO"):
        reproduce.reproduce(grid)


def test_two_terminals_share_a_grid(grid, tmp_path, monkeypatch):
    """A row that another process is at is left to it, and so is what begins there."""
    first = reproduce.grid_run(read_yaml(grid), "more", 0).folder
    first.mkdir(parents=True)
    other = open(first / "lock", "w")  # noqa: SIM115, it is closed in wait()
    fcntl.flock(other, fcntl.LOCK_EX)
    order = []

    def finish(folder, minutes):
        write_json(folder / "eval" / "metrics.json", {})
        write_json(folder / "state.json", {"done": True, "cpu_minutes": minutes})

    def run(run, where):
        order.append("/".join(run.folder.parts[-2:]))
        finish(run.folder, 1)

    def wait(seconds):
        # Everything else is done. Now the other process ends, too.
        assert len(order) == 5
        finish(first, 2)
        other.close()

    monkeypatch.setattr(reproduce, "run_commands", run)
    monkeypatch.setattr(reproduce.time, "sleep", wait)
    reproduce.reproduce(grid)
    assert order == ["sft/seed0", "grpo/seed0", "sft/seed1", "more/seed1", "grpo/seed1"]
    assert "6 of 6 runs, 0.1 CPU-hours" in (tmp_path / "RESULTS.md").read_text()


def test_a_grid_runs_for_real(grid, tmp_path):
    """Two steps of everything, by the real scripts."""
    tree = read_yaml(grid)
    tree["set"] = [*SHORT, "sft.steps=2", "sft.more_steps=1", "grpo.steps=1"]
    # SFT comes with it.
    tree["claims"][0] |= {"seeds": [3], "rows": ["GRPO"]}
    write_grid(grid, tree)
    command = [sys.executable, "-m", "tools.reproduce", str(grid)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "RESULTS.md").read_text()
    assert "2 of 2 runs" in text
    assert "| GRPO | 1 | 0." in text
    folder = tmp_path / "runs" / "grpo" / "seed3"
    assert (folder / "eval" / "report.html").exists()
    assert reproduce.read_state(folder)["cpu_minutes"] > 0.01


@pytest.mark.parametrize("text", ["grpo: {}", "claims: [{a: 1}]"])
def test_a_file_that_is_no_grid_is_named(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"grid\.yaml: no key 'config'"):
        reproduce.reproduce(str(path))


def test_a_claim_without_seeds_is_named(tmp_path):
    path = tmp_path / "grid.yaml"
    grid = yaml.safe_load((ROOT / "configs" / "ablations" / "grid.yaml").read_text())
    del grid["claims"][1]["seeds"]
    path.write_text(yaml.safe_dump(grid))
    with pytest.raises(InputError, match=r"claims\[1\]: no key 'seeds'"):
        reproduce.reproduce(str(path))
