"""Prepare what `reinforce.yaml` learns from, in the git-ignored folder `.demo`: movie snippets, each with a question.

The demo's prompts do not say what to answer with, since its answers show it. A model that learns from rewards alone
must come upon a right answer by itself: here the prompt asks for a word, and a quarter of SmolLM2's attempts are right.

    python example_configs/smollm2/prepare_reinforce.py
"""

from __future__ import annotations

import json
from pathlib import Path

from prepare_demo import DEMO, prepare, replacing, say

SYSTEM = "Answer with one word."
QUESTION = "Review: {}\nIs the review positive or negative? Answer with one word, positive or negative."
# What is written, from which of the demo's files, and how many snippets of it.
SETS = {"train": ("movie-train", 200), "test": ("movie", 100)}


def prepare_reviews(demo: Path = DEMO) -> None:
    """Make the folder of the reviews anew, from the snippets of the demo."""
    with replacing(demo / "reviews") as folder:
        for name, (source, size) in SETS.items():
            lines = (demo / "data" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:size]
            chats = [json.loads(line)["messages"] for line in lines]
            for system, user, _ in chats:
                system["content"], user["content"] = SYSTEM, QUESTION.format(user["content"])
            rows = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
            (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    say(f"Reviews in {demo / 'reviews'}: {', '.join(f'{name} {size}' for name, (_, size) in SETS.items())}.")


if __name__ == "__main__":
    prepare()
    prepare_reviews()
