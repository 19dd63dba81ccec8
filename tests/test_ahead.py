"""Images that workers decode, fast/encode_ahead.py, against encoding where it is needed."""

import dataclasses
import os
import signal
import subprocess
import time

import pytest
import torch
from helpers import (
    LEARNING,
    SHORT,
    SMALL,
    largest_difference,
    load,
    run_script,
    start_script,
    wait_for_lines,
    weights,
)
from layouts import r2gen

from model import load_policy
from runtime.config import InputError


@pytest.fixture
def two(config):
    """A policy with two workers."""
    policy = load_policy(load(*SMALL, "data.workers=2"))
    yield policy
    policy.encode_ahead([])
    policy.ahead.close()


def assert_same(got, wanted):
    assert got.next_position == wanted.next_position
    assert torch.equal(got.positions, wanted.positions)
    for ours, theirs in ((got.tokens, wanted.tokens), (got.images, wanted.images)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_prompts_are_those_of_this_process(two, examples):
    two.encode_ahead(iter(examples[:6]))
    for example in examples[:6]:
        assert_same(two.encode(example), two.encode_here(example))


def test_prompts_come_from_the_workers(two, examples, monkeypatch):
    two.encode_ahead(examples[:3])
    monkeypatch.setattr(two, "encode_here", None)
    assert all(len(two.encode(example)) for example in examples[:3])


def test_what_is_asked_for_in_between_is_encoded_here(two, examples):
    two.encode_ahead(examples[:3])
    for i in (0, 7, 1, 8, 2, 9):
        assert_same(two.encode(examples[i]), two.encode_here(examples[i]))


def test_an_example_that_is_not_asked_for_costs_time_only(two, examples):
    two.encode_ahead(examples[:4])
    for i in (0, 2, 3, 1):
        assert_same(two.encode(examples[i]), two.encode_here(examples[i]))


def test_without_workers_nothing_is_started(config, examples):
    policy = load_policy(config)
    policy.encode_ahead(examples[:3])
    assert policy.ahead is None


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


def test_a_broken_image_is_skipped_and_said(examples, broken, capsys):
    policy = load_policy(load(*SMALL, "data.workers=2", "data.on_error=skip"))
    asked = [examples[0], broken, examples[2]]
    policy.encode_ahead(asked)
    pairs = policy.encode_all(asked)
    policy.ahead.close()
    assert [example.id for example, _ in pairs] == [examples[0].id, examples[2].id]
    assert "skipped: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "settings"), [("train_grpo.py", LEARNING), ("train_sft.py", SHORT)]
)
def test_a_run_with_workers_is_the_same_run(tmp_path, script, settings):
    stage = "grpo" if script == "train_grpo.py" else "sft"
    found = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        more = ["grpo.init=base"] if stage == "grpo" else []
        code, _, err = run_script(
            script, *settings, *more, f"out={out}", f"data.workers={workers}", "eval.limit=2"
        )
        assert code == 0, err
        found.append(weights(out / stage))
    assert largest_difference(*found) == 0


def children(pid):
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_leaves_no_process(tmp_path, number):
    root = r2gen(tmp_path / "data")
    settings = [*SHORT, "data.source=iu_xray", f"data.path={root}", "data.workers=2"]
    process = start_script(
        "train_sft.py", *settings, "data.tasks=[report]", f"out={tmp_path}", "sft.steps=500"
    )
    wait_for_lines(tmp_path / "sft" / "metrics.jsonl", 2, process)
    workers = children(process.pid)
    assert workers
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
