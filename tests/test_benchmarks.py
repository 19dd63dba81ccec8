"""benchmarks/gpu.py and gap.py on tiny models: each part runs, one that fails stops no other."""

import importlib
import sys
import time

import pytest
from helpers import ROOT

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_each_part_runs(gpu, monkeypatch, capsys):
    parts = ["--parts", "step", "decode", "head", "settings"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--profile", *parts])
    gpu.main()
    out = capsys.readouterr().out
    assert "failed" not in out
    rows, kernels = (below.split("\n\n")[0].splitlines() for below in out.split("---|\n")[1:])
    assert len(rows) == 21
    assert sum("<=" in row or ">=" in row for row in rows) == 6
    assert len(kernels) == 10


def test_the_gap_is_that_of_bfloat16(gpu, monkeypatch, capsys):
    """Nothing in float32, and every part counts."""
    monkeypatch.setattr(sys, "argv", ["gap.py", "--tiny"])
    importlib.import_module("gap").main()
    rows = capsys.readouterr().out.split("---|\n")[1].splitlines()
    means = [float(row.split("|")[2]) for row in rows]
    assert len(means) == 9
    assert means[0] < 1e-5
    assert all(mean > means[0] for mean in means[1:])


def fail(report):
    raise ValueError("first line\nsecond line")


def wait(report):
    time.sleep(60)


def succeed(report):
    report.add("good", "1", "<= 2")


def test_a_part_that_fails_or_is_too_slow_takes_one_row(gpu, capsys):
    report = gpu.Report(minutes=0)
    report.run("bad", fail)
    report.run("slow", wait)
    report.run("good", succeed)
    report.print_table("Title")
    bad, slow, good = capsys.readouterr().out.splitlines()[-3:]
    assert bad == "| bad | failed: ValueError: first line |  |"
    assert slow == "| slow | failed: TimeoutError: the time is over |  |"
    assert good == "| good | 1 | <= 2 |"
