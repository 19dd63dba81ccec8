"""What a program prints and writes: by the first process only, and whole or not at all.

Nothing here needs torch, so that rewards and data can be imported without it.
"""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from runtime.config import InputError


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of the processes this is, from 0."""
    if world_size() == 1:
        return 0
    return int(os.environ["RANK"])


def print0(text: str, file: TextIO | None = None):
    """Print on the first process, above any progress bar."""
    if rank() == 0:
        tqdm.write(text, file=file)
        sys.stdout.flush()


def warn0(text: str):
    """Print to stderr on the first process."""
    print0(text, sys.stderr)


WARNED = set()


def warn_once(kind: str, text: str):
    """The first warning of its kind, on the first process."""
    if kind not in WARNED:
        WARNED.add(kind)
        warn0(text)


def progress(items: Iterable, title: str, **options: Any) -> tqdm:
    """A progress bar on the first process."""
    hidden = rank() != 0
    return tqdm(items, title, disable=hidden, **options)


def write_atomically(path: Path, text: str):
    """Write a text file, and its folder if there is none. Raises InputError."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise InputError(f"{path}: cannot write ({error.strerror})") from None


def format_table(rows: list[list[str]]) -> str:
    """Rows of texts as an aligned table. The first row is its head."""
    head, *body = rows
    columns = zip(*rows)
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [head, rule, *body]:
        cells = [text.rjust(width) for text, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def moved(old: str, tools: dict[str, str]):
    """Say which commands replace `python OLD`, and exit with status 2."""
    commands = [f"{what}: python -m {tool}" for what, tool in tools.items()]
    warn0(f"{old} is not a program any more. {'; '.join(commands)}")
    sys.exit(2)
