"""Trees of labels: by hand, and for any labels against what the chat template makes of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import example_of
from transformers import AutoTokenizer

from axolotl_ivon.data.encode import encode
from axolotl_ivon.data.label_tree import LabelTree, label_tree


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_what_labels_share_is_there_once() -> None:
    tree = label_tree(((5, 6, 7), (5, 6, 8), (9,), (5, 4)))
    assert tree == LabelTree(
        tokens=(-1, 5, 6),
        parents=(-1, 0, 1),
        depths=(0, 1, 2),
        steps=((0, 0, 5), (0, 1, 6), (0, 2, 7), (1, 0, 5), (1, 1, 6), (1, 2, 8), (2, 0, 9), (3, 0, 5), (3, 1, 4)),
        labels=4,
    )
    assert (tree.leaves(), tree.line(2), tree.line(0)) == ([2], [1, 2], [])
    assert (len(label_tree(((1,), (2,)))), label_tree(((1,), (2,))).leaves()) == (1, [0])


@given(st.lists(st.text(max_size=6), min_size=2, max_size=500, unique_by=str.strip), st.randoms())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_labels_are_events_that_exclude_one_another(tokenizer: Any, texts: list[str], random: Any) -> None:
    choices = tuple(text for text in texts if text)
    assume(len(choices) > 1)
    examples = [example_of(random.choice(choices), question) for question in ("red sun", "moon", "")]
    items = encode(tokenizer, examples, "choice", choices=choices)
    for example, item in zip(examples, items, strict=True):
        assert item.candidates is not None
        for number, choice in enumerate(choices):
            turns = [*example.messages, {"role": "assistant", "content": choice}]
            whole = tokenizer.apply_chat_template(turns, return_dict=False)
            tokens = [*item.ids, *item.candidates[number]]
            assert whole[: len(tokens)] == tokens
            assert choice in tokenizer.decode(tokens)
        # Sorted, a beginning would stand right before what begins with it.
        for label, other in itertools.pairwise(sorted(item.candidates)):
            assert other[: len(label)] != label
        tree = label_tree(item.candidates)
        assert len(tree) == 1 + len({label[:n] for label in item.candidates for n in range(1, len(label))})
        answered = tokenizer.apply_chat_template(example.turns, return_dict=False)
        right = item.candidates[item.targets[0]]
        assert answered[len(item.ids) :][: len(right)] == list(right)
