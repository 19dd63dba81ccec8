"""How dense the code may be: what a reader has to hold in mind at once.

Size is counted in tokens, so line breaks hide nothing. Density may go down, not up. How large the
whole code may be stands in tests/test_house.py.
"""

import ast
import io
import re
import tokenize

import pytest
from helpers import ROOT, SIX, docstring_lines, python_files

# For each file: tokens per line of code, and per statement. The exceptions are what a file has now.
PER_LINE = 9.0
PER_STATEMENT = 12.0
EXCEPTIONS = {"eval.py": 9.9, "fast/shared_decode.py": 9.6, "fast/shared_prefix.py": 10.0}
LONG_STATEMENT = 40  # tokens; imports, signatures and tables may be longer
LONG_FUNCTION = 50  # lines, with the docstring
COMMENTS = 0.06  # share of the lines in train_grpo.py, model.py and fast/
FILES = [*python_files(*(f"{name}.py" for name in SIX)), *python_files("fast/[!_]*.py")]

by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def statements(path):
    """[(first line, tokens, lines of code)] of a file, without docstrings."""
    text = path.read_text(encoding="utf-8")
    hidden = docstring_lines(ast.parse(text))
    found = []
    lines = []
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    for item in tokenize.generate_tokens(io.StringIO(text).readline):
        if item.type in kinds and item.start[0] not in hidden:
            lines.append(item.start[0])
        if item.type == tokenize.NEWLINE and lines:
            found.append((lines[0], len(lines), set(lines)))
            lines = []
    return found


def nested(tree, kinds):
    """Nodes of these kinds inside others of them."""
    found = []
    for outer in ast.walk(tree):
        if isinstance(outer, kinds):
            found += [n for n in ast.walk(outer) if isinstance(n, kinds) and n is not outer]
    return found


@by_file
def test_a_line_holds_little(path):
    found = statements(path)
    tokens = sum(size for _, size, _ in found)
    lines = len(set().union(*(lines for *_, lines in found)))
    limit = EXCEPTIONS.get(str(path.relative_to(ROOT)), PER_LINE)
    assert tokens / lines <= limit


@by_file
def test_a_statement_holds_little(path):
    found = statements(path)
    assert sum(size for _, size, _ in found) / len(found) <= PER_STATEMENT


@by_file
def test_no_statement_is_long(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    free = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
            free.add(node.lineno)
        # A table of names and values.
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.Return) and isinstance(value, ast.Dict | ast.BoolOp):
            free.add(node.lineno)
    free |= {node.lineno for node in tree.body}
    assert [
        at for at, size, _ in statements(path) if size > LONG_STATEMENT and at not in free
    ] == []


@by_file
def test_nothing_is_nested_that_is_hard_to_read(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    assert nested(tree, comprehensions) == []
    assert nested(tree, ast.IfExp) == []


@by_file
def test_no_function_is_long(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: n for name, n in lengths.items() if n > LONG_FUNCTION} == {}


@by_file
def test_public_functions_say_what_they_take(path):
    if path.parent != ROOT:
        pytest.skip("the rooms hint where it helps")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and is_imported(node.name):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare += [f"{node.name}({a.arg})" for a in arguments if a.annotation is None]
    assert bare == []


def is_imported(name):
    """Do other files name it?"""
    pattern = re.compile(rf"import .*\b{name}\b|\.{name}\(|^    {name},$", re.MULTILINE)
    return any(pattern.search(path.read_text(encoding="utf-8")) for path in FILES)


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.stem in ("train_grpo", "model") or p.parent != ROOT],
    ids=lambda path: path.stem,
)
def test_comments_say_why(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.lstrip().startswith("#")]
    assert len(comments) / len(lines) >= COMMENTS
