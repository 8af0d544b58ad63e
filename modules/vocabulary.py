"""Models that learn new tokens."""

import torch
from torch import Tensor


def grow_rows(weight: Tensor, rows: int) -> Tensor:
    """[V, …] → [rows, …]: new tokens begin as the mean of the old ones.

    So their logit is the mean of the others', instead of one that may stand out from all (Hewitt, 2021, "Initializing
    New Word Embeddings for Pretrained Language Models"). The mean is taken in fp64, so that the copies of a tied matrix
    come out with the same bits on machines of several kinds.
    """
    mean = weight.double().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), *weight.shape[1:])])
