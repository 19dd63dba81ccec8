"""A frozen vision tower runs once for each prompt: sampling, reference and update share its output.

Equal to running it again each time (tests/test_model.py):

            plain                                  here
  sample    images -> tower -> language model      images -> tower -> kept -> language model
  reference images -> tower -> language model                         kept -> language model
  update    images -> tower -> language model                         kept -> language model

The towers of Qwen3-VL, Qwen2.5-VL and Qwen2-VL give `pooler_output`, a row for each image token,
and Qwen3-VL as many rows again for each of its deepstack levels.
"""

from contextlib import contextmanager

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


def remember_features(policy, prompts):
    """Run the tower on the images of those prompts that it has not seen."""
    new = [p for p in prompts if p.features is None]
    if not new:
        return
    pixels = [p.images["pixel_values"] for p in new]
    grids = [p.images["image_grid_thw"] for p in new]
    pixels = torch.cat(pixels)
    grids = torch.cat(grids)
    # All at once, for one launch of each kernel.
    visual = policy.base.visual
    out = visual(pixels.type(visual.dtype), grid_thw=grids, return_dict=True)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    # A prompt has as many image tokens as its images have features.
    image_token = policy.model.config.image_token_id
    counts = [int((p.input_ids == image_token).sum()) for p in new]
    # Each prompt keeps its own part of every level.
    pieces = [level.split(counts) for level in levels]
    for prompt, features in zip(new, zip(*pieces)):
        prompt.features = features


@contextmanager
def known_features(visual, prompts):
    """Inside, the tower gives what it is known to give for these prompts. Used by Policy.run."""
    levels = zip(*(p.features for p in prompts))
    embeddings, *deepstack = (torch.cat(level) for level in levels)

    def forward(*args, **options):
        out = BaseModelOutputWithPooling(pooler_output=embeddings)
        out.deepstack_features = deepstack
        return out

    try:
        # An attribute of the object hides the method of its class.
        visual.forward = forward
        yield
    finally:
        del visual.forward
