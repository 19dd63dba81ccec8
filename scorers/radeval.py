"""Scores of the package radeval: RadGraph, RadCliQ-v1, RaTEScore, GREEN, SRR-BERT, BERTScore, ...

No metric is computed here. `radeval:NAME` or, for a metric that gives several numbers,
`radeval:NAME:KEY` is a reward (`radeval:radcliq`: lower is better, so give it a negative weight)
and a column of the evaluation. Install it with: pip install -r requirements-radeval.txt
"""

import contextlib
import io
import sys
from collections.abc import Callable
from functools import lru_cache

from runtime.config import InputError


@lru_cache
def radeval_score(name: str) -> Callable[[list[str], list[str]], list[float]]:
    """The function (N texts, N references) -> N numbers that `name` asks for. Raises InputError.

    Its models run on this process's device and score this process's texts only.
    """
    _, metric, *key = name.split(":", 2)
    try:
        # Without a network, the import prints that a list of words is missing.
        with contextlib.redirect_stderr(io.StringIO()):
            from radeval.rewards import make_reward_fn  # noqa: PLC0415

        # RadGraph, and so RadCliQ, of version 2.2.1 imports from the former name of the package.
        sys.modules.setdefault("RadEval", sys.modules["radeval"])
        function = make_reward_fn(metric, "reference", *key)
    except ImportError as error:
        raise InputError(
            f"{name}: {error}; install it with: pip install -r requirements-radeval.txt"
        ) from None
    except Exception as error:
        raise InputError(f"{name} cannot be loaded: {explain(error)}") from None

    latest = []

    def score(texts, references):
        # RadCliQ knows its references again by their address, which a new list may get, too, if
        # the one before is gone.
        latest[:] = [references]
        # Some metrics refuse an empty text.
        texts = [text if text.strip() else "." for text in texts]
        try:
            return function(texts, reference=references)
        except Exception as error:
            raise InputError(f"{name} fails: {explain(error)}") from None

    # One pair shows whether a key is missing.
    score(["no pleural effusion"], ["no pleural effusion"])
    return score


def explain(error):
    """One line, with what to do about weights that are not there."""
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    if "per-sample" in reason:
        reason += " (here: radeval:NAME:KEY)"
    # A name or a key that is wrong has its own message. RadGraph raises a bare Exception.
    elif not isinstance(error, ValueError):
        reason += (
            " (if its weights are missing: they come from the Hugging Face hub, so run it once "
            "with network access, or copy what that leaves in ~/.cache)"
        )
    return reason
