"""The grid of --reproduce: rows in the right order, kept when done, and RESULTS.md with their numbers."""

import fcntl
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

import data
import eval as evaluation
from conftest import ROOT

GRID = ROOT / "configs" / "ablations" / "grid.yaml"


def test_the_shipped_grid_is_complete():
    """Every row of every claim is one of `rows`, and the other way round; rows begin at rows; every setting is one of the configuration."""
    grid = data.read_yaml(GRID)
    assert {name for claim in grid["claims"] for name in claim["rows"]} == set(grid["rows"])
    assert len({evaluation.grid_run(grid, name, 0)[0] for name in grid["rows"]}) == len(
        grid["rows"]
    )
    for name, row in grid["rows"].items():
        folder, start, commands = evaluation.grid_run(grid, name, 0)
        config = data.load_config(ROOT / grid["config"], [a for a in commands[0][2:] if "=" in a])
        assert (
            config.out == str(folder)
            and start in [*grid["rows"], None]
            and ("thinking" in name) <= config.data.thinking
        )
        begins, stage = (
            (config.grpo.init, "")
            if commands[0][0] == "train_grpo.py"
            else (config.sft.init, config.sft.stage)
        )
        checkpoint = {
            "weak SFT": "weak_sft/seed0/sft",
            "SFT": "sft/seed0/more",
            "more SFT": "more_sft/seed0/more",
            "cold start": "cold_start/seed0/cold_start",
            None: "",
        }[start]
        assert begins == (f"runs/ablations/{checkpoint}/best" if start else "auto") and (
            stage == "sft"
        ) == (start is None)
    last = evaluation.grid_run(grid, "more SFT", 2)[2]
    assert [c[0] for c in last] == ["train_sft.py", "eval.py"]
    assert last[1][-3:] == [
        "--checkpoint",
        "runs/ablations/sft/seed2/more",
        "runs/ablations/more_sft/seed2/more",
    ]


