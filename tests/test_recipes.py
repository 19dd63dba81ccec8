"""Every file in configs/ as it is, with a tiny model and fixture data: two steps of each stage, and the evaluation."""

import pytest

import data
import eval as evaluation
import layouts
import train_grpo
import train_sft
from conftest import ROOT

TINY = [
    "model.path=tiny",
    "model.max_pixels=9216",
    "model.precision=float32",
    "sft.steps=2",
    "sft.more_steps=1",
    "sft.batch_size=3",
    "sft.micro_batch=2",
    "sft.warmup=1",
    "grpo.steps=2",
    "grpo.prompts=3",
    "grpo.mini_batch=0",
    "grpo.group_size=2",
    "grpo.max_new_tokens=6",
    "eval.bootstrap=10",
]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


class Never(list):
    """No request to stop."""


def load(recipe, fixtures, tmp_path, *more):
    path = fixtures / "iu_xray" if recipe.stem == "iu_xray" else fixtures
    return data.load_config(recipe, [f"data.path={path}", f"out={tmp_path}", *TINY, *more])


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    return layouts.everything(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, fixtures, tmp_path, capsys):
    assert load(recipe, fixtures, tmp_path).grpo.init in (
        "auto",
        "runs/radvlm/sft/best",
    )  # which radvlm_sft.yaml makes
    config = load(recipe, fixtures, tmp_path, "grpo.init=auto")
    checkpoints = train_grpo.train(config, Never())
    assert [name for name in checkpoints if name != "grpo"] == [
        "cold_start" if config.data.thinking else "sft"
    ]
    text, results = evaluation.evaluate_checkpoints(config, checkpoints)
    tasks = {data.TASK_OF[task] for source in data.sources(config, "test") for task in source.tasks}
    assert ("reports" in results) == ("report" in tasks) and ("grounding" in results) == (
        "grounding" in tasks
    )


def test_radvlm_cold_start_and_thinking(fixtures, tmp_path):
    """What the comments of the RadVLM recipes say about thinking."""
    recipe = ROOT / "configs" / "radvlm_sft.yaml"
    config = load(recipe, fixtures, tmp_path, "sft.stage=cold_start", "data.thinking=true")
    best = train_sft.trained(config, "cold_start", Never())
    recipe = ROOT / "configs" / "radvlm_grpo_report.yaml"
    config = load(recipe, fixtures, tmp_path / "report", f"grpo.init={best}", "data.thinking=true")
    assert set(train_grpo.train(config, Never())) == {"cold_start", "grpo"}
    assert next(iter(data.load_split(config, "test"))).style == "suffix"
