"""How many tokens fit into the memory of a GPU."""

from collections.abc import Callable

import torch

from runtime.processes import gather_objects

SHARE = 0.5  # of the free memory, for activations: sampling keeps keys and values, memory has gaps
CPU_TOKENS = 4096  # without a GPU


def tokens_that_fit(work: Callable, tokens: int) -> int:
    """Tokens whose activations take SHARE of the free memory. Collective: the least of all.

    work() is a forward and backward of `tokens` tokens.
    """
    if not torch.cuda.is_available():
        return CPU_TOKENS
    # The first turn leaves gradients, so the second one shows what activations take.
    before = torch.cuda.memory_allocated()
    work()
    with_gradients = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    activations = torch.cuda.max_memory_allocated() - with_gradients

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    # The optimizer will keep two numbers for each gradient.
    free -= 2 * (with_gradients - before)
    return min(gather_objects(int(tokens * SHARE * free / activations)))
