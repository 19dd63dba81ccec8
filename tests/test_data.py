"""Configuration, image files, IU X-Ray and JSON lines: what is read, and what bad input says."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from helpers import ROOT, load
from layouts import kaggle, picture, r2gen, write

import data
import rewards
from runtime.config import InputError, config_text, load_config

# ---------------------------------------------------------------- configuration


def test_overrides_and_types(tmp_path):
    path = write(
        tmp_path / "c.yaml", "grpo: {lr: 1e-4, kl_coef: 0}\nrewards: {report: {mccs: 1}}\n"
    )
    config = load_config(
        path,
        ["grpo.steps=7", "rewards.report.gleu=0.5", "data.thinking=true", "out=5", "grpo.lr=2e-6"],
    )
    assert (config.grpo.lr, config.grpo.kl_coef, config.grpo.steps, config.data.thinking) == (
        2e-6,
        0.0,
        7,
        True,
    )
    assert config.rewards.report == {"mccs": 1.0, "gleu": 0.5} and config.out == "5"
    assert (
        load_config(write(tmp_path / "d.yaml", config_text(config))) == config
    )  # saved and read back


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
        ("grpo.group_size=1", "grpo.group_size: expected at least 2"),
        ("grpo.freeze=[tower]", "grpo.freeze: expected one of vision, projector, got 'tower'"),
        ("sft.freeze=vision", "sft.freeze: expected a list"),
        ("sft.train_vision=false", "unknown key 'sft.train_vision'"),
    ],
)
def test_bad_overrides_name_the_key(override, message):
    with pytest.raises(InputError) as error:
        load_config(ROOT / "config.yaml", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["grpo: [", "- a", "grpo: 3", "groo: {steps: 3}", "grpo:\n  stepz: 3\n", "\x00"]
)
def test_bad_files_name_the_file(tmp_path, text):
    with pytest.raises(InputError, match="c.yaml") as error:
        load_config(write(tmp_path / "c.yaml", text))
    assert "\n" not in str(error.value)


def test_missing_config_file(tmp_path):
    with pytest.raises(InputError, match="absent.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_shipped_configs_load_with_known_rewards_and_labels_agree():
    for path in [ROOT / "config.yaml", *(ROOT / "configs").glob("*.yaml")]:
        rewards.check_rewards(load_config(path).rewards)
        assert yaml.safe_load(path.read_text())
    assert data.LABELS == rewards.LABELS


# ---------------------------------------------------------------- data order


def test_every_epoch_sees_every_example_once():
    n, count = 23, 5
    seen = [i for step in range(23) for i in data.indices(n, count, step, 3, "sft")]  # 5 epochs
    assert all(sorted(seen[k * n : (k + 1) * n]) == list(range(n)) for k in range(5))
    assert (
        seen[:n] != seen[n : 2 * n]
        and seen[:n] != [i for s in range(5) for i in data.indices(n, 5, s, 3, "grpo")][:n]
    )


def test_batches_mix_tasks_as_told(examples):
    for share, reports in ((0.5, 4), (1.0, 8), (0.25, 2)):
        config = load("grpo.prompts=8", f"data.report_share={share}")
        tasks = [e.task for e in data.grpo_batch(examples, 3, config)]
        assert tasks.count("report") == reports
    only = [e for e in examples if e.task == "grounding"]
    assert len(data.grpo_batch(only, 0, load("grpo.prompts=8"))) == 8


def test_box_text_is_the_papers_format():
    boxes = [(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.75, 1.0), (0, 0, 1, 1)]
    assert data.boxes_text(boxes[:1]) == "[0.10, 0.20, 0.30, 0.40]"
    assert (
        data.boxes_text(boxes)
        == "[0.10, 0.20, 0.30, 0.40], [0.50, 0.50, 0.75, 1.00] and [0.00, 0.00, 1.00, 1.00]"
    )
    assert (
        data.parse_boxes(data.boxes_text(boxes)) == boxes
        and data.parse_boxes(data.boxes_text([])) == []
    )


@pytest.mark.parametrize("style", ["plain", "tags", "suffix"])
@pytest.mark.parametrize("task", ["report", "grounding"])
def test_targets_satisfy_the_format_reward(examples, style, task):
    example = dataclasses.replace(next(e for e in examples if e.task == task), style=style)
    valid, thinking, answer = data.parse_output(data.target_text(example), task, style)
    assert valid and answer == example.answer and (style == "plain" or thinking == example.thinking)
    assert data.prompt_text(example).endswith(" /think") == (style == "suffix")


# ---------------------------------------------------------------- images


def test_image_modes(tmp_path):
    for mode in ("L", "RGB", "RGBA", "I;16", "1", "P"):
        image = data.load_image(picture(tmp_path / f"{mode.replace(';', '')}.png", mode))
        assert image.mode == "RGB" and image.size == (40, 32)
    deep = np.asarray(data.load_image(tmp_path / "I16.png"))
    assert (
        deep.min() == 0 and deep.max() == 255 and len(np.unique(deep)) > 100
    )  # not clipped to white


def test_unreadable_images_are_named(tmp_path):
    whole = picture(tmp_path / "whole.png", size=(200, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    write(tmp_path / "text.png", "not an image")
    for name in ("cut", "empty", "text", "absent"):
        with pytest.raises(InputError, match=f"{name}.png") as error:
            data.load_image(tmp_path / f"{name}.png")
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- datasets, in the layouts as distributed


def iu(root, *overrides):
    return load_config(
        ROOT / "config.yaml", ["data.source=iu_xray", f"data.path={root}", *overrides]
    )


def test_r2gen_layout(tmp_path):
    examples = data.load_split(iu(r2gen(tmp_path)), "train")
    assert [e.id for e in examples] == ["CXR0", "CXR1"] and examples[
        1
    ].answer == "The heart is normal . Study 1 ."
    assert [i.size for i in data.open_images(examples[0])] == [(40, 32)] * 2
    frontal = data.load_split(iu(tmp_path, "data.views=frontal"), "test")
    assert [e.images[0].endswith("CXR3/0.png") for e in frontal] == [True] and len(
        frontal[0].images
    ) == 1


def test_kaggle_layout(tmp_path):
    config = iu(kaggle(tmp_path))
    splits = {s: data.load_split(config, s) for s in ("train", "val", "test")}
    assert [len(v) for v in splits.values()] == [7, 1, 2]
    everyone = {e.id: e for v in splits.values() for e in v}
    assert len(everyone) == 10  # disjoint
    assert (
        everyone["2"].answer == "Clear, study 2." and everyone["3"].answer == 'No "acute" disease.'
    )
    assert [i.rsplit("_")[-1] for i in everyone["2"].images] == [
        "Frontal.dcm.png",
        "Lateral.dcm.png",
    ]
    assert (
        data.load_split(iu(tmp_path, "data.views=frontal"), "val")[0]
        .images[0]
        .endswith("Frontal.dcm.png")
    )


def broken(name, root):
    tree = json.loads((root / "annotation.json").read_text())
    if name == "report":
        tree["train"][0]["report"] = "  "
    if name == "image":
        (root / "images" / "CXR0" / "1.png").unlink()
    if name == "row":
        tree["train"][0] = ["CXR0"]
    text = json.dumps(tree)
    write(
        root / "annotation.json",
        text[:-9] if name == "json" else text if name != "split" else '{"training": []}',
    )


@pytest.mark.parametrize(
    "name, message",
    [("report", "report is empty"), ("image", "CXR0/1.png"), ("row", r"train\[0\]")],
)
def test_a_bad_study_stops_or_is_skipped_and_counted(tmp_path, capsys, name, message):
    broken(name, r2gen(tmp_path))
    with pytest.raises(InputError, match=message):
        data.load_split(iu(tmp_path), "train")
    assert [e.id for e in data.load_split(iu(tmp_path, "data.on_error=skip"), "train")] == ["CXR1"]
    assert "skipped 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["json", "split"])
def test_a_bad_annotation_file(tmp_path, name):
    broken(name, r2gen(tmp_path))
    with pytest.raises(InputError, match="annotation.json"):
        data.load_split(iu(tmp_path), "train")


def test_missing_folder_and_files(tmp_path):
    for path, message in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path, "expected annotation.json"),
    ):
        with pytest.raises(InputError, match=message):
            data.load_split(iu(path), "train")


@pytest.mark.parametrize("line, message", [("5,x", "line"), ('6,"a', "CSV")])
def test_a_bad_csv_row(tmp_path, line, message):
    with open(kaggle(tmp_path) / "indiana_reports.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=f"indiana_reports.csv.*{message}"):
        data.load_split(iu(tmp_path), "train")


def test_a_csv_without_a_column(tmp_path):
    path = kaggle(tmp_path) / "indiana_reports.csv"
    path.write_text(path.read_text().replace("findings", "finding"))
    with pytest.raises(InputError, match="no column 'findings'"):
        data.load_split(iu(tmp_path), "train")


def own(root, *rows):
    picture(root / "a.png")
    for split, some in (
        ("train", rows),
        ("val", [{**GOOD, "patient": "q"}]),
        ("test", [{**GOOD, "patient": "r"}]),
    ):
        write(
            root / f"{split}.jsonl",
            "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in some),
        )
    return load_config(ROOT / "config.yaml", ["data.source=jsonl", f"data.path={root}"])


GOOD = {
    "id": 1,
    "images": ["a.png"],
    "report": "Clear lungs.",
    "patient": "p",
    "thinking": "Heart: normal.",
}


def test_jsonl(tmp_path):
    boxes = {"id": 2, "images": ["a.png"], "phrase": "the nodule", "boxes": [[0.1, 0.2, 0.3, 0.4]]}
    report, grounding = data.load_split(own(tmp_path, GOOD, boxes), "train")
    assert (report.task, report.patient, report.thinking) == (
        "report",
        f"{tmp_path}/p",
        "Heart: normal.",
    )
    assert grounding.answer == "[0.10, 0.20, 0.30, 0.40]" and grounding.label == "the nodule"


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
        (
            {"id": 3, "images": ["a.png"], "phrase": "x", "boxes": [[0.1, 0.2, 1.3, 0.4]]},
            "inside the image",
        ),
        ({"id": 3, "images": ["a.png"], "phrase": "x", "boxes": [[0.5, 0.2, 0.3, 0.4]]}, "x1 < x2"),
        ({"id": 3, "images": ["a.png"], "phrase": "x", "boxes": "all"}, "line 2"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_jsonl_row(tmp_path, row, message, capsys):
    config = own(tmp_path, GOOD, row)
    with pytest.raises(InputError, match=message) as error:
        data.load_split(config, "train")
    assert "train.jsonl" in str(error.value) and "\n" not in str(error.value)
    config.data.on_error = "skip"
    assert len(data.load_split(config, "train")) == 1
    assert "skipped 1" in capsys.readouterr().err
