"""tools/write_phantoms.py: phantoms on disk are read as IU X-Ray, and teach the tokenizer."""

import layouts
import numpy as np
import pytest
from helpers import load
from PIL import Image

import data
from model import load_policy
from readers.phantom import SPLIT_START, phantom
from runtime.config import InputError
from tools.write_phantoms import main as write_phantoms_main
from tools.write_phantoms import write_phantoms

SIZES = {"train": 3, "val": 1, "test": 2}


def test_written_phantoms_are_read_as_iu_xray(tmp_path):
    write_phantoms(tmp_path, SIZES)
    config = load(f"data.path={tmp_path}", config="configs/iu_xray.yaml")
    patients = set()
    for split, size in SIZES.items():
        examples = data.load_split(config, split)
        assert len(examples) == size
        patients |= {example.patient for example in examples}
        for n, example in enumerate(examples):
            study = phantom(0, SPLIT_START[split] + n)
            assert example.answer == study.report
            (path,) = example.images
            assert np.array_equal(np.asarray(Image.open(path)), np.asarray(study.image))
    assert len(patients) == sum(SIZES.values())


def test_the_tiny_tokenizer_knows_the_words_of_its_data(tmp_path):
    rows = [
        {"id": f"CXR{n}", "report": "Situs inversus totalis.", "image_path": []} for n in range(9)
    ]
    for row in rows:
        row["image_path"] = [f"{row['id']}/0.png"]
        layouts.picture(tmp_path / "images" / row["image_path"][0], "RGB")
    tree = {"train": rows[:6], "val": rows[6:7], "test": rows[7:]}
    layouts.write_json(tmp_path / "annotation.json", tree)

    own = load(f"data.path={tmp_path}", config="configs/iu_xray.yaml")
    text = "Situs inversus totalis."
    lengths = []
    for config in (own, load()):
        tokenizer = load_policy(config, "tiny", weights=False).processor.tokenizer
        assert tokenizer.decode(tokenizer.encode(text)) == text
        lengths.append(len(tokenizer.encode(text)))
    assert lengths[0] == 4  # three words and the full stop
    assert lengths[1] > 8


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--train", "-1"], "at least one study"), (["--val", "0"], "at least one study")],
)
def test_impossible_sizes_are_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("sys.argv", ["write_phantoms", str(tmp_path), *words])
    with pytest.raises(InputError, match=message):
        write_phantoms_main()


def test_no_data_are_replaced(tmp_path):
    (tmp_path / "annotation.json").write_text("mine")
    with pytest.raises(InputError, match=r"annotation\.json is there already"):
        write_phantoms(tmp_path, SIZES)


def test_a_folder_that_cannot_be_is_named(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr("sys.argv", ["write_phantoms", str(path), "--train", "1"])
    with pytest.raises(InputError, match=str(path)):
        write_phantoms_main()
