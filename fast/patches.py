"""The patch embedding as a matrix product of the same weights: equal to nn.Conv3d.

Compared in tests/test_model.py. The towers of Qwen3-VL, Qwen2.5-VL and Qwen2-VL get single patches,
so the kernel has one place only:

  pixels (N, 3, 2, 14, 14)  conv3d, kernel 2 x 14 x 14    (N, H, 1, 1, 1)
  pixels (N, 3 * 2 * 14 * 14) @ weight.T                  (N, H)

With some versions of cuDNN such a convolution is ten times slower than the product. On a CPU it is
not, so it stays there.
"""

from torch import nn
from torch.nn import functional as F  # noqa: N812


class PatchEmbedding(nn.Conv3d):
    """Patches (N, C, t, h, w) of the size of the kernel -> (N, H)."""

    def forward(self, patches):
        # A kernel's numbers lie in the order of a patch's.
        patches = patches.flatten(1)
        weight = self.weight.flatten(1)
        return F.linear(patches, weight, self.bias)


def use_products(model):
    """Turn the model's patch embedding into a product."""
    for module in model.modules():
        if type(module) is nn.Conv3d:
            # The class alone changes, so that the weight keeps its name.
            module.__class__ = PatchEmbedding
