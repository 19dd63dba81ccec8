"""Images are decoded and resized by worker processes, while the device computes.

Equal to Policy.encode_here where a prompt is needed, with its errors (tests/test_ahead.py):

  plain      | encode 1 | step 1 | encode 2 | step 2 | encode 3 | step 3 |
  here       | encode 1 | step 1 | step 2   | step 3 |
  a worker              | encode 2 | encode 3 | ..

The order is known long before: which examples make up a step is a function of the seed. What is
asked for out of order is encoded where it is needed.
"""

import atexit
import os
import pickle
import signal

from torch.utils.data import DataLoader, Dataset

PROMPTS_AHEAD = 16  # of each worker


class EncodeAhead:
    """Prompts of the examples that will be asked for, in this order."""

    def __init__(self, policy, upcoming, workers):
        # Without this, tokenizers warns that the process was forked.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader(
            Encoder(policy),
            batch_size=None,
            sampler=upcoming,
            num_workers=workers,
            prefetch_factor=PROMPTS_AHEAD,
            worker_init_fn=leave_signals,
            multiprocessing_context="fork",
        )
        self.results = iter(loader)
        self.next = None
        # Before multiprocessing kills the workers, which torch would take for an accident.
        atexit.register(self.close)

    def close(self):
        """End the workers."""
        self.results = iter(())
        atexit.unregister(self.close)

    def take(self, example):
        """The result for the example, if it is the next one: a Prompt, or what it raises."""
        # The next one stays here until it is asked for.
        if self.next is None:
            self.next = next(self.results, None)
        if self.next is None or self.next[0] != example.id:
            return None
        _, result = self.next
        self.next = None
        return pickle.loads(result)


class Encoder(Dataset):
    """What a worker does with an example."""

    def __init__(self, policy):
        self.policy = policy

    def __getitem__(self, example):
        try:
            result = self.policy.encode_here(example)
        # It is raised in the main process, where the example is asked for.
        except Exception as error:
            result = error
        # As bytes: tensors would travel in shared memory, of which a container has little.
        return example.id, pickle.dumps(result)


def leave_signals(_):
    """A request to stop is for the main process, which ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
