"""Questions that a dataset itself asks (llava, jsonl), and bad files of readers that crashed."""

import json

import layouts
import pytest
from helpers import load

import data
from runtime.config import InputError


def load_rows(source, root, rows, *overrides):
    """The training examples of these rows, which are those of every split, too."""
    layouts.picture(root / "a.png")
    for split in ("train", "val", "test"):
        if source == "jsonl":
            layouts.write(root / f"{split}.jsonl", "\n".join(map(json.dumps, rows)))
        else:
            layouts.write(root / f"{split}.json", json.dumps(rows))
    return data.load_split(load(f"data.source={source}", f"data.path={root}", *overrides), "train")


REPORT = {"id": 1, "images": ["a.png"], "report": "Two  lines.\n Clear."}
BAD_BOX = {"id": 2, "images": ["a.png"], "phrase": "a nodule", "boxes": [[0.5, 0.1, 0.2, 0.9]]}


def test_reports_of_json_lines_are_one_line(tmp_path):
    (example,) = load_rows("jsonl", tmp_path, [REPORT])
    assert example.answer == "Two lines. Clear."


def test_boxes_that_nobody_asks_for_stop_no_run(tmp_path):
    (example,) = load_rows("jsonl", tmp_path, [REPORT, BAD_BOX], "data.tasks=[report]")
    assert example.id == "1"
    with pytest.raises(InputError, match="inside the image"):
        load_rows("jsonl", tmp_path, [REPORT, BAD_BOX])


@pytest.mark.parametrize(
    "answer, boxes",
    [
        # Two decimals may leave no width.
        ("At [0.50, 0.60, 0.50, 0.75].", ((0.5, 0.6, 0.5, 0.75),)),
        ("At [0.50, 0.60, 1.50, 0.75].", ()),
        ("At [-0.1, 0.60, 0.50, 0.75].", ()),
    ],
)
def test_answers_of_conversations_are_kept(tmp_path, answer, boxes):
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": answer}]
    (example,) = load_rows("llava", tmp_path, [{"image": "a.png", "conversations": turns}])
    assert example.answer == answer
    assert example.boxes == boxes
    assert example.task == ("grounding" if boxes else "classification")


def test_a_coco_file_that_is_no_json_is_said_once(tmp_path):
    path = layouts.coco(tmp_path) / "annotations" / "instances_train2017.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"^[^ ]*train2017\.json: not valid JSON"):
        data.load_split(load("data.source=coco", f"data.path={tmp_path}"), "train")


def test_an_unknown_encoding_is_named(tmp_path):
    path = layouts.openi(tmp_path) / "ecgen-radiology" / "1.xml"
    path.write_text(path.read_text().replace("utf-8", "utf-9"))
    with pytest.raises(InputError, match=r"1\.xml: not valid XML"):
        data.load_split(load("data.source=iu_xray", f"data.path={tmp_path}"), "train")


def test_a_size_that_is_no_number_is_named(tmp_path):
    path = layouts.vindr_kaggle(tmp_path) / "train_meta.csv"
    path.write_text(path.read_text().replace("200", "?", 1))
    with pytest.raises(InputError, match=r"train_meta\.csv, image v0: expected numbers"):
        data.load_split(load("data.source=vindr_cxr", f"data.path={tmp_path}"), "train")
