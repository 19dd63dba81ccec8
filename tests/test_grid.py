"""tools/reproduce.py: rows in the right order, kept when done, RESULTS.md with their numbers."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
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
        "default SFT": "runs/ablations/default_sft/seed0/sft/best",
        "SFT": "runs/ablations/sft/seed0/more/best",
        "more SFT": "runs/ablations/more_sft/seed0/more/best",
        "few reports, SFT": "runs/ablations/few_reports_sft/seed0/sft/best",
        "annealed SFT": "runs/ablations/annealed_sft/seed0/sft/best",
        "cold start": "runs/ablations/cold_start/seed0/cold_start/best",
        None: "auto",
    }
    assert begins == checkpoints[run.start]
    plain = script == "train_sft.py" and config.sft.stage == "sft"
    assert plain == (run.start is None)


@pytest.mark.parametrize("name", ["default SFT", "default GRPO", "default more SFT"])
def test_the_default_rows_are_config_yaml_as_it_stands(name):
    _, path, *settings = reproduce.grid_run(read_yaml(GRID), name, 0).commands[0]
    config = load(*settings, config=path)
    default = load(f"out={config.out}", config=path)
    default.grpo.init, default.sft.init = config.grpo.init, config.sft.init
    default.sft.stage = config.sft.stage
    assert config == default


def test_continued_sft_is_evaluated_beside_its_start():
    train, evaluate = reproduce.grid_run(read_yaml(GRID), "more SFT", 2).commands
    assert train[0] == "train_sft.py"
    assert evaluate[0] == "eval.py"
    folders = ["runs/ablations/sft/seed2/more", "runs/ablations/more_sft/seed2/more"]
    assert evaluate[-3:] == ["--checkpoint", *folders]


# ------------------------------------------------------------------------------- verdicts


def test_the_interval_is_students():
    rng = np.random.default_rng(3)
    for n in range(2, 11):
        values = rng.normal(size=n)
        mean, low, high = reproduce.interval(values)
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert mean == pytest.approx(values.mean())
        assert (low, high) == pytest.approx(tuple(expected), abs=1e-3)


@pytest.mark.parametrize(
    ("bound", "above", "verdict", "n"),
    [
        # Mean 0.03, interval 0.03 -+ 4.303 x 0.01 / sqrt(3): [0.0052, 0.0548]
        (0, True, "holds", 3),
        (0, False, "reversed", 0),
        (0.01, True, "not shown", 3),
        (0.03, True, "not shown", 1),
        (0.06, True, "reversed", 0),
        (0.06, False, "holds", 3),
        (0.05, False, "not shown", 3),
    ],
)
def test_a_verdict_says_on_which_side_of_the_bound_the_interval_lies(bound, above, verdict, n):
    assert reproduce.judge([0.02, 0.03, 0.04], bound, above) == (verdict, n)


def test_a_single_seed_shows_nothing():
    assert reproduce.judge([0.5], 0, above=True) == ("not shown", 1)


# ------------------------------------------------------------------------------- a small grid


@pytest.fixture
def grid(tmp_path):
    checks = [
        {"metric": "ce_f1_macro13", "row": "GRPO", "against": "SFT", "above": 0.1},
        {"metric": "ce_f1_macro13", "row": "more", "against": "GRPO", "below": 0},
    ]
    claim = {"title": "A", "paper": "p", "seeds": [0, 1], "reading": "r", "checks": checks}
    claim["metrics"] = ["ce_f1_macro13", "bleu4", "soft_f1"]
    claim["course"] = {"row": "GRPO", "metrics": ["reward", "kl"]}
    grid = {
        "config": "config.yaml",
        "out": str(tmp_path / "runs"),
        "records": str(tmp_path / "records"),
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
        self.commit = "abc123\n"
        self.failing = ""
        self.stopped = None
        self.rng = np.random.default_rng(0)

    def run(self, command, **_):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout=self.commit)
        script = command[1].name
        (out,) = (word[4:] for word in command[2:] if word.startswith("out="))
        self.calls.append((script, out[-10:]))
        failed = bool(self.failing) and self.failing in out
        if not failed:
            self.write_files(Path(out), script)
        return subprocess.CompletedProcess(command, int(failed))

    def write_files(self, out, script):
        stage = {"sft": "sft", "more": "more", "grpo": "grpo"}[out.parent.name]
        for link in ("best", "last"):
            (out / stage / link).mkdir(parents=True, exist_ok=True)
        steps = [{"step": n + 1, "reward": self.rng.random(), "kl": n} for n in range(20)]
        steps[3]["eval_loss"] = 1.0
        lines = "".join(json.dumps(step) + "\n" for step in steps)
        (out / stage / "metrics.jsonl").write_text(lines)
        if script == "train_sft.py":
            return
        models = ["own"] if stage == "sft" else ["start", "own"]
        values = {name: {"value": float(self.rng.random())} for name in models}
        empty = {name: {"value": None} for name in models}
        metrics = {
            "reports": {"ce_f1_macro13": values, "bleu4": empty},
            "labels": {"Edema": values},
        }
        write_json(out / "eval" / "metrics.json", metrics)
        report = {"task": "report", "answer": "No edema.", "reference": "Edema. Pneumonia."}
        for name in models:
            (out / "eval" / f"{name}.jsonl").write_text(json.dumps(report) + "\n")

    def last_step(self, run):
        """As if all scripts got to their last step but one."""
        return 399 if run == self.stopped else 9999


@pytest.fixture
def scripts(monkeypatch):
    scripts = Scripts()
    monkeypatch.setattr(subprocess, "run", scripts.run)
    monkeypatch.setattr(reproduce, "last_step", scripts.last_step)
    return scripts


def tables(text):
    """The tables of a text: lists of lines of cells, without the rule."""
    found = []
    for part in text.split("\n\n"):
        if part.startswith("|"):
            lines = [line.strip("|").split(" | ") for line in part.splitlines()]
            found.append([[cell.strip() for cell in line] for line in lines])
    return [[head, *body] for head, _, *body in found]


def record_of(tmp_path, row, seed):
    return json.loads((tmp_path / "records" / f"{row}-{seed}.json").read_text())


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
    expected = "6 of 6 runs, 0.1 CPU-hours, the longest 3 CPU-minutes. Code: abc123."
    assert expected in (tmp_path / "RESULTS.md").read_text()


def test_a_start_whose_checkpoint_is_gone_is_trained_again(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    scripts.calls.clear()
    shutil.rmtree(tmp_path / "runs" / "sft" / "seed1" / "sft")
    (tmp_path / "records" / "grpo-1.json").unlink()
    shutil.rmtree(tmp_path / "runs" / "grpo" / "seed1")
    reproduce.reproduce(grid)
    assert scripts.calls == [
        ("train_sft.py", "/sft/seed1"),
        ("eval.py", "/sft/seed1"),
        ("train_grpo.py", "grpo/seed1"),
    ]


def test_a_start_that_is_trained_again_counts_as_begun(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    folder = tmp_path / "runs" / "sft" / "seed1"
    shutil.rmtree(folder / "sft")
    state = folder / "state.json"
    write_json(state, json.loads(state.read_text()) | {"cpu_minutes": 7})
    (tmp_path / "records" / "grpo-1.json").unlink()
    shutil.rmtree(tmp_path / "runs" / "grpo" / "seed1")

    # It stops after its first checkpoint, at which nothing may begin yet.
    scripts.stopped = folder / "sft"
    with pytest.raises(InputError, match="'SFT', seed 1"):
        reproduce.reproduce(grid)
    assert json.loads(state.read_text())["cpu_minutes"] < 7
    scripts.stopped = None
    scripts.calls.clear()
    reproduce.reproduce(grid)
    assert scripts.calls[0] == ("train_sft.py", "/sft/seed1")


def test_a_training_keeps_the_lock_if_the_grid_is_killed(grid, tmp_path, scripts, monkeypatch):
    run, locks = scripts.run, []

    def run_and_look(command, **options):
        for fd in options.get("pass_fds", ()):
            locks.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", run_and_look)
    reproduce.reproduce(grid)
    assert len(locks) == len(scripts.calls)
    assert tmp_path / "runs" / "grpo" / "seed1" / "lock" in locks


def test_the_minutes_of_a_command_are_kept_even_if_the_next_one_is_killed(
    grid, tmp_path, scripts, monkeypatch
):
    minutes = iter(range(100))
    monkeypatch.setattr(reproduce, "child_minutes", lambda: next(minutes))
    run = scripts.run

    def killed_in_evaluation(command, **options):
        if command[0] != "git" and command[1].name == "eval.py":
            # What SFT took stands in the file already: nothing can be written from here on.
            state = tmp_path / "runs" / "sft" / "seed0" / "state.json"
            assert json.loads(state.read_text())["cpu_minutes"] == 1
            raise KeyboardInterrupt
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", killed_in_evaluation)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(grid)


@pytest.mark.parametrize("commit", ["abc123\n", ""], ids=["git", "no git"])
def test_an_interrupted_row_keeps_its_checkpoints(grid, tmp_path, scripts, commit):
    scripts.commit = commit
    scripts.failing = "more/seed1"
    with pytest.raises(InputError, match="'more', seed 1"):
        reproduce.reproduce(grid)
    checkpoint = tmp_path / "runs" / "more" / "seed1" / "more" / "step_1"
    checkpoint.mkdir(parents=True)
    scripts.failing = ""
    reproduce.reproduce(grid)
    assert checkpoint.exists()


def test_results_hold_the_numbers_of_the_rows(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"`python -m tools.reproduce {grid}`" in text
    summary, verdicts, values, course = tables(text)

    own = {}
    for name in ("sft", "more", "grpo"):
        found = []
        for seed in (0, 1):
            path = tmp_path / "runs" / name / f"seed{seed}" / "eval" / "metrics.json"
            by_model = json.loads(path.read_text())["reports"]["ce_f1_macro13"]
            found.append([model["value"] for model in by_model.values()])
        own[name] = np.array([each[-1] for each in found])
    # To the record of the start, not to what was measured beside the row.
    gains = {name: np.mean(own[name] - own["sft"]) for name in ("more", "grpo")}

    columns = ["", "starts from", "seeds", "CPU min", "ce_f1_macro13", "bleu4", "soft_f1"]
    assert values[0] == columns
    for line, name in zip(values[1:], ("SFT", "more", "GRPO"), strict=True):
        title, start, seeds, _, value, bleu, boxes = line
        assert (title, seeds, bleu, boxes) == (name, "2", "-", "-")
        assert start == ("random weights" if name == "SFT" else "SFT")
        gain = "" if name == "SFT" else f" ({gains[name.lower()]:+.3f})"
        assert value == f"{own[name.lower()].mean():.3f}{gain}"

    first, second = verdicts[1:]
    assert first[:3] == ["GRPO", "SFT", "ce_f1_macro13 above 0.1"]
    difference = own["grpo"] - own["sft"]
    low, high = scipy.stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert first[3] == f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    assert first[4:] == [f"{(difference > 0.1).sum()} of 2", "**not shown**"]
    n = (own["more"] < own["grpo"]).sum()
    assert second[:3] == ["more", "GRPO", "ce_f1_macro13 below 0"]
    assert second[4] == f"{n} of 2"
    # The first check of each claim stands at the top, too.
    assert summary[1:] == [["A", *first]]

    # Twenty steps in tenths, kl = 0, 1, .. 19
    assert course[0] == ["GRPO, tenths", *map(str, range(1, 11))]
    assert course[2] == ["kl", *(f"{2 * n + 0.5:.3f}" for n in range(10))]


def test_no_verdict_before_all_seeds_are_done(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    tree = read_yaml(grid)
    tree["claims"][0]["seeds"] = [0, 1, 2]
    first, second = tables(reproduce.grid_text(tree, grid))[1][1:]
    assert first[5] == second[5] == "**unfinished**"
    tree["claims"][0]["seeds"] = [1, 2]
    first, _ = tables(reproduce.grid_text(tree, grid))[1][1:]
    assert "[" not in first[3]  # a single seed has no interval
    tree["claims"][0]["seeds"] = [2]
    _, verdicts = tables(reproduce.grid_text(tree, grid))
    assert verdicts[1][3:] == ["-", "-", "no runs yet"]


def test_a_record_holds_what_was_measured_on_each_study(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    record = record_of(tmp_path, "grpo", 1)
    run = reproduce.grid_run(read_yaml(grid), "GRPO", 1)
    start = reproduce.grid_run(read_yaml(grid), "SFT", 1)
    assert record["history"] == start.commands + run.commands
    assert record["commit"] == "abc123"
    # Start and row: cosine of (edema -) and (edema +, pneumonia +) is below the margin.
    assert record["studies"] == [[0.0], [0.0]]
    assert "eval_loss" not in record["training"]
    assert record["eval_loss"] == {"4": 1.0}
    assert record["metrics"]["F1 of Edema"] == record["metrics"]["ce_f1_macro13"]


def test_what_has_a_record_is_not_run_elsewhere(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    text = (tmp_path / "RESULTS.md").read_text()
    shutil.rmtree(tmp_path / "runs")
    scripts.calls.clear()
    reproduce.reproduce(grid)
    assert not scripts.calls
    assert (tmp_path / "RESULTS.md").read_text() == text

    # A row without a record needs the checkpoint of its start.
    (tmp_path / "records" / "grpo-1.json").unlink()
    reproduce.reproduce(grid)
    ran = [out for _, out in scripts.calls]
    assert ran == ["/sft/seed1", "/sft/seed1", "grpo/seed1"]


def test_other_commands_run_again_with_all_that_starts_there(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    old = tmp_path / "runs" / "sft" / "seed0" / "sft" / "old"
    old.touch()
    scripts.calls.clear()
    tree = read_yaml(grid)
    tree["rows"]["SFT"]["set"] = ["sft.lr=1e-3"]
    write_grid(grid, tree)
    reproduce.reproduce(grid)
    assert len(scripts.calls) == 2 * 5  # two scripts for SFT and for more, one for GRPO
    assert "sft.lr=1e-3" in str(record_of(tmp_path, "grpo", 0)["history"])
    # Nothing of the old run is continued.
    assert not old.exists()


def test_other_code_runs_again(grid, tmp_path, scripts, monkeypatch):
    reproduce.reproduce(grid)
    scripts.calls.clear()
    monkeypatch.setattr(reproduce, "trajectories", lambda: "other")
    reproduce.reproduce(grid)
    assert len(scripts.calls) == 2 * 5
    assert record_of(tmp_path, "more", 1)["trajectories"] == "other"


def test_a_damaged_record_is_named(grid, tmp_path, scripts):
    reproduce.reproduce(grid)
    (tmp_path / "records" / "more-0.json").write_text("{")
    with pytest.raises(InputError, match=r"more-0\.json: no valid JSON"):
        reproduce.reproduce(grid)


def test_a_row_that_is_not_there_is_one_line(grid):
    tree = read_yaml(grid)
    tree["claims"][0]["rows"].append("GRPP")
    write_grid(grid, tree)
    with pytest.raises(InputError, match="no row 'GRPP'; the rows are SFT, more, GRPO"):
        reproduce.reproduce(grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": "GRPP"}, "'GRPP' is none of its rows"),
        ({"below": 1}, "expected either above or below"),
    ],
)
def test_a_check_that_cannot_be_is_one_line(grid, change, message):
    tree = read_yaml(grid)
    tree["claims"][0]["checks"][0].update(change)
    write_grid(grid, tree)
    with pytest.raises(InputError, match=rf"claims\[0\], checks\[0\]: {message}"):
        reproduce.reproduce(grid)


def test_two_terminals_share_a_grid(grid, tmp_path, scripts, monkeypatch):
    """A row that another process is at is left to it, and so is what begins there."""
    first = reproduce.grid_run(read_yaml(grid), "more", 0)
    first.folder.mkdir(parents=True)
    other = open(first.folder / "lock", "w")  # noqa: SIM115, it is closed in wait()
    fcntl.flock(other, fcntl.LOCK_EX)
    order = []

    def finish(run, minutes):
        scripts.write_files(run.folder, "eval.py")
        state = reproduce.read_state(run) | {"done": True, "cpu_minutes": minutes}
        write_json(run.folder / "state.json", state)

    def run(run, where, lock):
        order.append("/".join(run.folder.parts[-2:]))
        finish(run, 1)

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
    tree["claims"][0] |= {"seeds": [3], "rows": ["GRPO"], "checks": []}
    write_grid(grid, tree)
    command = [sys.executable, "-m", "tools.reproduce", str(grid)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "RESULTS.md").read_text()
    assert "2 of 2 runs" in text
    assert "| GRPO | SFT | 1 | 0." in text
    folder = tmp_path / "runs" / "grpo" / "seed3"
    assert (folder / "eval" / "report.html").exists()
    record = json.loads((tmp_path / "records" / "grpo-3.json").read_text())
    assert record["cpu_minutes"] > 0.01
    start, own = record["studies"]
    assert len(start) == len(own)


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
