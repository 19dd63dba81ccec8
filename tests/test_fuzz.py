"""Hostile input: ten thousand random texts for every parser, broken files for every reader. A clear error or an answer, no crash, no hang."""

import io
import json
import signal

import numpy as np
import pytest
import yaml
from helpers import ROOT
from PIL import Image

import data
import rewards
from runtime.config import InputError, known_keys, load_config

N = 10_000


@pytest.fixture(autouse=True)
def no_hang():
    def too_long(*_):
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)
    yield
    signal.alarm(0)


def texts(seed, pieces, longest=40):
    """N random texts made of these pieces and of any characters, a few of them very long."""
    rng = np.random.default_rng(seed)
    for i in range(N):
        size = int(rng.integers(0, longest)) if i % 1000 else 20_000
        some = [
            pieces[k]
            if k < len(pieces)
            else chr(
                int(
                    rng.choice(
                        [
                            rng.integers(0, 128),
                            rng.integers(0, 0xD800),
                            rng.integers(0x10000, 0x110000),
                        ]
                    )
                )
            )
            for k in rng.integers(0, len(pieces) + 4, size)
        ]
        yield "".join(some)


def test_boxes():
    found = 0
    for text in texts(
        1,
        [
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
        ],
    ):
        boxes = data.parse_boxes(text)
        found += len(boxes)
        assert all(len(box) == 4 and np.isfinite(box).all() for box in boxes)
        assert np.isfinite(rewards.soft_f1(boxes[:30], [(0.1, 0.1, 0.5, 0.5)]))
    assert found > N / 4


def test_outputs():
    valid = 0
    tags = list(data.TAGS)
    for text in texts(
        2,
        [*tags, "<think>a</think><report>b</report>", "<think>", "word ", "\n", "<", ">", "</"],
        longest=6,
    ):
        for style in ("plain", "tags", "suffix"):
            ok, thinking, answer = data.parse_output(text, "report", style)
            assert isinstance(thinking, str) and isinstance(answer, str) and (answer or not ok)
            valid += ok
    assert valid > 100


def test_labels():
    words = "no pneumothorax effusion . without may be heart enlarged normal size , but with stable lungs clear ; and opacity - 1. findings: impression:".split()
    labels = rewards.extract_labels(list(texts(3, [w + " " for w in words])))
    assert labels.shape == (N, 14) and len(np.unique(labels)) == 4


def test_configurations(tmp_path):
    """Random YAML trees, damaged copies of the default file, and YAML that Python itself chokes on."""
    rng, path, accepted = np.random.default_rng(4), tmp_path / "c.yaml", 0
    good, keys = (ROOT / "config.yaml").read_text(), list(known_keys())
    values = [
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
    broken = [
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
    for i in range(N):
        if i < len(broken):
            path.write_text(broken[i])
        elif i % 4:
            tree = {}
            for key in rng.choice(keys, 1):
                node = tree
                *parents, last = key.split(".")
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = values[rng.integers(len(values))]
            path.write_text(yaml.safe_dump(tree))
        else:
            raw = bytearray(good.encode())
            for place in rng.integers(0, len(raw), 1):
                raw[place] = rng.integers(32, 127)
            path.write_bytes(raw)
        try:
            load_config(path)
            accepted += 1
        except InputError as error:
            assert "\n" not in str(error)
    assert N / 50 < accepted < N / 2
    for text in (
        "seed=2001-99-99",
        "seed=" + "9" * 5000,
        "seed=" + "[" * 3000,
        "seed=!!bool x",
        "seed=!!timestamp foo",
        "seed=!!int ''",
    ):
        with pytest.raises(InputError):
            load_config(ROOT / "config.yaml", [text])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged files
@pytest.mark.parametrize(
    "kind, mode",
    [("PNG", "RGB"), ("JPEG", "L"), ("PNG", "I;16"), ("TIFF", "F"), ("GIF", "P"), ("BMP", "RGB")],
)
def test_images(tmp_path, kind, mode):
    """Damaged files of each kind: read or refused."""
    rng, path, file, refused = np.random.default_rng(5), tmp_path / "i", io.BytesIO(), 0
    Image.new(mode, (24, 16)).save(file, kind)
    good = file.getvalue()
    for i in range(500):
        raw = bytearray(good)
        for place in rng.integers(0, len(raw), 1 + i % 8):
            raw[place] = rng.integers(256)
        path.write_bytes(raw[: rng.integers(1, len(raw))] if i % 3 == 0 else raw)
        try:
            assert data.load_image(path).mode == "RGB"
        except InputError as error:
            refused += "\n" not in str(error)
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
        json.dumps(
            {"train": [{"id": "a", "report": "x", "image_path": ["../../../etc/passwd"]}] * 3}
        ).encode(),
    ],
)
def test_annotations(tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotation.json").write_bytes(content)
    config = load_config(ROOT / "config.yaml", ["data.source=iu_xray", f"data.path={tmp_path}"])
    with pytest.raises(InputError) as error:
        data.load_split(config, "train")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[" * 100_000,
        b"{}",
        b"3",
        b'{"id": "a", "image": "../x.png", "task": "report", "report": "b"}',
        b'{"id": {}, "image": 3, "task": [], "report": 1e999}',
        b'{"id": "a"' + b" " * 1_000_000 + b"}",
    ],
)
def test_lines(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(line + b"\n")
    config = load_config(
        ROOT / "config.yaml", ["data.source=jsonl", f"data.path={tmp_path / 'x.jsonl'}"]
    )
    with pytest.raises(InputError) as error:
        data.load_split(config, "train")
    assert "x.jsonl" in str(error.value)
