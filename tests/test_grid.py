"""The grid of --reproduce: rows in the right order, kept when done, and RESULTS.md with their numbers."""
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
    """Every row begins at a row that exists and comes before it; every setting is one of the configuration."""
    grid, made = data.read_yaml(GRID), set()
    for claim in grid["claims"]:
        for name, row in claim["rows"].items():
            folder, result, commands = evaluation.grid_run(grid, name, 0)
            config = data.load_config(ROOT / grid["config"], [a for a in commands[0][2:] if "=" in a])
            start = (row or {}).get("start", "SFT")
            if (row or {}).get("stage") != "sft":
                assert start in made, (name, start)
                assert str(evaluation.grid_run(grid, start, 0)[1]) in (str(config.grpo.init)[:-5], str(config.sft.init)[:-5])
            made.add(name)
    assert len({evaluation.grid_run(grid, name, 0)[0] for name in made}) == len(made)
    assert evaluation.grid_run(grid, "SFT", 1)[2][0] == ["train_sft.py", "config.yaml", "seed=1", *grid["set"], "out=runs/ablations/sft/seed1", "sft.stage=sft"]


@pytest.fixture
def grid(tmp_path):
    grid = {"config": "config.yaml", "out": str(tmp_path / "runs"), "results": str(tmp_path / "RESULTS.md"), "set": ["eval.bootstrap=5"], "claims": [
        {"title": "A", "paper": "p", "seeds": [0, 1], "reading": "r", "rows": {"SFT": {"stage": "sft"}, "more": {"stage": "more"}, "GRPO": None}}]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return tmp_path / "grid.yaml"


def test_rows_run_once_in_order_and_results_hold_their_numbers(grid, tmp_path, monkeypatch):
    calls, rng, fail = [], np.random.default_rng(0), []

    def run(command, **_):
        calls.append([command[1].name, *command[2:]])
        out = next(a[4:] for a in command[2:] if a.startswith("out="))
        if fail and fail[0] in out:
            return subprocess.CompletedProcess(command, 1)
        if command[1].name != "train_sft.py":
            models = ["sft", "grpo"] if command[1].name == "train_grpo.py" else ["x"]
            values = {m: {"value": float(rng.random()), "difference": [0.25 if m == "grpo" else 0.0, 0, 0]} for m in models}
            (tmp_path / out / "eval").mkdir(parents=True)
            (tmp_path / out / "eval" / "metrics.json").write_text(json.dumps({"reports": {"ce_f1_macro13": values, "bleu4": {m: {"value": None} for m in models}}}))
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, "run", run)
    fail.append("more/seed1")
    with pytest.raises(data.InputError, match="'more', seed 1"):
        evaluation.reproduce(grid)
    fail.clear()
    calls.clear()
    evaluation.reproduce(grid)                                            # goes on where it stopped: only the failed row and what follows
    assert [(c[0], next(a for a in c if a.startswith("out="))[-10:]) for c in calls] == [
        ("train_sft.py", "more/seed1"), ("eval.py", "more/seed1"), ("train_grpo.py", "grpo/seed1")]
    values = {name: [json.loads((tmp_path / "runs" / name / f"seed{s}" / "eval" / "metrics.json").read_text())["reports"]["ce_f1_macro13"] for s in (0, 1)]
              for name in ("sft", "more", "grpo")}
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in (tmp_path / "RESULTS.md").read_text().splitlines() if line.startswith("| ")}
    for title, name, model in (("SFT", "sft", "x"), ("more", "more", "x"), ("GRPO", "grpo", "grpo")):
        numbers = [v[model]["value"] for v in values[name]]
        assert lines[title][1:3] == ["2", f"{np.mean(numbers):.3f} [{min(numbers):.3f}, {max(numbers):.3f}]"] and lines[title][5] == "-"
    assert lines["GRPO"][-1].startswith("+0.250 [") and lines["SFT"][-1].startswith("-")
    calls.clear()
    evaluation.reproduce(grid)
    assert not calls and "6 runs" in (tmp_path / "RESULTS.md").read_text()


def test_a_grid_runs_for_real(grid, tmp_path):
    """Two steps of everything, by the real scripts."""
    tree = yaml.safe_load(grid.read_text())
    tree["set"] = ["data.train_size=24", "data.val_size=4", "data.test_size=6", "model.max_pixels=9216", "sft.steps=2", "sft.more_steps=1", "sft.batch_size=4",
                   "grpo.steps=1", "grpo.prompts=4", "grpo.group_size=2", "grpo.max_new_tokens=8", "eval.bootstrap=5", "eval.cases=2"]
    tree["claims"][0] |= {"seeds": [3], "rows": {"SFT": {"stage": "sft"}, "GRPO": None}}
    grid.write_text(yaml.safe_dump(tree, sort_keys=False))
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--reproduce", str(grid)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "RESULTS.md").read_text()
    assert "2 runs" in text and all(f"| {name} | 1 | 0." in text for name in ("SFT", "GRPO"))
    assert (tmp_path / "runs" / "grpo" / "seed3" / "eval" / "report.html").exists()
