"""Every recipe in configs/ as it is, with a tiny model and fixture data: each stage, evaluated."""

from pathlib import Path

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
    "data.workers=0",
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
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


class Never:
    """No request to stop, and no signal handlers that other tests would inherit."""

    def requested(self):
        return False

    def release(self):
        pass

    def finish(self):
        pass


def load_recipe(path, fixtures, out, *overrides):
    """A recipe on the fixtures, which lie as it expects them below data/."""
    folder = fixtures / Path(load_config(path).data.path).relative_to("data")
    settings = [f"data.path={folder}", f"out={out}", *TINY, *overrides]
    if path.stem == "radvlm_grpo_report":
        # RadCliQ's weights have to be fetched: tests/test_radeval.py.
        settings.append("rewards.report={gleu: 1}")
    return load_config(path, settings)


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    return layouts.everything(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_grpo(monkeypatch):
    """Runs train_grpo.main() with a configuration: (names of what it compares, the results)."""
    evaluate = evaluation.evaluate_checkpoints
    compared = []

    def evaluate_and_keep(config, checkpoints):
        _, results = evaluate(config, checkpoints)
        compared.append((list(checkpoints), results))

    def run(config):
        monkeypatch.setattr(train_grpo, "start_training", lambda usage: (config, Never()))
        train_grpo.main()
        return compared.pop()

    monkeypatch.setattr(evaluation, "evaluate_checkpoints", evaluate_and_keep)
    return run


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, fixtures, tmp_path, run_grpo):
    config = load_recipe(recipe, fixtures, tmp_path, "grpo.init=auto")
    before = "cold_start" if config.data.thinking else "sft"
    names, results = run_grpo(config)
    assert names == [before, "grpo"]
    tasks = set()
    for source in data.sources(config, "test"):
        tasks |= {data.TASK_OF[task] for task in source.tasks}
    assert ("reports" in results) == ("report" in tasks)
    assert ("grounding" in results) == ("grounding" in tasks)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_start_from_what_a_recipe_makes(recipe):
    # The latter is what radvlm_sft.yaml makes.
    assert load_config(recipe).grpo.init in ("auto", "runs/radvlm/sft/best")
    assert load_config(ROOT / "configs" / "radvlm_sft.yaml").out == "runs/radvlm"


def test_radvlm_cold_start_and_thinking(fixtures, tmp_path, run_grpo):
    """What the comments of the RadVLM recipes say about thinking."""
    recipe = ROOT / "configs" / "radvlm_sft.yaml"
    settings = ["sft.stage=cold_start", "data.thinking=true"]
    config = load_recipe(recipe, fixtures, tmp_path, *settings)
    best = train_sft.train_up_to(config, "cold_start", Never())

    recipe = ROOT / "configs" / "radvlm_grpo_report.yaml"
    settings = [f"grpo.init={best}", "data.thinking=true"]
    config = load_recipe(recipe, fixtures, tmp_path / "report", *settings)
    names, _ = run_grpo(config)
    assert names == ["cold_start", "grpo"]
    assert {e.style for e in data.load_split(config, "test")} == {"suffix"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_your_own_json_lines(path, tmp_path):
    """With what docs/data.md says to add."""
    recipe = load_config(path)
    settings = ["data.source=jsonl", f"data.path={layouts.jsonl(tmp_path)}"]
    if recipe.data.views == "frontal":
        settings.append("data.views=all")
    if recipe.data.train:
        settings += ["data.train=[]", "data.val=[]", "data.test=[]"]
    config = load_config(path, settings)
    for split in ("train", "val", "test"):
        assert [len(part) for _, part, _ in data.read_split(config, split)] == [1]
