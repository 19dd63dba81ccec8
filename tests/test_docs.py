"""The README and docs/: every link, file, name, setting and command in them exists."""

import ast
import json
import re
import shlex
from functools import cache
from typing import get_args

import pytest
from helpers import ROOT, python_files
from test_house import ALL_TOKENS, SIX_TOKENS

from rewards import REWARDS
from runtime.config import Dataset, known_keys, load_config

README = ROOT / "README.md"
HOUSE = ROOT / "docs/house.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md"]
README_BYTES = 14_000  # longer matter belongs into docs/

LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w./-]+\.(?:py|yaml|md|cff)\b")
# model.path, but not model.py.
KEY = re.compile(r"\b(?:model|data|sft|grpo|rewards|eval|log)\.(?!py\b|png\b)[a-z]\w*")
# snake_case, and Class.method.
NAME = re.compile(r"\b[a-z]\w*_\w+")
METHOD = re.compile(r"^[A-Z][a-z]\w*\.[a-z_]+$")
# `file.py`: `name`, `name`
STANDS_IN = re.compile(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)")
COMMAND = re.compile(r"(python|torchrun) .*(\.py|-m \w)")
# The user's own files, and one of R2Gen.
NOT_OURS = ("my.py", "path/to/file.py", "compute_ce.py")
GONE = "## Settings that are gone"

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ------------------------------------------------------------------------------- what a page says


def spans(page):
    """What stands in `backticks`, outside of blocks and without the settings that are gone."""
    text = page.read_text(encoding="utf-8").partition(GONE)[0]
    return SPAN.findall(BLOCK.sub("", text))


def commands(page):
    """The words of each command that runs one of our programs."""
    lines = spans(page)
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        # A backslash continues a command on the next line.
        lines += block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if COMMAND.match(line)]


def anchors(page):
    """The headings of a page, as GitHub turns them into anchors."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M):
        plain = re.sub(r"[^\w -]", "", heading.lower())
        found.add(plain.replace(" ", "-"))
    return found


def column(page, number, heading):
    """The text of one column of all tables after a heading."""
    text = page.read_text(encoding="utf-8").partition(heading)[2]
    cells = []
    for row in re.findall(r"^\|(.*)\|$", text, re.M):
        # A cell may hold an escaped bar.
        cells.append(re.split(r"(?<!\\)\|", row)[number])
    return " ".join(cells)


# ------------------------------------------------------------------------------- what there is


@cache
def files():
    return [f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.*")]


@cache
def sources():
    """Paths and texts of all code but this."""
    texts = {}
    for path in python_files("*.py", "*/*.py", "*.yaml", "configs/**/*.yaml"):
        if path.name != "test_docs.py":
            texts[path] = path.read_text(encoding="utf-8")
    return texts


@cache
def words():
    return set(re.findall(r"\w+", "\n".join(sources().values())))


@cache
def defined(path):
    """Names at the top of a file, and Class.name of its classes."""
    names = set()
    for node in ast.parse(sources()[path]).body:
        names |= names_of(node)
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                names |= {f"{node.name}.{name}" for name in names_of(child)}
    return names


def names_of(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = getattr(node, "targets", [])
    return {target.id for target in targets if isinstance(target, ast.Name)}


@cache
def all_defined():
    python = [path for path in sources() if path.suffix == ".py"]
    return set().union(*map(defined, python))


# ------------------------------------------------------------------------------- tests


@by_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@by_page
def test_every_page_is_linked_from_the_readme(page):
    links = LINK.findall(README.read_text(encoding="utf-8"))
    assert page == README or str(page.relative_to(ROOT)) in links


@by_page
def test_files_exist(page):
    for name in FILE.findall(" ".join(spans(page))):
        # NAME stands for a name that the user chooses.
        if name.endswith(NOT_OURS) or "NAME" in name:
            continue
        assert any(path.endswith(f"/{name}") for path in files()), name


@by_page
def test_names_exist(page):
    """Words with an underscore occur in the code; Class.method is defined."""
    for span in spans(page):
        names = NAME.findall(FILE.sub("", span))
        assert set(names) <= words(), span
        methods = METHOD.findall(span)
        assert set(methods) <= all_defined(), span


@by_page
def test_functions_stand_in_the_file_that_is_named(page):
    for file, names in STANDS_IN.findall(page.read_text(encoding="utf-8")):
        assert set(SPAN.findall(names)) <= defined(ROOT / file), file


@by_page
def test_settings_exist(page):
    keys = KEY.findall(" ".join(spans(page)))
    assert set(keys) <= known_keys().keys()


def test_settings_that_are_gone_are_gone_and_what_stands_for_them_exists():
    gone = KEY.findall(column(HOUSE, 0, GONE))
    assert len(gone) > 10
    assert not set(gone) & known_keys().keys()
    instead = KEY.findall(column(HOUSE, 1, GONE))
    assert set(instead) <= known_keys().keys()


@by_page
def test_commands_can_be_given(page):
    """Program, configuration, settings and options exist; nothing is run."""
    code = "\n".join(sources().values())
    for command in commands(page):
        programs = [word.replace(".", "/") for word in command if word.startswith("tools.")]
        assert all((ROOT / f"{name}.py").exists() for name in programs), command
        paths = [word for word in command if word.endswith((".py", ".yaml"))]
        assert all((ROOT / path).exists() for path in paths), command

        settings = [word for word in command if re.match(r"[a-z_.]+=", word)]
        # The grid is no configuration.
        for path in paths:
            if path.endswith(".yaml") and "ablations" not in path:
                load_config(ROOT / path, settings)

        for option in command:
            of_torchrun = option.startswith(("--n", "--rdzv"))
            if option.startswith("--") and not of_torchrun:
                assert re.search(rf"{option}\b", code), option


def test_tables_of_datasets_and_rewards_are_complete():
    datasets = SPAN.findall(column(ROOT / "docs/data.md", 0, "## Datasets"))
    assert set(datasets) == {"data.source", *get_args(Dataset)}
    rewards = SPAN.findall(column(ROOT / "docs/rewards.md", 0, "## Rewards"))
    assert REWARDS.keys() <= set(rewards)


def test_the_budgets_are_those_that_the_page_names():
    text = " ".join(HOUSE.read_text(encoding="utf-8").split())
    assert f"{SIX_TOKENS:,} tokens in the six modules; {ALL_TOKENS:,} in all code" in text
    assert len(README.read_bytes()) <= README_BYTES


README_ROWS = {
    "CE macro-F1": "ce_f1_macro13",
    "CE recall": "ce_recall_micro13",
    "CE precision": "ce_precision_micro13",
    "BLEU-4": "bleu4",
    "soft-F1 where": "soft_f1_nonempty",
    "empty images": "empty_accuracy",
    "mAP@0.5": "map50",
}


@pytest.mark.parametrize("name", README_ROWS)
def test_the_table_of_the_readme_is_that_of_the_records(name):
    metric = README_ROWS[name]
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {name}")]
    _, before, grpo, more = [cell.strip() for cell in line.strip("|").split("|")]
    for row, said in (("grpo", grpo), ("more_sft", more)):
        for seed, start, gain in zip((0, 1, 2), before.split(", "), said.split(", "), strict=True):
            record = json.loads((ROOT / "results" / f"default_{row}-{seed}.json").read_text())
            first, last = record["metrics"][metric]
            assert float(start) == pytest.approx(first, abs=0.0051)
            # Both values were rounded to four digits.
            assert float(gain) == pytest.approx(last - first, abs=0.0007)
