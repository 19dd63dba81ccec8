"""Ask a trained model about images: prints its report, or the boxes that it gives.

  python -m tools.generate CHECKPOINT IMAGE [IMAGE ...] [--ask TEXT]

CHECKPOINT is a run folder (its best checkpoint, else its last), a model folder or a hub id. IMAGEs
are the views of one study; `phantom:N` draws phantom N. Without --ask, a report is asked for. A run
folder's config.yaml says in which format its model answers; a thinking model's reasoning is
printed, too. Not for clinical use.
"""

from pathlib import Path

import data
from model import load_frozen
from runtime.checkpoint import resolve
from runtime.config import Config, InputError, load_config
from runtime.output import warn0
from runtime.processes import argument_parser, run_main


def generate(checkpoint: str, images: list[str], ask: str = "") -> tuple[str, str, list]:
    """(reasoning, answer, boxes) of the greedy answer about one study. Raises InputError."""
    config = run_config(checkpoint)
    policy = load_frozen(config, resolve(checkpoint))
    # A question of the user's is answered in the format of boxes.
    task = "grounding" if ask else "report"
    question = ask or data.QUESTIONS["report"][0]
    images = tuple(map(image_of, images))
    style = data.style_of(config)
    example = data.Example("generate", task, images, question, answer="", style=style)

    asked = data.with_box_form([example], config)
    (rollout,) = policy.sample(asked, 1, config.grpo.max_new_tokens, temperature=0)
    _, thinking, answer = data.parse_output(rollout.texts[0], task, style)
    return thinking, answer, data.parse_boxes(answer)


def run_config(checkpoint: str) -> Config:
    """The configuration that a checkpoint was trained with, or the defaults where there is none."""
    folder = Path(resolve(checkpoint)).resolve()
    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        if path.is_file():
            try:
                # There is one study: a run may skip such images, but here nothing would be left.
                return load_config(path, ["data.on_error=stop"])
            except InputError as error:
                # A run of another version: its weights load, its settings do not.
                warn0(f"{error}; the answer is taken to be plain")
    return Config()


def image_of(name):
    """A path, or phantom N of seed 0 for "phantom:N"."""
    kind, _, number = name.partition(":")
    if kind == "phantom" and number.isdigit():
        return data.phantom(0, int(number))
    if not Path(name).is_file():
        raise InputError(f"{name}: no such image")
    return name


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--ask", default="")
    args = parser.parse_args()
    thinking, answer, boxes = generate(args.checkpoint, args.images, args.ask)
    if thinking:
        print(f"Thinking: {thinking}\n")
    print(answer or "(no answer)")
    for x1, y1, x2, y2 in boxes:
        print(f"box: from the left {x1:.2f} to {x2:.2f}, from the top {y1:.2f} to {y2:.2f}")


if __name__ == "__main__":
    run_main(main)
