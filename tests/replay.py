"""Run a script with its sampled tokens written down, or replaced by those of an earlier run.

  python tests/replay.py CONFIG EARLIER.json SCRIPT.py [key=value ...]

EARLIER.json holds [{example id: token ids of its completions}, ..] for every step, or [] to record.
What was sampled goes to OUT/tokens.RANK.jsonl. Processors round differently, and now and then a
sample is another one; with the tokens of the earlier run, losses can still be compared.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402

EVALUATION = (0,)  # evaluation is greedy, and has no stream of random numbers


def replace_tokens(policy, rollout, tokens, temperature):
    """Make `rollout` one of other tokens, as if the policy had sampled them."""
    rollout.tokens = [torch.tensor(ids, device=policy.device) for ids in tokens]
    logp, _, mask = policy.logprobs([rollout.prompt], [rollout.tokens], temperature)
    rollout.logprobs = {"sampled": [row[real] for row, real in zip(logp, mask)]}
    rollout.texts = [policy.decode(ids) for ids in rollout.tokens]
    stop_ids = policy.stop_ids.tolist()
    rollout.finished = [ids[-1] in stop_ids for ids in tokens]


def replayed(sample, earlier, path):
    """Policy.sample that writes its tokens to `path` and returns those of `earlier`."""

    @torch.no_grad()
    def sample_and_replace(
        policy, examples, group_size, max_new_tokens, temperature, stream=EVALUATION
    ):
        rollouts = sample(policy, examples, group_size, max_new_tokens, temperature, stream)
        if stream == EVALUATION:
            return rollouts
        step = stream[-1]
        for rollout in rollouts:
            tokens = [ids.tolist() for ids in rollout.tokens]
            with open(path, "a") as file:
                line = {"step": step, "id": rollout.example.id, "tokens": tokens}
                file.write(json.dumps(line) + "\n")
            if earlier and tokens != earlier[step][rollout.example.id]:
                tokens = earlier[step][rollout.example.id]
                replace_tokens(policy, rollout, tokens, temperature)
        return rollouts

    return sample_and_replace


def main():
    config, earlier, script, *args = sys.argv[1:]
    out = next(arg for arg in args if arg.startswith("out="))
    out = Path(out.removeprefix("out="))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"tokens.{os.environ.get('RANK', 0)}.jsonl"
    earlier = json.loads(Path(earlier).read_text())
    model.Policy.sample = replayed(model.Policy.sample, earlier, path)
    sys.argv = [script, config, *args]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
