"""Hostile input: thousands of random texts for every parser, broken files for every reader.

A clear error or an answer; no crash, no hang.
"""

import io
import json
import signal

import numpy as np
import pytest
import yaml
from helpers import ROOT, load
from PIL import Image

import data
import rewards
from runtime.config import InputError, known_keys, load_config

N = 10_000
# No character, and so no text of a file.
SURROGATES = 0xD800


@pytest.fixture(autouse=True)
def no_hang():
    def too_long(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def random_character(rng):
    code = rng.integers(0, 128), rng.integers(0, SURROGATES), rng.integers(0x10000, 0x110000)
    return chr(int(rng.choice(code)))


def texts(seed, pieces, longest=40):
    """N random texts of these pieces and of any characters, a few of them very long."""
    rng = np.random.default_rng(seed)
    for i in range(N):
        size = int(rng.integers(0, longest)) if i % 1000 else 20_000
        parts = []
        for k in rng.integers(0, len(pieces) + 4, size):
            parts.append(pieces[k] if k < len(pieces) else random_character(rng))
        yield "".join(parts)


# ------------------------------------------------------------------------------- texts

BOX_PIECES = [
    "[",
    "]",
    ",",
    ", ",
    "0.5",
    "1e9",
    "-",
    ".",
    "inf",
    "nan",
    " and ",
    "[0.1, 0.2, 0.3, 0.4]",
    "9" * 400,
    "\n",
    "[",
]


def test_parsed_boxes_are_finite():
    found = 0
    for text in texts(1, BOX_PIECES):
        boxes = data.parse_boxes(text)
        found += len(boxes)
        for box in boxes:
            assert len(box) == 4
            assert np.isfinite(box).all()
        assert np.isfinite(rewards.soft_f1(boxes[:30], [(0.1, 0.1, 0.5, 0.5)]))
    assert found > N / 4


def test_any_output_has_a_trace_and_an_answer():
    valid = 0
    whole = "<think>a</think><report>b</report>"
    pieces = [*data.TAGS, whole, "<think>", "word ", "\n", "<", ">", "</"]
    for text in texts(2, pieces, longest=6):
        for style in ("plain", "tags", "suffix"):
            ok, thinking, answer = data.parse_output(text, "report", style)
            assert isinstance(thinking, str)
            assert isinstance(answer, str)
            assert answer or not ok
            valid += ok
    assert valid > 100


LABEL_WORDS = (
    "no pneumothorax effusion . without may be heart enlarged normal size , but with stable lungs "
    "clear ; and opacity - 1. findings: impression:"
)


def test_any_text_has_labels():
    pieces = [f"{word} " for word in LABEL_WORDS.split()]
    labels = rewards.extract_labels(list(texts(3, pieces)))
    assert labels.shape == (N, 14)
    assert len(np.unique(labels)) == 4


# ------------------------------------------------------------------------------- configurations

VALUES = [
    None,
    True,
    -1,
    0,
    3,
    0.5,
    1e400,
    float("nan"),
    "x",
    "",
    [],
    ["a"],
    {},
    {"mccs": 1},
    [{"source": "nih"}],
    {"a": {"b": []}},
    [[1]],
    "1e-4",
    10**30,
]
# Python itself chokes on some of them.
BROKEN = [
    "{" * 5000,
    "a: " + "[" * 3000,
    "seed: 2001-99-99",
    "seed: " + "9" * 5000,
    "? {a: b}\n: c",
    "&a [*a]",
    "!!python/object:os.system x",
    "\x00",
    "seed: !!binary x",
    "seed: !!bool x",
    "seed: !!timestamp foo",
    "seed: !!int ''",
    "seed: !!float ''",
]


def is_accepted(path):
    """Does the file load? If not, the error is one line."""
    try:
        load_config(path)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("text", BROKEN)
def test_broken_configurations(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert not is_accepted(path)


def test_random_trees(tmp_path):
    """Any key with any value."""
    rng, path, accepted = np.random.default_rng(4), tmp_path / "c.yaml", 0
    keys = list(known_keys())
    for _ in range(3 * N // 4):
        *sections, last = str(rng.choice(keys)).split(".")
        tree = {last: VALUES[rng.integers(len(VALUES))]}
        for section in reversed(sections):
            tree = {section: tree}
        path.write_text(yaml.safe_dump(tree))
        accepted += is_accepted(path)
    assert N / 50 < accepted < N / 2


def test_damaged_configurations(tmp_path):
    """The default file with one character changed."""
    rng, path, accepted = np.random.default_rng(5), tmp_path / "c.yaml", 0
    good = (ROOT / "config.yaml").read_bytes()
    for _ in range(N // 4):
        raw = bytearray(good)
        raw[rng.integers(len(raw))] = rng.integers(32, 127)
        path.write_bytes(raw)
        accepted += is_accepted(path)
    assert N / 50 < accepted < N / 4


@pytest.mark.parametrize(
    "text",
    [
        "seed=2001-99-99",
        "seed=" + "9" * 5000,
        "seed=" + "[" * 3000,
        "seed=!!bool x",
        "seed=!!timestamp foo",
        "seed=!!int ''",
    ],
)
def test_overrides(text):
    with pytest.raises(InputError):
        load(text)


# ------------------------------------------------------------------------------- files


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged files
@pytest.mark.parametrize(
    "kind, mode",
    [("PNG", "RGB"), ("JPEG", "L"), ("PNG", "I;16"), ("TIFF", "F"), ("GIF", "P"), ("BMP", "RGB")],
)
def test_images(tmp_path, kind, mode):
    """Damaged files of each kind: read or refused."""
    rng, path, file, refused = np.random.default_rng(5), tmp_path / "i", io.BytesIO(), 0
    Image.new(mode, (24, 16)).save(file, kind)
    for i in range(500):
        raw = bytearray(file.getvalue())
        for place in rng.integers(0, len(raw), 1 + i % 8):
            raw[place] = rng.integers(256)
        if i % 3 == 0:
            raw = raw[: rng.integers(1, len(raw))]
        path.write_bytes(raw)
        try:
            assert data.load_image(path).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_bombs(tmp_path):
    """A small file that says it is 100,000 pixels wide and high."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "BMP")
    raw = bytearray(file.getvalue())
    raw[18:26] = (100_000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(raw)
    with pytest.raises(InputError, match="bomb"):
        data.load_image(tmp_path / "bomb.bmp")


OUTSIDE = {"id": "a", "report": "x", "image_path": ["../../../etc/passwd"]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b"{}",
        b"[1]",
        b'{"train": 3}',
        b'{"train": [null, 1, {}]}',
        b"null",
        json.dumps({"train": [OUTSIDE] * 3}).encode(),
    ],
)
def test_annotations(tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotation.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        data.load_split(load("data.source=iu_xray", f"data.path={tmp_path}"), "train")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[" * 100_000,
        b"{}",
        b"3",
        b'{"id": "a", "images": ["../x.png"], "report": "b"}',
        b'{"id": {}, "images": 3, "report": 1e999}',
        b'{"id": "a", "images": [1e999], "phrase": [], "boxes": [[1e999, "a", null, {}]]}',
        b'{"id": "a"' + b" " * 1_000_000 + b"}",
    ],
)
def test_lines(tmp_path, line):
    (tmp_path / "train.jsonl").write_bytes(line + b"\n")
    with pytest.raises(InputError) as error:
        data.load_split(load("data.source=jsonl", f"data.path={tmp_path}"), "train")
    assert "train.jsonl" in str(error.value)
