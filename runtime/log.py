"""What a run writes down: metrics.jsonl, samples.jsonl, a progress bar with times."""

import json
import math
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from runtime.config import Config, InputError
from runtime.output import progress, rank, write_atomically

SHOWN = ("loss", "reward", "kl", "eval_loss")  # in the progress bar


class Log:
    """The files of a run, its progress bar, and a clock of the phases of a step.

    On resume, lines after the resumed step are dropped.
    """

    def __init__(self, run: Path, config: Config, first_step: int, last_step: int):
        self.name = run.name
        self.first_step = first_step
        self.last_step = last_step
        self.files = {}
        self.wandb = None
        if rank() != 0:
            return
        for name in ("metrics", "samples"):
            path = run / f"{name}.jsonl"
            write_atomically(path, lines_until(path, first_step))
            self.files[name] = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        if config.log.wandb:
            self.wandb = start_wandb(run, config)

    def steps(self) -> Iterator[int]:
        """Yield first_step, .., last_step - 1: how many steps are done before each.

        The progress bar and the clock of a step run meanwhile.
        """
        steps = range(self.first_step, self.last_step)
        self.bar = progress(steps, self.name, initial=self.first_step, total=self.last_step)
        with self.bar:
            for step in self.bar:
                self.began = self.now = time.perf_counter()
                self.seconds = {}
                yield step
        if self.wandb:
            # Of each stage one record: else the next would go on in this one.
            self.wandb.finish()

    def lap(self, phase: str):
        """A phase of this step ends here: log its seconds."""
        now = time.perf_counter()
        self.seconds[f"time/{phase}"] = now - self.now
        self.now = now

    def metrics(self, step: int, values: dict):
        """Write a line of metrics.jsonl with its times. Tensors of one number become numbers."""
        row = {name: float(value) for name, value in values.items()}
        row |= self.seconds
        row["step_time"] = time.perf_counter() - self.began
        row["tokens_per_second"] = row["num_tokens"] / row["step_time"]
        self.write("metrics", step, row)
        self.bar.set_postfix({name: row[name] for name in SHOWN if name in row})
        if self.wandb:
            self.wandb.log(row, step=step)

    def samples(self, step: int, rows: list[dict]):
        """Write lines of samples.jsonl."""
        for row in rows:
            self.write("samples", step, row)

    def write(self, name, step, row):
        if rank() == 0:
            self.files[name].write(json.dumps({"step": step, **row}) + "\n")


def lines_until(path, step):
    """What a file of JSON lines holds up to this step."""
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "".join(line + "\n" for line in lines if step_of(line) <= step)


def step_of(line):
    """The step of a line; of a line that kill -9 has cut, infinity."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def start_wandb(run, config):
    try:
        import wandb  # noqa: PLC0415
    except ImportError as error:
        raise InputError(f"log.wandb: {error}; install wandb or leave the option off") from None
    # A run that is resumed goes on in the same record.
    path = run / "wandb_id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return wandb.init(
        project="chest-xray-grpo",
        name=str(run),
        id=path.read_text(),
        resume="allow",
        config=asdict(config),
    )