@pytest.fixture
def grid(tmp_path):
    grid = {
        "config": "config.yaml",
        "out": str(tmp_path / "runs"),
        "results": str(tmp_path / "RESULTS.md"),
        "start": "SFT",
        "set": ["eval.bootstrap=5"],
        "rows": {"SFT": {"stage": "sft"}, "more": {"stage": "more"}, "GRPO": None},
        "claims": [
            {
                "title": "A",
                "paper": "p",
                "seeds": [0, 1],
                "reading": "r",
                "rows": ["SFT", "more", "GRPO"],
            }
        ],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return tmp_path / "grid.yaml"


def test_rows_run_once_in_order_and_results_hold_their_numbers(grid, tmp_path, monkeypatch):
    calls, rng, fail, steps = [], np.random.default_rng(0), [], {}
    monkeypatch.setattr(evaluation.model, "last_step", lambda run: steps.get(run, 9999))

    def run(command, **_):
        calls.append([command[1].name, *command[2:]])
        out = next(a[4:] for a in command[2:] if a.startswith("out="))
        if fail and fail[0] in out:
            return subprocess.CompletedProcess(command, 1)
        if command[1].name != "train_sft.py":
            models = ["own"] if "/sft/" in out else ["start", "own"]
            values = {
                m: {
                    "value": float(rng.random()),
                    "difference": [float(rng.normal()) * (m == "own"), 0, 0],
                }
                for m in models
            }
            (tmp_path / out / "eval").mkdir(parents=True)
            (tmp_path / out / "eval" / "metrics.json").write_text(
                json.dumps(
                    {
                        "reports": {
                            "ce_f1_macro13": values,
                            "bleu4": {m: {"value": None} for m in models},
                        }
                    }
                )
            )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    steps[tmp_path / "runs" / "more" / "seed1" / "more"] = (
        399  # a signal stopped it: it ends well, but not at its last step
    )
    with pytest.raises(data.InputError, match="'more', seed 1"):
        evaluation.reproduce(grid)
    assert calls[-1][0] == "train_sft.py"  # and is not evaluated
    steps.clear()
    fail.append("more/seed1")
    with pytest.raises(data.InputError, match="'more', seed 1"):
        evaluation.reproduce(grid)
    state = tmp_path / "runs" / "more" / "seed1" / "state.json"
    state.write_text(
        json.dumps({**json.loads(state.read_text()), "cpu_minutes": 3})
    )  # what it has taken counts
    fail.clear()
    calls.clear()
    evaluation.reproduce(grid)  # goes on where it stopped: only the failed row and what follows
    assert [(c[0], next(a for a in c if a.startswith("out="))[-10:]) for c in calls] == [
        ("train_sft.py", "more/seed1"),
        ("eval.py", "more/seed1"),
        ("train_grpo.py", "grpo/seed1"),
    ]
    header, _, *lines = [
        line.strip("| ").split(" | ")
        for line in (tmp_path / "RESULTS.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert header == [
        "seeds",
        "ce_f1_macro13",
        "ce_f1_macro13 - start",
    ]  # bleu4 has no value: no column; nor have those that nobody measured

    def shown(numbers, sign):
        return f"{np.mean(numbers):{sign}.3f} [{min(numbers):{sign}.3f}, {max(numbers):{sign}.3f}]"

    for (title, seeds, value, gain), name in zip(lines, ("sft", "more", "grpo"), strict=True):
        own = [
            json.loads(
                (tmp_path / "runs" / name / f"seed{s}" / "eval" / "metrics.json").read_text()
            )["reports"]["ce_f1_macro13"]["own"]
            for s in (0, 1)
        ]
        assert (
            title.lower() == name and seeds == "2" and value == shown([v["value"] for v in own], "")
        )
        assert gain == ("-" if name == "sft" else shown([v["difference"][0] for v in own], "+"))
    calls.clear()
    evaluation.reproduce(grid)
    assert (
        not calls
        and "6 of 6 runs, 0.1 CPU-hours, the longest 3 CPU-minutes"
        in (tmp_path / "RESULTS.md").read_text()
    )


def test_a_row_that_is_not_there_is_one_line(grid):
    tree = yaml.safe_load(grid.read_text())
    tree["claims"][0]["rows"].append("GRPP")
    grid.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(data.InputError, match="no row 'GRPP'; the rows are SFT, more, GRPO"):
        evaluation.reproduce(grid)


def test_two_terminals_share_a_grid(grid, tmp_path, monkeypatch):
    """A row that another process is at is left to it, and so is what begins there, until it is done."""
    first, order = evaluation.grid_run(data.read_yaml(grid), "more", 0)[0], []
    first.mkdir(parents=True)
    other = open(first / "lock", "w")
    fcntl.flock(other, fcntl.LOCK_EX)

    def run(folder, commands, where):
        order.append("/".join(folder.parts[-2:]))
        (folder / "eval").mkdir()
        (folder / "eval" / "metrics.json").write_text("{}")
        (folder / "state.json").write_text('{"done": true, "cpu_minutes": 1}')

    def wait(seconds):  # everything else is done: the other one ends, too
        assert len(order) == 5 and "more/seed0" not in order
        (first / "eval").mkdir()
        (first / "eval" / "metrics.json").write_text("{}")
        (first / "state.json").write_text('{"done": true, "cpu_minutes": 2}')
        other.close()

    monkeypatch.setattr(evaluation, "run_commands", run)
    monkeypatch.setattr(evaluation.time, "sleep", wait)
    evaluation.reproduce(grid)
    assert (
        order == ["sft/seed0", "grpo/seed0", "sft/seed1", "more/seed1", "grpo/seed1"]
        and "6 of 6 runs, 0.1 CPU-hours" in (tmp_path / "RESULTS.md").read_text()
    )


def test_a_grid_runs_for_real(grid, tmp_path):
    """Two steps of everything, by the real scripts."""
    tree = yaml.safe_load(grid.read_text())
    tree["set"] = [
        "data.train_size=24",
        "data.val_size=4",
        "data.test_size=6",
        "model.max_pixels=9216",
        "sft.steps=2",
        "sft.more_steps=1",
        "sft.batch_size=4",
        "grpo.steps=1",
        "grpo.prompts=4",
        "grpo.group_size=2",
        "grpo.max_new_tokens=8",
        "eval.bootstrap=5",
        "eval.cases=2",
    ]
    tree["claims"][0] |= {"seeds": [3], "rows": ["GRPO"]}  # SFT comes with it
    grid.write_text(yaml.safe_dump(tree, sort_keys=False))
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), "--reproduce", str(grid)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "RESULTS.md").read_text()
    assert "1 of 1 runs" in text and "| GRPO | 1 | 0." in text
    assert (tmp_path / "runs" / "grpo" / "seed3" / "eval" / "report.html").exists()
    assert evaluation.row_state(tmp_path / "runs" / "grpo" / "seed3")["cpu_minutes"] > 0.01
