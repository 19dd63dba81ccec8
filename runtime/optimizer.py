"""AdamW or Muon, with one sum of gradients per step, clipping, and steps that are refused."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from runtime.config import InputError
from runtime.processes import shard_state, sum_gradients, whole_tensor

WEIGHT_DECAY = 0.01  # RadVLM-GRPO, both stages
GRAD_CLIP = 1.0  # RadVLM-GRPO, both stages
MAX_BAD_STEPS = 5  # steps in a row without a finite gradient, which change nothing


class Optimizer:
    """AdamW on the trained float32 weights, without decay of vectors (norms, biases).

    kind="muon" adds Muon: the weights of linear layers, apart from the head, take its
    orthogonalised steps (Jordan 2024), scaled to the size of AdamW's (Liu et al. 2025), so that one
    learning rate serves both.
    """

    def __init__(self, policy: Any, kind: str):
        self.policy = policy
        self.bad_steps = 0
        trained = policy.parameters()
        weights = set()
        if kind == "muon":
            layers = [m for m in policy.model.modules() if isinstance(m, nn.Linear)]
            weights = {layer.weight for layer in layers} - {policy.head}
        linear = [p for p in trained if p in weights]
        # AdamW takes the rest.
        others = [p for p in trained if p not in weights]
        matrices = {"params": [p for p in others if p.ndim >= 2], "weight_decay": WEIGHT_DECAY}
        vectors = {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}
        adamw = torch.optim.AdamW([matrices, vectors], fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if linear:
            muon = torch.optim.Muon(
                linear, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append(muon)

    def step(self, lr: float) -> float:
        """Sum gradients over the processes, clip, update. Returns the gradient norm. Collective.

        Where the norm is not finite nothing is updated: it would destroy the weights. Raises
        InputError if that happens MAX_BAD_STEPS times in a row.
        """
        trained = self.policy.parameters()
        # Each process holds its share of one global mean.
        sum_gradients(trained)
        norm = nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if norm.isfinite():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.bad_steps = 0 if norm.isfinite() else self.bad_steps + 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise InputError(
                f"{self.bad_steps} optimiser steps in a row had no finite gradient and changed "
                f"nothing; go on from the last checkpoint with a lower lr, or with "
                f"model.precision=float32"
            )
        return float(norm)

    def state(self) -> list[dict]:
        """Whole states on the first process. Collective."""
        return tree_map(whole_tensor, [o.state_dict() for o in self.optimizers])

    def load_state(self, states: list[dict]):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(shard_state(state, optimizer))
