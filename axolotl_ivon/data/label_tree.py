"""The tokens of several labels as a tree: what labels begin with in common is there, and computed, once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LabelTree:
    """Labels as paths in a tree of tokens, whose root is the end of the prompt.

    A node is a token that another one follows; the last token of a label is only predicted. Node 0 is the root. So
    the likelihood of a label is the product of its steps, and a model computes every node once.

    Attributes:
        tokens, parents, depths: of the nodes; the root has token −1, parent −1 and depth 0.
        steps: for each token of each label (number of the label, node before it, token).
        labels: how many labels there are.
        by_length: whether a label is scored by the mean over its tokens in place of the sum.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]
    labels: int
    by_length: bool = False

    def __len__(self) -> int:
        """Return the number of nodes, the root included."""
        return len(self.tokens)

    def line(self, node: int) -> list[int]:
        """Return the nodes from the root's child to `node`, in order."""
        nodes: list[int] = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def leaves(self) -> list[int]:
        """Return the nodes without children; of a tree that is its root alone, the root."""
        return sorted(set(range(len(self))) - set(self.parents))


@functools.lru_cache(maxsize=16)
def label_tree(labels: Sequence[Sequence[int]], by_length: bool = False) -> LabelTree:
    """Return the tree of `labels`, a tuple of tuples of token ids, none of which is the beginning of another."""
    nodes: dict[Sequence[int], int] = {labels[0][:0]: 0}
    for label in labels:
        for length in range(1, len(label)):
            nodes.setdefault(label[:length], len(nodes))
    begun = list(nodes)
    return LabelTree(
        tokens=(-1, *(path[-1] for path in begun[1:])),
        parents=(-1, *(nodes[path[:-1]] for path in begun[1:])),
        depths=tuple(map(len, begun)),
        steps=tuple(
            (number, nodes[label[:place]], token)
            for number, label in enumerate(labels)
            for place, token in enumerate(label)
        ),
        labels=len(labels),
        by_length=by_length,
    )
