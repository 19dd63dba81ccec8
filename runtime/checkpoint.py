"""Run folders and checkpoints: what is written appears whole or not at all.

A run folder holds config.yaml, metrics.jsonl, samples.jsonl, step_N/ (Hugging Face model folders
with the state of the training), and the links `last` and `best` to two of these.
"""

import os
import shutil
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from safetensors import SafetensorError

from runtime.config import Config, InputError, config_text, known_keys, load_config
from runtime.output import rank, write_atomically
from runtime.processes import gather_objects

# What a run may be continued with other values of: sizes that only divide the work, how long, how
# often. (In the stage `more`, sft.more_steps sets the learning rates, so there it may not change.)
MAY_CHANGE = {
    "grpo.steps",
    "grpo.save_every",
    "grpo.micro_tokens",
    "grpo.sample_batch",
    "sft.micro_batch",
    "sft.more_steps",
    "data.val_size",
    "data.test_size",
    "data.on_error",
    "data.workers",
    "model.max_prompt_tokens",
    "model.shared_prefix",
    "model.parallel",
    "model.gradient_checkpointing",
    "model.compile",
}


def update_link(link, folder):
    """Make the symbolic link point to `folder`, which lies beside it."""
    new = link.with_name(f"{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    os.replace(new, link)


def last_step(run: Path) -> int:
    """The step of run/last, 0 without one."""
    last = run / "last"
    if not last.exists():
        return 0
    if not last.is_symlink():
        raise InputError(
            f"{last} is a folder where a link was: copy runs with their links (cp -a, rsync -a), "
            f"or replace it by a link to a step_N"
        )
    return int(last.resolve().name.removeprefix("step_"))


def resolve(path: str | Path) -> str:
    """The best checkpoint of a run folder, else its last one, else `path` itself."""
    for name in ("best", "last"):
        checkpoint = os.path.join(path, name)
        if os.path.isdir(checkpoint):
            return checkpoint
    return str(path)


def write_checkpoint(
    run: Path, step: int, keep_last: int, write: Callable[[Path], None], is_best: bool = False
):
    """Write run/step_N, point `last` (and `best`) to it, remove older steps. Collective.

    write(folder) fills the folder, on the first process. It is filled under another name and then
    renamed, so that a step folder is whole. Nothing is written if the step is there already.
    """
    final = run / f"step_{step:06d}"
    if rank() == 0:
        if not final.exists():
            aside = final.with_suffix(".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                aside.mkdir(parents=True)
                write(aside)
                os.rename(aside, final)
            except (OSError, RuntimeError, SafetensorError) as error:
                # torch.save raises RuntimeError when the disk is full.
                shutil.rmtree(aside, ignore_errors=True)
                reason = (str(error) or repr(error)).splitlines()[0]
                raise InputError(
                    f"{final} cannot be written ({reason}); the checkpoint before it is whole. "
                    f"If the disk is full, make room; then start the same command again"
                ) from None
        if is_best:
            update_link(run / "best", final)
        update_link(run / "last", final)
        prune(run, keep_last)
    gather_objects(None)


def prune(run, keep_last):
    """Remove all steps but the newest and those that `best` and `last` point to."""
    keep = {(run / name).resolve().name for name in ("best", "last")}
    steps = sorted(run.glob("step_??????"))
    for path in steps[:-keep_last]:
        if path.name not in keep:
            # Renamed first: a folder that is removed by halves must not look like a step.
            aside = path.with_suffix(".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    for path in list(run.glob("step_*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def changed_keys(run, config, sections):
    """The keys in `sections` whose values differ from those that the run was started with."""
    try:
        before = load_config(run / "config.yaml")
    except InputError as error:
        raise InputError(
            f"{run} was begun by another version of this program ({error}); choose another folder "
            f"with out=..."
        ) from None
    may_change = MAY_CHANGE - ({"sft.more_steps"} if run.name == "more" else set())
    changed = []
    for key in known_keys():
        value = attrgetter(key)
        fixed = key.split(".")[0] in ["seed", *sections] and key not in may_change
        if fixed and value(before) != value(config):
            changed.append(f"{key}={value(before)} (now {value(config)})")
    return changed


def open_run(run: Path, config: Config, sections: list[str], steps: int):
    """Make the run folder. Refuse one that was made with other settings in `sections`. Collective.

    steps: the last step that is asked for, which the run must not be past.
    """
    path = run / "config.yaml"
    # A step_N that no link names yet belongs to the old settings, too.
    if path.exists() and any(run.glob("step_*")):
        if changed := changed_keys(run, config, sections):
            raise InputError(
                f"{run} was made with {', '.join(changed)}; choose another folder with out=..., or "
                f"delete this one. What may change: {', '.join(sorted(MAY_CHANGE))}"
            )
        if last_step(run) > steps:
            raise InputError(f"{run} is at step {last_step(run)}, past the {steps} asked for")
    if rank() == 0:
        write_atomically(path, config_text(config))
    if len(set(gather_objects(last_step(run)))) > 1:
        raise InputError(
            f"{run}: processes find different checkpoints there; it has to be on a file system "
            f"that all machines share"
        )
