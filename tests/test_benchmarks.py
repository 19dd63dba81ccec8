"""The benchmark of a GPU runs its whole code with a tiny model."""

import subprocess
import sys

from helpers import ROOT


def test_every_part_of_the_gpu_benchmark_runs():
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--profile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    table = done.stdout[done.stdout.rindex("| | measured") :]
    for name in ("step, s", "decode 8 rows, plain loop", "head, bfloat16, ms", "gap of log-probs"):
        assert name in table
