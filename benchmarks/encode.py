"""What encoding a step's images costs: where it is needed, and ahead by workers (data.workers).

  python benchmarks/encode.py [--workers 0 2] [--films 16] [--side 3000] [--busy 8]

A step encodes `films` PNG files of side x side pixels to 672 x 672. "idle": one step follows the
other at once. "busy": between two steps a device computes for so many seconds, in which the main
process sleeps, as it does when it waits for a GPU.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, data, load_config, machine, model, now, print_head
from PIL import Image

STEPS = 3


def draw_film(path: Path, side: int) -> None:
    """A smooth picture with the noise of a detector, so that it compresses as films do."""
    x = np.linspace(0, 3, side)
    smooth = 110 + 60 * np.sin(x)[:, None] * np.cos(2 * x)
    noise = np.random.default_rng(0).normal(0, 3, (side, side))
    Image.fromarray(np.uint8(smooth + noise)).save(path)


def seconds_waited(policy, films: list, busy: float) -> float:
    """Mean seconds of a step that encoding takes. The first step does not count."""
    waited = []
    # One step more is under way than is measured.
    policy.encode_ahead(films * (STEPS + 2))
    for _ in range(STEPS + 1):
        start = now()
        for film in films:
            policy.encode(film)
        waited.append(now() - start)
        time.sleep(busy)
    for film in films:
        policy.encode(film)
    return float(np.mean(waited[1:]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--films", type=int, default=16)
    parser.add_argument("--side", type=int, default=3000)
    parser.add_argument("--busy", type=float, default=8)
    args = parser.parse_args()
    config = load_config(ROOT / "config.yaml", ["model.max_pixels=451584"])
    policy = model.load_policy(config)
    example = data.load_split(config, "test")[0]

    print(f"{machine()}; {args.films} films of {args.side} x {args.side}; mean of {STEPS} steps\n")
    print_head(f"| workers | encode, s per step: idle | busy {args.busy:g} s |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "film.png")
        draw_film(path, args.side)
        films = [dataclasses.replace(example, images=(str(path),)) for _ in range(args.films)]
        for workers in args.workers:
            policy.config.data.workers = workers
            idle = seconds_waited(policy, films, 0)
            busy = seconds_waited(policy, films, args.busy)
            print(f"| {workers} | {idle:.2f} | {busy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
