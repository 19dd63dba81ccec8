"""Every recipe in configs/, with a tiny model and fixture data: two steps of each stage."""

import layouts
import pytest
from helpers import ROOT

import data
import eval as evaluation
import train_grpo
import train_sft
from runtime.config import load_config

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
]
EVALUATE = evaluation.evaluate_checkpoints
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


class Never:
    """No request to stop."""

    def requested(self):
        return False

    release = finish = requested


def load(recipe, fixtures, tmp_path, *more):
    path = fixtures / "iu_xray" if recipe.stem == "iu_xray" else fixtures
    return load_config(recipe, [f"data.path={path}", f"out={tmp_path}", *TINY, *more])


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    return layouts.everything(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_grpo(monkeypatch):
    """Run train_grpo.main() with a configuration: the checkpoints that it compares."""
    compared = []
    monkeypatch.setattr(
        train_grpo.evaluation, "evaluate_checkpoints", lambda _, c: compared.append(c)
    )

    def run(config):
        monkeypatch.setattr(train_grpo, "start_training", lambda _: (config, Never()))
        compared.clear()
        train_grpo.main()
        (checkpoints,) = compared
        return checkpoints

    return run


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, fixtures, tmp_path, run_grpo):
    # Which radvlm_sft.yaml makes.
    assert load(recipe, fixtures, tmp_path).grpo.init in ("auto", "runs/radvlm/sft/best")
    config = load(recipe, fixtures, tmp_path, "grpo.init=auto")
    checkpoints = run_grpo(config)
    before = [name for name in checkpoints if name != "grpo"]
    assert before == ["cold_start" if config.data.thinking else "sft"]
    _, results = EVALUATE(config, checkpoints)
    tasks = {data.TASK_OF[task] for source in data.sources(config, "test") for task in source.tasks}
    assert ("reports" in results) == ("report" in tasks)
    assert ("grounding" in results) == ("grounding" in tasks)


def test_radvlm_cold_start_and_thinking(fixtures, tmp_path, run_grpo):
    """What the comments of the RadVLM recipes say about thinking."""
    recipe = ROOT / "configs" / "radvlm_sft.yaml"
    config = load(recipe, fixtures, tmp_path, "sft.stage=cold_start", "data.thinking=true")
    best = train_sft.train_up_to(config, "cold_start", Never())
    recipe = ROOT / "configs" / "radvlm_grpo_report.yaml"
    config = load(recipe, fixtures, tmp_path / "report", f"grpo.init={best}", "data.thinking=true")
    assert set(run_grpo(config)) == {"cold_start", "grpo"}
    assert next(iter(data.load_split(config, "test"))).style == "suffix"
