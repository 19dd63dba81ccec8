"""python -m tools.generate: whoever trained a model can see it speak."""

import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, START

import data
import model
from runtime.config import InputError, config_text, load_config
from tools import generate


def test_a_model_folder_writes_a_report_about_an_image_file(tmp_path):
    data.phantom(0, 3).image.save(tmp_path / "film.png")
    _, answer, boxes = generate.generate(str(START), [str(tmp_path / "film.png")])
    assert len(answer.split()) > 5
    assert answer.endswith(".")
    assert boxes == []


def test_it_answers_as_the_evaluation_decodes():
    """The same tokens as Policy.sample gives at temperature 0 for the same question."""
    _, answer, boxes = generate.generate(str(START), ["phantom:3"], "Where is the pacemaker?")
    config = load_config(ROOT / "config.yaml", [f"model.path={START}"])
    policy = generate.load_frozen(config, START)
    example = data.Example("x", "grounding", (data.phantom(0, 3),), "Where is the pacemaker?", "")
    (rollout,) = policy.sample([example], 1, 80, 0)
    assert answer.startswith(rollout.texts[0].strip()[:40])
    assert boxes == data.parse_boxes(answer)


def test_a_run_folder_says_how_its_model_answers(tmp_path):
    """A thinking model's reasoning stands apart from its report."""
    run = run_of(tmp_path / "grpo", "data.thinking=true", "grpo.max_new_tokens=120")
    thinking, answer, _ = generate.generate(run, ["phantom:20000003"])
    assert thinking.startswith("Heart:")
    assert "<think>" not in answer


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((str(START), ["absent.png"]), "absent.png: no such image"),
        (("/absent", ["phantom:1"]), "/absent"),
    ],
)
def test_what_is_missing_is_named(args, message):
    with pytest.raises(InputError, match=message):
        generate.generate(*args)


def run_of(folder, *settings):
    """A run folder of the built-in model with these settings."""
    folder.mkdir()
    config = load_config(ROOT / "config.yaml", settings)
    (folder / "config.yaml").write_text(config_text(config))
    shutil.copytree(START, folder / "step_000001")
    (folder / "last").symlink_to("step_000001")
    return str(folder)


def test_a_broken_image_is_an_error_whatever_the_run_did_with_them(tmp_path):
    (tmp_path / "film.png").write_bytes(b"no image")
    run = run_of(tmp_path / "grpo", "data.on_error=skip")
    with pytest.raises(InputError, match=r"film\.png"):
        generate.generate(run, [str(tmp_path / "film.png")])


def test_a_question_for_boxes_is_put_as_in_training(tmp_path, monkeypatch):
    questions = []
    encode = model.Policy.encode_here

    def noted(policy, example):
        questions.append(example.question)
        return encode(policy, example)

    monkeypatch.setattr(model.Policy, "encode_here", noted)
    ask = "Where is the pacemaker?"
    for init, said in (("base", f"{ask} {data.BOX_FORM}"), ("auto", ask)):
        run = run_of(tmp_path / init, f"grpo.init={init}")
        generate.generate(run, ["phantom:3"], ask)
        assert questions.pop() == said


def test_the_command_prints_the_boxes():
    command = [sys.executable, "-m", "tools.generate", str(START), "phantom:5", "--ask"]
    question = "Where is the pacemaker? Give its boxes."
    done = subprocess.run(
        [*command, question], cwd=ROOT, capture_output=True, text=True, check=True
    )
    answer, *lines = done.stdout.splitlines()
    boxes = data.parse_boxes(answer)
    assert len(lines) == len(boxes)
    for line, box in zip(lines, boxes):
        assert line.startswith(f"box: from the left {box[0]:.2f}")
