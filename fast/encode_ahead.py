"""Images are decoded and resized by worker processes, while the device computes.

Equal to Policy.encode_here where a prompt is needed, with its errors (tests/test_ahead.py):

  plain      | encode 1 | step 1 | encode 2 | step 2 | encode 3 | step 3 |
  here       | encode 1 | step 1 | step 2   | step 3 |
  a worker              | encode 2 | encode 3 | ..

The order is known long before: which examples make up a step is a function of the seed. What is
asked for out of order is encoded where it is needed.
"""

import os
import pickle
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process

import torch

PROMPTS_AHEAD = 8  # of each worker
POOLS = []  # kept to the end: Python does not exit well after freeing one with work to do


def encode_ahead(policy, upcoming):
    """A function like policy.encode_here, for examples that are asked for in this order."""
    # Without this, tokenizers warns that the process was forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workers = policy.config.data.workers
    # A forked worker has the processor. It never touches the device.
    pool = ProcessPoolExecutor(workers, get_context("fork"), start_worker, [policy])
    POOLS.append(pool)
    upcoming = iter(upcoming)
    under_way = deque()

    def submit(count):
        for example in islice(upcoming, count):
            under_way.append((example, pool.submit(encode_in_worker, example)))

    def encode(example):
        # Whether it is the next one decides, not which worker is faster.
        if not under_way or under_way[0][0] != example:
            return policy.encode_here(example)
        _, result = under_way.popleft()
        submit(1)
        if not under_way:
            pool.shutdown()
        return pickle.loads(result.result())

    submit(PROMPTS_AHEAD * workers)
    return encode


def start_worker(policy):
    """The first thing that a worker does."""
    encode_in_worker.policy = policy
    # Slurm and torchrun send signals to workers, too. The main process decides when it stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    # The threads of torch do not survive a fork.
    torch.set_num_threads(1)


def end_with_parent():
    """However the main process ends, no worker stays behind."""
    parent_process().join()
    os._exit(0)


def encode_in_worker(example):
    # As bytes: tensors would travel in shared memory, of which a container has little.
    return pickle.dumps(encode_in_worker.policy.encode_here(example))
