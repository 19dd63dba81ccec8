"""The README and docs/: every link, file, name, setting and command in them exists."""

import ast
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
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md"]
README_BYTES = 14_000  # longer matter belongs into docs/

LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w./-]+\.(?:py|yaml|md|cff)\b")
KEY = re.compile(r"\b(?:model|data|sft|grpo|rewards|eval|log)\.(?!py\b|png\b)[a-z]\w*")
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
    text = page.read_text(encoding="utf-8")
    lines = spans(page)
    for block in BLOCK.findall(text):
        lines += block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if is_command(line)]


def is_command(line):
    return re.match(r"(python|torchrun) .*(\.py|-m \w)", line) is not None


def anchors(page):
    """The headings of a page, as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_cells(page, column, after=""):
    """A column of all tables after a heading, without their heads."""
    text = page.read_text(encoding="utf-8").partition(after)[2]
    rows = re.findall(r"^\|(?!-)(.*)\|$", text, re.M)
    return [re.split(r"(?<!\\)\|", row)[column] for row in rows]


# ------------------------------------------------------------------------------- what there is


@cache
def files():
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*")]


@cache
def sources():
    """Paths and texts of all code but this."""
    found = python_files("*.py", "*/*.py", "*.yaml", "configs/**/*.yaml")
    return {p: p.read_text(encoding="utf-8") for p in found if p.name != "test_docs.py"}


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
            inner = [name for child in node.body for name in names_of(child)]
            names |= {f"{node.name}.{name}" for name in inner}
    return names


def names_of(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)}


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
        # NAME stands for the user's.
        if not name.endswith(NOT_OURS) and "NAME" not in name:
            assert any(f"/{path}".endswith(f"/{name}") for path in files()), name


@by_page
def test_names_exist(page):
    """Words with an underscore occur in the code; Class.method is defined."""
    everything = set().union(*(defined(p) for p in sources() if p.suffix == ".py"))
    for span in spans(page):
        assert set(re.findall(r"\b[a-z]\w*_\w+", FILE.sub("", span))) <= words(), span
        assert set(re.findall(r"^[A-Z][a-z]\w*\.[a-z_]+$", span)) <= everything, span


@by_page
def test_functions_stand_in_the_file_that_is_named(page):
    """Where a page says: `file.py`: `name`, `name`."""
    text = page.read_text(encoding="utf-8")
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text):
        assert set(SPAN.findall(names)) <= defined(ROOT / file), file


@by_page
def test_settings_exist(page):
    for key in KEY.findall(" ".join(spans(page))):
        assert key in known_keys(), key


def test_settings_that_are_gone_are_gone_and_what_stands_for_them_exists():
    page = ROOT / "docs/house.md"
    gone = KEY.findall(" ".join(table_cells(page, 0, GONE)))
    assert len(gone) > 10
    assert not set(gone) & known_keys().keys()
    for key in KEY.findall(" ".join(table_cells(page, 1, GONE))):
        assert key in known_keys(), key


@by_page
def test_commands_can_be_given(page):
    """Program, configuration, settings and options; nothing is run."""
    code = "\n".join(sources().values())
    for command in commands(page):
        names = [word.replace(".", "/") + ".py" for word in command if word.startswith("tools.")]
        names += [word for word in command if word.endswith((".py", ".yaml"))]
        assert all((ROOT / name).exists() for name in names), command

        yaml = [name for name in names if name.endswith(".yaml") and "ablations" not in name]
        settings = [word for word in command if re.match(r"[a-z_.]+=", word)]
        if yaml:
            load_config(ROOT / yaml[0], settings)
        for option in command:
            torchrun = option.startswith(("--n", "--rdzv"))
            if option.startswith("--") and not torchrun:
                assert re.search(rf"{option}\b", code), option


def test_tables_of_datasets_and_rewards_are_complete():
    datasets = SPAN.findall(" ".join(table_cells(ROOT / "docs/data.md", 0, "## Datasets")))
    assert set(datasets) - {"data.source"} == set(get_args(Dataset))
    rewards = SPAN.findall(" ".join(table_cells(ROOT / "docs/rewards.md", 0, "## Rewards")))
    assert REWARDS.keys() <= set(rewards)


def test_the_budgets_are_those_that_the_page_names():
    text = (ROOT / "docs/house.md").read_text(encoding="utf-8")
    assert f"{SIX_TOKENS:,} tokens in the six modules; {ALL_TOKENS:,} in all code" in text
    assert len(README.read_bytes()) <= README_BYTES
