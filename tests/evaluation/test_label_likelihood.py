"""Likelihoods of labels from the logits at the nodes of their tree, against a sum over tokens."""

from __future__ import annotations

import pytest
import torch

from axolotl_ivon.data.label_tree import label_tree
from axolotl_ivon.evaluation.label_likelihood import label_probabilities, tree_layout

LABELS = ((5, 6), (5, 7), (8,))


@pytest.mark.parametrize("by_length", [False, True])
def test_probabilities_are_the_softmax_over_sums_of_log_probabilities(by_length: bool) -> None:
    tree = label_tree(LABELS, by_length)
    logits = torch.randn(2, 3, len(tree), 10, generator=torch.Generator().manual_seed(0))
    logprobs = logits.double().log_softmax(-1)
    root, below = logprobs[:, :, 0], logprobs[:, :, 1]
    sums = torch.stack([root[..., 5] + below[..., 6], root[..., 5] + below[..., 7], root[..., 8]], -1)
    if by_length:
        sums = sums / torch.tensor([2, 2, 1])
    torch.testing.assert_close(label_probabilities(logits, tree), sums.softmax(-1), atol=1e-6, rtol=1e-5)


def test_a_node_sees_its_prompt_and_itself_and_stands_after_the_prompts_end() -> None:
    layout = tree_layout(label_tree(LABELS), torch.tensor([2, 1]), 3, skip=1)
    assert layout.tokens.tolist() == [5]
    assert layout.seen[:, 0, -1].tolist() == [[True, True, True, True, True], [True, True, True, False, True]]
    assert layout.positions[:, -1].tolist() == [4, 3]
    assert layout.column.tolist() == [[2, 3], [1, 3]]
