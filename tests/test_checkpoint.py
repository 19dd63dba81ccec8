"""Run folders of other versions: their weights load, their settings are refused in one line."""

import pytest
import yaml
from helpers import load

from runtime.checkpoint import open_run
from runtime.config import InputError, config_text
from tools.generate import run_config


@pytest.fixture
def old_run(tmp_path):
    """A run folder whose settings have a key that is gone."""
    run = tmp_path / "grpo"
    (run / "step_000001").mkdir(parents=True)
    (run / "last").symlink_to("step_000001")
    settings = yaml.safe_load(config_text(load()))
    settings["grpo"]["stop_if"] = {}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def test_an_old_run_is_refused_in_one_line(old_run):
    with pytest.raises(InputError, match=r"another version .*'grpo.stop_if'.* out=") as error:
        open_run(old_run, load(), ["grpo"], 9)
    assert "\n" not in str(error.value)


def test_an_old_run_can_be_asked(old_run, capsys):
    assert not run_config(str(old_run)).data.thinking
    assert "taken to be plain" in capsys.readouterr().err
