"""The likelihood of labels of several tokens, from logits at the nodes of their tree; and the pass that gives those.

The nodes are appended to a prompt of `width` tokens, each once. A node attends to the prompt, to itself and to the
nodes before it in its own label, and its position is that which it has after the prompt in its own label.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.label_tree import LabelTree


class TreeLayout(NamedTuple):
    """Prompts with a tree after each, as a model reads them: `rows` of them, with `below` nodes besides the root.

    Attributes:
        tokens: of the nodes, int64 [below].
        seen: whether a query (prompt, then nodes) attends to a key (cache, prompt, then nodes), bool
            [rows, 1, width + below, skip + width + below].
        positions: of prompt and nodes, int64 [rows, width + below].
        column: of the logits of each node, the root first, int64 [rows, 1 + below].
    """

    tokens: Tensor
    seen: Tensor
    positions: Tensor
    column: Tensor


def tree_layout(tree: LabelTree, last: Tensor, width: int, skip: int = 0) -> TreeLayout:
    """Return the layout of prompts that are padded on the right to `width`, after `skip` tokens in a cache.

    Args:
        last: the column of the last token of each prompt, int64 [rows].
    """
    rows, below, device = len(last), len(tree) - 1, last.device
    columns = torch.arange(width + below, device=device)
    prompt, nodes = columns[:width], columns[width:].expand(rows, -1)
    ancestors = torch.zeros(below, below, dtype=torch.bool)
    for node in range(1, len(tree)):
        ancestors[node - 1, torch.tensor(tree.line(node)) - 1] = True
    seen = torch.zeros(rows, 1, width + below, skip + width + below, dtype=torch.bool, device=device)
    seen[..., :skip] = True
    seen[:, 0, :width, skip : skip + width] = prompt <= prompt[:, None]
    seen[:, 0, width:, skip : skip + width] = (prompt <= last[:, None])[:, None]
    seen[:, 0, width:, skip + width :] = ancestors.to(device)
    depths = torch.tensor(tree.depths[1:], device=device)
    positions = skip + torch.cat([prompt.expand(rows, -1), last[:, None] + depths], 1)
    tokens = torch.tensor(tree.tokens[1:], device=device)
    return TreeLayout(tokens, seen, positions, torch.cat([last[:, None], nodes], 1))


def label_probabilities(logits: Tensor, tree: LabelTree) -> Tensor:
    """Return the probabilities of the labels, float64 [copies, rows, labels].

    That is the softmax of Σ log p(token | before) over the labels; the root's normaliser is the same in all of them.
    With `tree.by_length` it is that of the mean in place of the sum.

    Args:
        logits: at the nodes of the tree, the root first, [copies, rows, nodes, vocabulary].
    """
    label, node, token = torch.tensor(tree.steps, device=logits.device).T
    steps, skipped = logits[:, :, node, token].double(), 0 if tree.by_length else 1
    if len(tree) > skipped:
        normalisers = logits[:, :, skipped:].float().logsumexp(-1).double()
        steps -= F.pad(normalisers, (skipped, 0))[:, :, node]
    scores = steps.new_zeros(*steps.shape[:2], tree.labels).index_add_(2, label, steps)
    return (scores / label.bincount() if tree.by_length else scores).softmax(-1)
