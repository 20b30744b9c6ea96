"""Probabilities of labels the slow way: each label's tokens after the prompt, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def label_probabilities(
    model: nn.Module, ids: Sequence[int], labels: Sequence[Sequence[int]], by_length: bool = False
) -> Tensor:
    """Return p(label) / Σ p(label), float64 [labels]; `by_length` of geometric means over the tokens."""
    sums = []
    for label in labels:
        logs = [
            model(torch.tensor([[*ids, *label[:place]]])).logits[0, -1].double().log_softmax(-1)[token]
            for place, token in enumerate(label)
        ]
        sums.append(torch.stack(logs).sum() / (len(logs) if by_length else 1))
    return torch.stack(sums).softmax(-1)
