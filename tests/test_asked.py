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


# ------------------------------------------------------------------------------- single boxes


def boxes_of(tmp_path, boxes, *overrides):
    row = {"id": 2, "images": ["a.png"], "phrase": "a nodule", "boxes": boxes}
    examples = load_rows("jsonl", tmp_path, [REPORT, row], *overrides)
    return [e.boxes for e in examples if e.task == "grounding"]


GOOD = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    "bad",
    [[0.5, 0.1, 0.2, 0.9], [0.5, 0.5, 0.5, 0.9], [1.2, 0.1, 1.4, 0.2], [0.1, 0.2], ["nan"] * 4],
    ids=["swapped", "without width", "outside", "two numbers", "no numbers"],
)
def test_a_box_that_is_none_is_left_out_and_counted(tmp_path, capsys, bad):
    assert boxes_of(tmp_path, [bad, GOOD], "data.on_error=skip") == [(tuple(GOOD),)]
    assert "left out" in capsys.readouterr().err


def test_a_box_that_reaches_outside_is_clipped_and_counted(tmp_path, capsys):
    found = boxes_of(tmp_path, [[0.8, -0.1, 1.3, 0.4], GOOD], "data.on_error=skip")
    assert found == [((0.8, 0, 1, 0.4), tuple(GOOD))]
    assert "clipped" in capsys.readouterr().err


def test_a_question_without_a_box_left_is_not_asked(tmp_path):
    assert boxes_of(tmp_path, [[0.5, 0.1, 0.2, 0.9]], "data.on_error=skip") == []


def test_nothing_there_is_still_an_answer(tmp_path):
    assert boxes_of(tmp_path, [], "data.on_error=skip") == [()]


@pytest.mark.parametrize("bad", [[0.5, 0.1, 0.2, 0.9], [0.8, 0.1, 1.3, 0.4]])
def test_a_wrong_box_stops_a_run_that_is_to_stop(tmp_path, bad):
    with pytest.raises(InputError, match="inside the image"):
        boxes_of(tmp_path, [bad, GOOD])


def test_a_wrong_number_in_coco_leaves_out_its_box_alone(tmp_path, capsys):
    root = layouts.coco(tmp_path)
    path = root / "annotations" / "instances_train2017.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["bbox"] = [1, 2, "x", 4]
    path.write_text(json.dumps(tree))
    settings = ["data.source=coco", f"data.path={root}"]
    with pytest.raises(InputError, match="bbox"):
        data.load_split(load(*settings), "train")
    assert data.load_split(load(*settings, "data.on_error=skip"), "train")
    assert "bbox" in capsys.readouterr().err


# ------------------------------------------------------------------------------- conversations


def conversation(tmp_path, question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return load_rows("llava", tmp_path, [{"image": "a.png", "conversations": turns}])


@pytest.mark.parametrize(
    "question",
    [
        "<image>\nDocument the findings.",
        "<image>\nPlease look at this image.\nThen write a report.",
        "<image>\nPlease offer a detailed analysis based on this image.",
        "<image>\nOutline a radiology report for this X-ray.",
    ],
)
def test_questions_that_ask_for_a_report(tmp_path, question):
    assert conversation(tmp_path, question, "Clear.")[0].task == "report"


@pytest.mark.parametrize(
    "question", ["Do the findings matter?", "Is there a report?", "What is it?"]
)
def test_questions_that_ask_for_no_report(tmp_path, question):
    assert conversation(tmp_path, question, "Yes.")[0].task == "classification"


@pytest.mark.parametrize("answer", ["At [310, 450, 780, 830].", "[12.5, 30.0, 45.0, 61.0]"])
def test_boxes_in_other_units_are_not_taken_for_text(tmp_path, answer):
    with pytest.raises(InputError, match="pixels or thousandths"):
        conversation(tmp_path, "Where?", answer)
