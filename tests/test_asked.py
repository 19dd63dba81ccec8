"""Questions that a dataset itself asks (llava, jsonl), and bad files of readers that crashed."""

import json

import layouts
import pytest
import torch
from helpers import load

import data
import train_sft
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


def test_a_box_that_coco_has_twice_counts_once(tmp_path):
    """And all that is to be seen still has its box: detection stays a question."""
    root = layouts.coco(tmp_path)
    path = root / "annotations" / "instances_train2017.json"
    once = data.load_split(load("data.source=coco", f"data.path={root}"), "train")
    tree = json.loads(path.read_text())
    tree["annotations"].append({**tree["annotations"][0], "id": 99})
    path.write_text(json.dumps(tree))
    assert data.load_split(load("data.source=coco", f"data.path={root}"), "train") == once
    assert any(e.kind == "detection" for e in once)


def test_a_wrong_number_in_coco_leaves_out_its_box_alone(tmp_path, capsys):
    root = layouts.coco(tmp_path)
    path = root / "annotations" / "instances_train2017.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["bbox"] = [1, 2, "x", 4]
    path.write_text(json.dumps(tree))
    settings = ["data.source=coco", f"data.path={root}"]
    with pytest.raises(InputError, match=r"train2017\.json, image 0: box .*nan"):
        data.load_split(load(*settings), "train")
    examples = data.load_split(load(*settings, "data.on_error=skip"), "train")
    answers = {e.id: e.answer for e in examples if e.task == "classification"}
    # It was seen, but not all that is there has a box.
    assert answers["c0.png-list"] == "active tuberculosis."
    assert {e.id for e in examples if e.kind == "detection"} == {"c1.png-detect", "c2.png-detect"}
    assert "skipped 1" in capsys.readouterr().err


def test_boxes_that_rounding_put_outside_are_not_counted(tmp_path, capsys):
    assert boxes_of(tmp_path, [[0.5, -0.004, 1.004, 0.4]]) == [((0.5, 0, 1, 0.4),)]
    assert "clipped" not in capsys.readouterr().err


# ------------------------------------------------------------------------------- conversations


def conversations(tmp_path, *turns, images=("a.png",), settings=()):
    """The examples of one conversation, whose questions and answers alternate."""
    speakers = ["human", "gpt"] * (len(turns) // 2)
    row = {"image": list(images), "conversations": layouts.conversation(*zip(speakers, turns))}
    return load_rows("llava", tmp_path, [row], *settings)


@pytest.mark.parametrize(
    "question",
    [
        "<image>\nDocument the findings.",
        "<image>\nPlease look at this image.\nThen write a report.",
        "<image>\nPlease offer a detailed analysis based on this image.",
        "<image>\nOutline a radiology report for this X-ray.",
        "<image>\nDescribe this chest X-ray.",
        "<image>\nAnalyze the image and report\nwhat you find.",
        "Can you write a short report?\n<image>",
        "What are the key findings here?",
        *data.QUESTIONS["report"],
    ],
)
def test_questions_that_ask_for_a_report(tmp_path, question):
    assert conversations(tmp_path, question, "Clear.")[0].task == "report"


@pytest.mark.parametrize(
    "question",
    [
        "Do the findings matter?",
        "Is there a report?",
        "What is it?",
        "Where are the findings located?",
        "Can you report the locations of foreign objects?",
        "Based on the findings, is the heart enlarged?",
        "Have the findings changed?",
        "Can you describe the lungs?",
    ],
)
def test_questions_that_ask_for_no_report(tmp_path, question):
    assert conversations(tmp_path, question, "Yes.")[0].task == "classification"


# ------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    "source, row",
    [("jsonl", REPORT | {"report": "Clear \ud800."}), ("jsonl", REPORT | {"id": "\udcff"})],
)
def test_half_a_character_is_skipped_and_counted(tmp_path, capsys, source, row):
    (example,) = load_rows(source, tmp_path, [REPORT | {"id": 7}, row], "data.on_error=skip")
    assert example.id == "7"
    assert "skipped 1" in capsys.readouterr().err


