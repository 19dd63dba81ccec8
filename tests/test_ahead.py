"""Images that workers decode, fast/encode_ahead.py, against encoding where it is needed."""

import dataclasses
import os
import signal
import subprocess
import time
import weakref
from itertools import cycle

import pytest
import torch
from helpers import (
    LEARNING,
    SHORT,
    SMALL,
    largest_difference,
    load,
    metrics,
    run_script,
    start_script,
    tolerance,
    wait_for_lines,
    weights,
)
from layouts import r2gen

import eval as evaluation
from fast.encode_ahead import PROMPTS_AHEAD
from model import load_policy
from runtime.checkpoint import last_step
from runtime.config import InputError


@pytest.fixture
def two(policy, monkeypatch):
    """The policy with two workers."""
    monkeypatch.setattr(policy, "config", load(*SMALL, "data.workers=2"))
    monkeypatch.setattr(policy, "ahead", None)
    return policy


@pytest.fixture
def encoded_here(two, monkeypatch):
    """The ids of what is encoded in this process."""
    ids = []
    encode = two.encode_here

    def watched(example):
        ids.append(example.id)
        return encode(example)

    monkeypatch.setattr(two, "encode_here", watched)
    return ids


def assert_same(got, wanted):
    assert got.next_position == wanted.next_position
    assert torch.equal(got.positions, wanted.positions)
    assert got.positions.device == wanted.positions.device
    for ours, theirs in ((got.tokens, wanted.tokens), (got.images, wanted.images)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("asked", "here"),
    [
        ([0, 1, 2, 3], []),
        # What comes in between, and what comes after the last.
        ([0, 7, 1, 8, 8, 2, 3, 0], [7, 8, 8, 0]),
        # Once one is not asked for, the workers are of no more use.
        ([0, 2, 3], [2, 3]),
    ],
)
def test_prompts_are_those_of_this_process(two, examples, encoded_here, asked, here):
    wanted = [two.encode(examples[i]) for i in asked]
    encoded_here.clear()
    two.encode_ahead(iter(examples[:4]))
    for i, prompt in zip(asked, wanted):
        assert_same(two.encode(examples[i]), prompt)
    assert encoded_here == [examples[i].id for i in here]


def test_an_id_alone_is_not_enough(two, examples, encoded_here):
    """A held-out example may have the id of the next one."""
    other = dataclasses.replace(examples[1], id=examples[0].id)
    two.encode_ahead(examples[:1])
    assert_same(two.encode(other), two.encode(examples[1]))
    assert encoded_here == [other.id, examples[1].id]


def test_only_a_few_are_under_way(two, examples):
    taken = []

    def endless():
        for example in cycle(examples[:5]):
            taken.append(example)
            yield example

    two.encode_ahead(endless())
    assert len(taken) == 2 * PROMPTS_AHEAD
    two.encode(examples[0])
    assert len(taken) == 2 * PROMPTS_AHEAD + 1


def test_without_workers_nothing_is_started(config, examples):
    policy = load_policy(config)
    policy.encode_ahead(examples[:3])
    assert policy.ahead is None


def test_a_policy_that_is_done_is_freed():
    """Evaluation loads one model after the other."""
    # Buffers of the shared decoder would wait for the garbage collector.
    plain = "model.shared_prefix=false"
    config = load(*SMALL, "data.workers=2", "grpo.max_new_tokens=2", plain)
    policy = load_policy(config)
    evaluation.predict(policy, evaluation.chosen_examples(config)[:3], config, "a try")
    freed = weakref.ref(policy)
    del policy
    assert freed() is None


@pytest.fixture
def broken(examples, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    return dataclasses.replace(examples[1], id="broken", images=(str(path),))


def test_a_broken_image_stops_with_the_same_line(two, examples, broken):
    with pytest.raises(InputError) as here:
        two.encode_here(broken)
    two.encode_ahead([examples[0], broken, examples[2]])
    with pytest.raises(InputError) as ahead:
        two.encode_all([examples[0], broken, examples[2]])
    assert str(ahead.value) == str(here.value)


def test_a_broken_image_is_skipped_and_counted(two, examples, broken, capsys):
    two.config.data.on_error = "skip"
    asked = [examples[0], broken, examples[2]]
    reasons = []
    for count, upcoming in ((1, []), (2, asked)):
        two.encode_ahead(upcoming)
        pairs = two.encode_all(asked)
        assert [example.id for example, _ in pairs] == [examples[0].id, examples[2].id]
        said, reason = capsys.readouterr().err.split(": ", 1)
        assert said == f"skipped, {count} so far"
        reasons.append(reason)
    assert reasons[0] == reasons[1]


# ------------------------------------------------------------------------------- whole runs


def children(pid):
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def stop_run(out, stage, number, also_workers):
    """Start a run, and send a signal in the middle of a stage."""
    process = start_script("train_grpo.py", *LEARNING, f"out={out}", "data.workers=2")
    wait_for_lines(out / stage / "metrics.jsonl", 1, process)
    workers = children(process.pid)
    assert len(workers) == 2
    for pid in workers if also_workers else []:
        os.kill(pid, number)
    process.send_signal(number)
    # It returns when no process holds the pipes any more: no worker is left.
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode


def test_a_run_with_workers_is_the_same_run(tmp_path, device):
    """Stopped in SFT as Slurm and torchrun do it, killed in GRPO, ended with another number of
    workers: the weights and predictions of a run without."""
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    code, _, err = run_script("train_grpo.py", *LEARNING, f"out={plain}")
    assert code == 0, err
    assert stop_run(ahead, "sft", signal.SIGTERM, also_workers=True) == 0
    assert 0 < last_step(ahead / "sft") < 4
    assert stop_run(ahead, "grpo", signal.SIGKILL, also_workers=False) == -signal.SIGKILL
    assert last_step(ahead / "grpo") < 3
    code, _, err = run_script("train_grpo.py", *LEARNING, f"out={ahead}", "data.workers=1")
    assert code == 0, err
    # Of the tokenizers library, where a process forks.
    assert "forked" not in err

    limit = tolerance("training", device)
    for stage in ("sft", "grpo"):
        assert largest_difference(weights(ahead / stage), weights(plain / stage)) <= limit
        losses = [[row["loss"] for row in metrics(out / stage)] for out in (ahead, plain)]
        assert losses[0] == pytest.approx(losses[1], abs=limit)
    texts = [(out / "eval" / "grpo.jsonl").read_text() for out in (ahead, plain)]
    assert limit > 0 or texts[0] == texts[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_evaluating_leaves_no_process(tmp_path, number):
    """There the main process ends at once."""
    more = ["grpo.init=base", "grpo.steps=1", "data.test_size=200", "data.workers=2"]
    process = start_script("train_grpo.py", *LEARNING, f"out={tmp_path}", *more)
    wait_for_lines(tmp_path / "grpo" / "metrics.jsonl", 1, process)
    # After training, workers are started anew.
    before = children(process.pid)
    while set(children(process.pid)) <= set(before) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped while evaluating" in out
    assert "Traceback" not in err


def test_an_error_ends_all_processes(tmp_path):
    root = r2gen(tmp_path / "data")
    path = root / "images" / "CXR0" / "0.png"
    settings = [*SHORT, "data.source=iu_xray", f"data.path={root}", "data.tasks=[report]"]
    process = start_script(
        "train_sft.py", *settings, f"out={tmp_path}", "data.workers=2", "sft.steps=100"
    )
    wait_for_lines(tmp_path / "sft" / "metrics.jsonl", 1, process)
    path.write_bytes(path.read_bytes()[:60])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: {path}: not a readable image")
