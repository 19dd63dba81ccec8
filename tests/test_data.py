"""Configuration, image files, IU X-Ray and JSON lines: what is read, and what bad input says."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from helpers import ROOT, SMALL, load
from layouts import kaggle, picture, r2gen, write, write_json

import data
import rewards
from data import boxes_text, load_split, parse_boxes
from readers import study
from runtime.config import InputError, config_text, load_config

# ------------------------------------------------------------------------------- configuration


def test_overrides_and_types(tmp_path):
    text = "grpo: {lr: 1e-4, kl_coef: 0}\nrewards: {report: {mccs: 1}}\n"
    path = write(tmp_path / "c.yaml", text)
    overrides = ["grpo.steps=7", "rewards.report.gleu=0.5", "data.thinking=true", "out=5"]
    config = load_config(path, [*overrides, "grpo.lr=2e-6"])
    assert config.grpo.lr == 2e-6
    assert config.grpo.kl_coef == 0.0
    assert config.grpo.steps == 7
    assert config.data.thinking is True
    assert config.rewards.report == {"mccs": 1.0, "gleu": 0.5}
    assert config.out == "5"
    # Saved and read back.
    assert load_config(write(tmp_path / "d.yaml", config_text(config))) == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("grpo.kl_coeff=0", "grpo.kl_coef"),
        ("kl_coef=0", "kl_coef"),
        ("grpo.steps=ten", "grpo.steps: expected a whole number"),
        ("grpo.steps=0", "grpo.steps: expected at least 1"),
        ("grpo.steps=1.5", "whole number"),
        ("grpo.lr=0", "grpo.lr: expected more than 0"),
        ("grpo.lr=.nan", "grpo.lr"),
        ("grpo.adv_norm=groups", "one of group, none, batch"),
        ("data.thinking=1", "true or false"),
        ("rewards.mccs_margin=1", "rewards.mccs_margin"),
        ("rewards.report.mccs=high", "rewards.report.mccs"),
        ("data.tasks=[reports]", "data.tasks"),
        ("grpo.mini_batch=999", "grpo.mini_batch"),
        ("grpo.steps", "expected key=value"),
        ("grpo.kl_coef=-1", "at least 0"),
        ("grpo=3", "grpo"),
        ("data.report_share=1.5", "at most 1"),
        ("grpo.lora_rank=-1", "at least 0"),
        # A completion is compared with the others of its group.
        ("out=", "out: expected a folder"),
        ("grpo.group_size=1", "grpo.group_size: expected at least 2"),
        ("grpo.freeze=[tower]", "grpo.freeze: expected one of vision, projector, got 'tower'"),
        ("sft.freeze=vision", "sft.freeze: expected a list"),
        ("sft.train_vision=false", "unknown key 'sft.train_vision'"),
        ("seed=99999999999999999999", "seed: expected at most"),
        ("rewards.report={}", "rewards.report: expected a reward"),
        ("grpo.micro_batch=4", "grpo.micro_batch is gone: set grpo.micro_tokens"),
    ],
)
def test_bad_overrides_name_the_key(override, message):
    with pytest.raises(InputError) as error:
        load(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["grpo: [", "- a", "grpo: 3", "groo: {steps: 3}", "grpo:\n  stepz: 3\n", "\x00"]
)
def test_bad_files_name_the_file(tmp_path, text):
    with pytest.raises(InputError, match=r"c\.yaml") as error:
        load_config(write(tmp_path / "c.yaml", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["grpo: {steps: 3}\nseed: 1\ngrpo: {lr: 1e-4}", "grpo:\n  steps: 3\n  'steps': 4"]
)
def test_a_key_that_stands_twice_is_not_dropped(tmp_path, text):
    with pytest.raises(InputError, match=r"c\.yaml: .*'(grpo|steps)' stands there twice"):
        load_config(write(tmp_path / "c.yaml", text))
    with pytest.raises(InputError, match="not valid YAML"):
        load("rewards.report={mccs: 1, mccs: 0}")


def test_a_key_may_stand_over_that_of_an_anchor(tmp_path):
    text = "sft: &both {lr: 1e-4}\ngrpo: {<<: *both, lr: 1e-5}"
    config = load_config(write(tmp_path / "c.yaml", text))
    assert (config.sft.lr, config.grpo.lr) == (1e-4, 1e-5)


def test_missing_config_file(tmp_path):
    with pytest.raises(InputError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "path", [ROOT / "config.yaml", *(ROOT / "configs").glob("*.yaml")], ids=lambda path: path.stem
)
def test_shipped_configs_load_with_known_rewards(path):
    config = load_config(path)
    if path.stem == "radvlm_grpo_report":
        # Of a library whose weights have to be fetched: tests/test_radeval.py.
        assert config.rewards.report.pop("radeval:radcliq") == -1
    rewards.check_rewards(config.rewards)
    assert yaml.safe_load(path.read_text())


def test_labels_agree():
    assert data.LABELS == rewards.LABELS
    assert data.LABELS == study.LABELS


# ------------------------------------------------------------------------------- order


def test_every_epoch_sees_every_example_once():
    n, count, epochs = 23, 5, 5
    seen = []
    for step in range(23):
        seen += data.indices(n, count, step, 3, "sft")
    for k in range(epochs):
        assert sorted(seen[k * n : (k + 1) * n]) == list(range(n))
    # Epochs have orders of their own, and so have stages.
    assert seen[:n] != seen[n : 2 * n]
    other = []
    for step in range(epochs):
        other += data.indices(n, count, step, 3, "grpo")
    assert seen[:n] != other[:n]


@pytest.mark.parametrize("share, reports", [(0.5, 4), (1.0, 8), (0.25, 2)])
def test_batches_mix_tasks_as_told(examples, share, reports):
    config = load("grpo.prompts=8", f"data.report_share={share}")
    tasks = [e.task for e in data.grpo_batch(examples, 3, config)]
    assert tasks.count("report") == reports
    assert tasks.count("grounding") == 8 - reports


@pytest.mark.parametrize("task", ["report", "grounding"])
def test_batches_of_data_with_one_task_are_full(examples, task):
    only = [e for e in examples if e.task == task]
    config = load("grpo.prompts=8", "data.report_share=0.5")
    assert [e.task for e in data.grpo_batch(only, 0, config)] == [task] * 8


def few(examples, count):
    reports = [e for e in examples if e.task == "report"]
    return reports[:count], load("grpo.prompts=8")


def test_an_example_that_comes_again_in_a_step_has_another_id(examples):
    reports, config = few(examples, 3)
    batch = data.grpo_batch(reports, 0, config)
    assert len({e.id for e in batch}) == 8


def test_an_example_that_comes_again_is_otherwise_the_same(examples):
    reports, config = few(examples, 3)
    batch = data.grpo_batch(reports, 0, config)
    assert {e.images for e in batch} == {e.images for e in reports}


def test_examples_that_come_once_keep_their_ids(examples):
    reports, config = few(examples, 8)
    assert {e.id for e in data.grpo_batch(reports, 0, config)} == {e.id for e in reports}


def test_groups_of_a_repeated_example_differ(policy, examples):
    reports, config = few(examples, 1)
    first, second = policy.sample(data.grpo_batch(reports, 0, config)[:2], 4, 8, 1.0)
    assert first.texts != second.texts


@pytest.mark.parametrize("count", [3, 8])
def test_few_examples_are_said_once_before_the_first_step(examples, capsys, count):
    data.say_repeats(*few(examples, count))
    said = "only 3 examples for 8 of grpo.prompts=8" in capsys.readouterr().err
    assert said == (count == 3)


def test_grpo_needs_reports_or_boxes(examples):
    asked = [e for e in examples if e.task == "classification"]
    assert asked
    with pytest.raises(InputError, match="neither reports nor boxes"):
        data.say_repeats(asked, load())
    with pytest.raises(InputError, match="GRPO needs report or grounding examples"):
        data.check_tasks(load("data.tasks=[classification]"))
    data.check_tasks(load("data.tasks=[classification,anatomy]"))


# ------------------------------------------------------------------------------- output formats


def test_box_text_is_the_papers_format():
    boxes = [(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.75, 1.0), (0, 0, 1, 1)]
    assert boxes_text(boxes[:1]) == "[0.10, 0.20, 0.30, 0.40]"
    one, two, three = (boxes_text([box]) for box in boxes)
    assert boxes_text(boxes) == f"{one}, {two} and {three}"
    assert boxes_text([]) == data.NOTHING_THERE
    assert parse_boxes(boxes_text(boxes)) == boxes
    assert parse_boxes(boxes_text([])) == []


@pytest.mark.parametrize("style", ["plain", "tags", "suffix"])
@pytest.mark.parametrize("task", ["report", "grounding"])
def test_targets_satisfy_the_format_reward(examples, style, task):
    example = dataclasses.replace(next(e for e in examples if e.task == task), style=style)
    valid, thinking, answer = data.parse_output(data.target_text(example), task, style)
    assert valid
    assert answer == example.answer
    assert thinking == ("" if style == "plain" else example.thinking)
    assert data.prompt_text(example).endswith(" /think") == (style == "suffix")


def test_an_empty_pair_before_a_plain_answer_is_no_thinking():
    text = "<think>\n\n</think>\n\nNormal."
    assert data.parse_output(text, "report", "plain") == (True, "", "Normal.")


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("tags", "<think> </think><report>Normal.</report>"),
        ("suffix", " </think>Normal."),
        ("suffix", "<think>\n</think>Normal."),
    ],
)
def test_an_empty_pair_is_not_the_format_of_thinking(style, text):
    assert data.parse_output(text, "report", style) == (False, "", "Normal.")


def test_thinking_may_open_the_pair_where_only_its_end_is_asked_for():
    wanted = (True, "Clear lungs.", "Normal.")
    assert data.parse_output("Clear lungs.</think>Normal.", "report", "suffix") == wanted
    assert data.parse_output("<think>Clear lungs.</think>Normal.", "report", "suffix") == wanted


@pytest.mark.parametrize("style", ["plain", "tags", "suffix"])
def test_a_target_after_an_opened_tag_reads_as_the_whole_target(examples, style):
    example = dataclasses.replace(examples[0], style=style)
    rest = data.after_opened_think(data.target_text(example))
    assert not rest.startswith("<think>")
    whole = data.parse_output(data.target_text(example), example.task, style)
    assert data.parse_output(f"<think>{rest}", example.task, style) == whole


# ------------------------------------------------------------------------------- starts without SFT


def questions(*overrides):
    examples = data.load_split(load(*SMALL, *overrides), "test")
    boxes = [e.question for e in examples if e.task == "grounding"]
    reports = [e.question for e in examples if e.task == "report"]
    return boxes, reports


def test_a_start_without_sft_of_ours_is_told_the_form_of_boxes(tmp_path):
    boxes, _ = questions("grpo.init=base", f"model.path={tmp_path}")
    assert all(data.BOX_FORM in question for question in boxes)


def test_questions_for_reports_stay_as_they_are(tmp_path):
    _, reports = questions("grpo.init=base", f"model.path={tmp_path}")
    assert reports == questions()[1]


def test_what_our_sft_has_made_is_not_told(tmp_path):
    (tmp_path / "training_state.pt").touch()
    boxes, _ = questions("grpo.init=base", f"model.path={tmp_path}")
    assert boxes == questions("grpo.init=auto")[0]
    assert not any(data.BOX_FORM in question for question in boxes)


# ------------------------------------------------------------------------------- images


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "1", "P"])
def test_image_modes(tmp_path, mode):
    image = data.load_image(picture(tmp_path / "a.png", mode))
    assert image.mode == "RGB"
    assert image.size == (40, 32)


def test_16_bits_are_not_clipped_to_white(tmp_path):
    pixels = np.asarray(data.load_image(picture(tmp_path / "a.png", "I;16")))
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert len(np.unique(pixels)) > 100


@pytest.mark.parametrize("name", ["cut", "empty", "text", "absent"])
def test_unreadable_images_are_named(tmp_path, name):
    whole = picture(tmp_path / "whole.png", size=(200, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    write(tmp_path / "text.png", "not an image")
    with pytest.raises(InputError, match=rf"{name}\.png") as error:
        data.load_image(tmp_path / f"{name}.png")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- IU X-Ray


def iu(root, *overrides):
    return load("data.source=iu_xray", f"data.path={root}", *overrides)


def test_r2gen_layout(tmp_path):
    examples = load_split(iu(r2gen(tmp_path)), "train")
    assert [e.id for e in examples] == ["CXR0", "CXR1"]
    assert examples[1].answer == "The heart is normal . Study 1 ."
    assert [i.size for i in data.open_images(examples[0])] == [(40, 32)] * 2


def test_r2gens_frontal_view_is_the_first(tmp_path):
    (example,) = load_split(iu(r2gen(tmp_path), "data.views=frontal"), "test")
    (image,) = example.images
    assert image.endswith("CXR3/0.png")


def test_kaggle_layout(tmp_path):
    config = iu(kaggle(tmp_path))
    splits = [load_split(config, split) for split in ("train", "val", "test")]
    assert [len(part) for part in splits] == [7, 1, 2]
    everyone = {e.id: e for part in splits for e in part}
    # Disjoint, and the same for ever.
    assert len(everyone) == 10
    assert [e.id for part in splits[1:] for e in part] == ["3", "1", "2"]
    assert everyone["2"].answer == "Clear, study 2."
    assert everyone["3"].answer == 'No "acute" disease.'
    views = [image.rsplit("_")[-1] for image in everyone["2"].images]
    assert views == ["Frontal.dcm.png", "Lateral.dcm.png"]


def test_kaggles_frontal_view(tmp_path):
    (example,) = load_split(iu(kaggle(tmp_path), "data.views=frontal"), "val")
    (image,) = example.images
    assert image.endswith("Frontal.dcm.png")


def break_annotation(name, root):
    path = root / "annotation.json"
    tree = json.loads(path.read_text())
    if name == "report":
        tree["train"][0]["report"] = "  "
    if name == "image":
        (root / "images" / "CXR0" / "1.png").unlink()
    if name == "row":
        tree["train"][0] = ["CXR0"]
    if name == "split":
        tree = {"training": []}
    write_json(path, tree)
    if name == "json":
        write(path, path.read_text()[:-9])


@pytest.mark.parametrize(
    "name, message",
    [("report", "report is empty"), ("image", r"CXR0/1\.png"), ("row", r"train\[0\]")],
)
def test_a_bad_study_stops_or_is_skipped_and_counted(tmp_path, capsys, name, message):
    break_annotation(name, r2gen(tmp_path))
    with pytest.raises(InputError, match=message):
        load_split(iu(tmp_path), "train")
    (example,) = load_split(iu(tmp_path, "data.on_error=skip"), "train")
    assert example.id == "CXR1"
    assert "skipped 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["json", "split"])
def test_a_bad_annotation_file(tmp_path, name):
    break_annotation(name, r2gen(tmp_path))
    with pytest.raises(InputError, match=r"annotation\.json"):
        load_split(iu(tmp_path), "train")


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_split(iu(tmp_path / "absent"), "train")
    with pytest.raises(InputError, match=r"expected annotation\.json"):
        load_split(iu(tmp_path), "train")


@pytest.mark.parametrize("line, message", [("5,x", "line"), ('6,"a', "CSV")])
def test_a_bad_csv_row(tmp_path, line, message):
    with open(kaggle(tmp_path) / "indiana_reports.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=rf"indiana_reports\.csv.*{message}"):
        load_split(iu(tmp_path), "train")


def test_a_csv_without_a_column(tmp_path):
    path = kaggle(tmp_path) / "indiana_reports.csv"
    path.write_text(path.read_text().replace("findings", "finding"))
    with pytest.raises(InputError, match="no column 'findings'"):
        load_split(iu(tmp_path), "train")


# ------------------------------------------------------------------------------- JSON lines

GOOD = {
    "id": 1,
    "images": ["a.png"],
    "report": "Clear lungs.",
    "patient": "p",
    "thinking": "Heart: normal.",
}
BOXES = {"id": 2, "images": ["a.png"], "phrase": "the nodule", "boxes": [[0.1, 0.2, 0.3, 0.4]]}


def own(root, *rows):
    """A configuration of JSON lines whose training split has these rows, dicts or text."""
    picture(root / "a.png")
    held = {"val": [{**GOOD, "patient": "q"}], "test": [{**GOOD, "patient": "r"}]}
    for split, some in {"train": rows, **held}.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in some]
        write(root / f"{split}.jsonl", "\n".join(lines) + "\n")
    return load("data.source=jsonl", f"data.path={root}")


def test_jsonl(tmp_path):
    report, grounding = load_split(own(tmp_path, GOOD, BOXES), "train")
    assert report.task == "report"
    assert report.patient == f"{tmp_path}/p"
    assert report.thinking == "Heart: normal."
    assert grounding.task == "grounding"
    assert grounding.answer == "[0.10, 0.20, 0.30, 0.40]"
    assert grounding.boxes == ((0.1, 0.2, 0.3, 0.4),)
    assert grounding.label == "the nodule"


def test_null_is_nothing_and_patient_0_is_one(tmp_path):
    """As pandas writes a missing cell; as numbers count from 0."""
    rows = [{**GOOD, "patient": 0}]
    for n, missing in enumerate((None, float("nan"), ""), 10):
        nothing = dict.fromkeys(("patient", "thinking", "question"), missing)
        rows.append({**GOOD, "id": n, **nothing})
    first, *others = load_split(own(tmp_path, *rows), "train")
    assert first.patient == f"{tmp_path}/0"
    for example in others:
        assert (example.patient, example.thinking) == (f"{tmp_path}/a.png", "")
        assert example.question in data.QUESTIONS["report"]


def test_thinking_has_no_tags(tmp_path):
    with pytest.raises(InputError, match=r"line 1: .*tags are added"):
        load_split(own(tmp_path, {**GOOD, "thinking": "<think>Heart.</think>"}), "train")


def test_lines_with_a_question_keep_it(tmp_path):
    rows = [{**row, "question": "Is {it} so?"} for row in (GOOD, BOXES)]
    for example in load_split(own(tmp_path, *rows), "train"):
        assert example.question == "Is {it} so?"


def test_lines_without_a_question_get_the_usual_wordings(tmp_path):
    many = [{**GOOD, "id": n} for n in range(40)] + [{**BOXES, "id": n} for n in range(40, 80)]
    config = own(tmp_path, *many)
    train = load_split(config, "train")
    questions = {e.question for e in train if e.task == "report"}
    assert len(questions) > 3
    assert questions <= set(data.QUESTIONS["report"])
    questions = {e.question for e in train if e.task == "grounding"}
    assert len(questions) > 3
    assert questions <= {text.format("the nodule") for text in data.QUESTIONS["phrase"]}
    # Seeded, and always the first where they are held out.
    other = dataclasses.replace(config, seed=1)
    assert load_split(config, "train") == train
    assert load_split(other, "train") != train
    for seeded in (config, other):
        (held_out,) = load_split(seeded, "test")
        assert held_out.question == data.QUESTIONS["report"][0]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ({"id": 2}, "images"),
        ({**GOOD, "report": ""}, "report is empty"),
        ({**GOOD, "images": ["b.png"]}, "b.png"),
        ({**GOOD, "images": "a.png"}, "images: expected a list"),
        ({"id": 2, "images": ["a.png"]}, "neither report nor phrase"),
        ({**GOOD, "phrase": "x", "boxes": []}, "two examples, with an id each"),
        ({**BOXES, "boxes": [[0.1, 0.4, 0.3, 0.2]]}, "inside the image"),
        ({**BOXES, "boxes": [[0.5, 0.2, 0.3, 0.4]]}, "x1 < x2"),
        ({**BOXES, "boxes": "all"}, "line 2"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_jsonl_row(tmp_path, row, message, capsys):
    config = own(tmp_path, GOOD, row)
    with pytest.raises(InputError) as error:
        load_split(config, "train")
    assert message in str(error.value)
    assert "train.jsonl" in str(error.value)
    assert "\n" not in str(error.value)
    config.data.on_error = "skip"
    assert len(load_split(config, "train")) == 1
    assert "skipped 1" in capsys.readouterr().err