def test_a_list_with_half_a_character_is_no_json(tmp_path):
    turns = layouts.conversation(("human", "Where?"), ("gpt", "\ud800"))
    with pytest.raises(InputError, match="not valid JSON"):
        load_rows("llava", tmp_path, [{"id": 1, "image": "a.png", "conversations": turns}])


@pytest.mark.parametrize(
    "answer, image, message",
    [
        (None, "a.png", "a value that is no text"),
        ("[900, 10, 990, 20]", "b.png", "b.png: No such file"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, answer, image, message):
    turns = layouts.conversation(("human", "Where?"), ("gpt", answer))
    with pytest.raises(InputError, match=message) as error:
        load_rows("llava", tmp_path, [{"id": 1, "image": image, "conversations": turns}])
    assert ("expected an object" in str(error.value)) == (answer is None)


def test_numbers_beyond_all_bounds_are_no_box(tmp_path):
    answer = "[" + "9" * 400 + ", 1, 2, 3]"
    (example,) = conversations(tmp_path, "Where?", answer)
    assert example.answer == answer
    assert not example.boxes


@pytest.mark.parametrize("source", ["jsonl", "llava"])
def test_views_of_what_has_none_are_refused(tmp_path, source):
    with pytest.raises(InputError, match=f"{source} does not say what is frontal"):
        load_rows(source, tmp_path, [REPORT], "data.views=frontal")


# ------------------------------------------------------------------------------- units of boxes


def test_all_splits_have_the_same_unit(tmp_path):
    """By itself, the validation file could hold thousandths as well as pixels."""
    layouts.picture(tmp_path / "a.png", size=(512, 512))
    for split, answer in (("train", "[0, 0, 900, 900]"), ("val", "[100, 100, 400, 450]")):
        turns = layouts.conversation(("human", "Where?"), ("gpt", answer))
        row = {"id": split, "image": "a.png", "conversations": turns}
        layouts.write(tmp_path / f"{split}.json", json.dumps([row]))
    config = load("data.source=llava", f"data.path={tmp_path}")
    (example,) = data.load_split(config, "val")
    assert example.boxes == ((0.1, 0.1, 0.4, 0.45),)


@pytest.mark.parametrize(
    "answer, text, box",
    [
        # The image has 40 x 32 pixels.
        ("At [10, 8, 30, 24].", "At [0.25, 0.25, 0.75, 0.75].", (0.25, 0.25, 0.75, 0.75)),
        ("At [310, 450, 780, 830].", "At [0.31, 0.45, 0.78, 0.83].", (0.31, 0.45, 0.78, 0.83)),
        ("At [0.1, 0.2, 0.3, 0.456].", "At [0.1, 0.2, 0.3, 0.456].", (0.1, 0.2, 0.3, 0.456)),
    ],
    ids=["pixels", "thousandths", "fractions"],
)
def test_boxes_of_conversations_become_fractions(tmp_path, capsys, answer, text, box):
    where, after = conversations(tmp_path, "Where?", answer, "Is it big?", "No.")
    assert where.answer == text
    assert where.boxes == (box,)
    assert where.task == "grounding"
    assert after.history == (("Where?", text),)
    assert ("which are read as" in capsys.readouterr().err) == (text != answer)


@pytest.mark.parametrize(
    "answers, boxes",
    [
        # A number above 1000 can be no thousandth: all are pixels.
        (
            ["[100, 150, 200, 300]", "[1100, 0, 1600, 1500]"],
            [(0.05, 0.1, 0.1, 0.2), (0.55, 0, 0.8, 1)],
        ),
        # Thousandths may be inside a large image, too.
        (["[100, 150, 200, 300]", "[0, 0, 999, 1000]"], [(0.1, 0.15, 0.2, 0.3), (0, 0, 0.999, 1)]),
    ],
)
def test_a_file_has_one_unit(tmp_path, answers, boxes):
    layouts.picture(tmp_path / "large.png", size=(2000, 1500))
    rows = []
    for n, answer in enumerate(answers):
        turns = layouts.conversation(("human", "Where?"), ("gpt", answer))
        rows.append({"id": n, "image": "large.png", "conversations": turns})
    assert [e.boxes for e in load_rows("llava", tmp_path, rows)] == [(box,) for box in boxes]


@pytest.mark.parametrize(
    "box, text, boxes, said",
    [
        ("[0.5, 0.6, 1.5, 0.75]", "[0.50, 0.60, 1.00, 0.75]", [(0.5, 0.6, 1, 0.75)], "clipped 1"),
        ("[-0.1, 0.6, 0.5, 0.75]", "[0.00, 0.60, 0.50, 0.75]", [(0, 0.6, 0.5, 0.75)], "clipped 1"),
        # Two decimals may leave no width.
        ("[0.5, 0.6, 0.5, 0.75]", "[0.5, 0.6, 0.5, 0.75]", [], "skipped 1"),
    ],
    ids=["right of the image", "left of it", "without width"],
)
def test_a_wrong_box_of_a_conversation_leaves_the_others(tmp_path, capsys, box, text, boxes, said):
    turns = "Where?", f"At {box} and [0.1, 0.2, 0.3, 0.4]."
    with pytest.raises(InputError, match="inside the image"):
        conversations(tmp_path, *turns)
    (example,) = conversations(tmp_path, *turns, settings=["data.on_error=skip"])
    assert example.answer == f"At {text} and [0.1, 0.2, 0.3, 0.4]."
    assert example.boxes == (*boxes, (0.1, 0.2, 0.3, 0.4))
    assert said in capsys.readouterr().err


def test_boxes_in_pixels_of_an_unreadable_image_are_said(tmp_path):
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"train\.json, \[0\].*b\.png: not a readable image"):
        conversations(tmp_path, "Where?", "At [10, 8, 30, 24].", images=["b.png"])


# ------------------------------------------------------------------------------- images of turns

TURNS = ("<image>\nWrite a report.", "Clear.", "<image>\nAnd here?", "Edema.", "Sure?", "Yes.")


@pytest.fixture
def later(tmp_path):
    """A conversation that shows a second image in its second turn."""
    layouts.picture(tmp_path / "b.png")
    return conversations(tmp_path, *TURNS, images=["a.png", "b.png"])


def test_images_of_later_turns_are_not_seen_before(later):
    seen = [[image[-5:] for image in example.images] for example in later]
    assert seen == [["a.png"], ["a.png", "b.png"], ["a.png", "b.png"]]


def test_images_of_later_turns_stand_in_their_turn(later, policy):
    for example, question in zip(later, ("Write a report.", "And here?", "Sure?")):
        text = policy.chat(example)
        assert "<image>" not in text
        assert text.count("<|image_pad|>") == len(example.images)
        assert text.rindex(question) > text.rindex("<|image_pad|>")
    assert text.index("Clear.") < text.rindex("<|image_pad|>") < text.index("And here?")


def test_more_markers_than_images_are_named(tmp_path):
    with pytest.raises(InputError, match="more <image> than images"):
        conversations(tmp_path, *TURNS, "<image>", "x")


def test_conversations_about_the_same_images_keep_their_turns(tmp_path, policy):
    """What they share in supervised training ends with the last image."""
    layouts.picture(tmp_path / "b.png")
    rows = []
    for n, first in enumerate(("Clear.", "An effusion.")):
        texts = [TURNS[0], first, *TURNS[2:]]
        turns = layouts.conversation(*zip(["human", "gpt"] * 3, texts))
        rows.append({"id": n, "image": ["a.png", "b.png"], "conversations": turns})
    groups = data.by_study(load_rows("llava", tmp_path, rows))
    # The first turns see one image, whatever follows.
    assert [[e.id for e in group] for group in groups] == [
        ["0-0", "1-0"],
        ["0-1", "0-2"],
        ["1-1", "1-2"],
    ]
    for group, study in zip(groups, train_sft.encode_studies(policy, groups)):
        for example, row in zip(group, study.rows):
            ids = torch.cat([study.prompt.input_ids[0], row])
            whole = torch.cat([policy.encode(example).input_ids[0], policy.encode_target(example)])
            assert ids.equal(whole)
