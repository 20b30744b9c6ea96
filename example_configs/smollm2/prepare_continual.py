"""Prepare what `continual-1.yaml` and `continual-2.yaml` train on, in the git-ignored folder `.demo`.

The first learns from movie snippets, as the demo does; the second goes on from it with tweets, which came later:

    python example_configs/smollm2/prepare_continual.py
"""

from __future__ import annotations

from pathlib import Path

from prepare_demo import DEMO, prepare, replacing, say, write_sets

SETS = {"tweets": {"tweets-train": 96, "tweets": 200}}


def prepare_tweets(demo: Path = DEMO) -> None:
    """Make the tweets' folder anew, from the package of snippets that `prepare_demo` has fetched."""
    with replacing(demo / "continual") as folder:
        write_sets(next((demo / "vaderSentiment").iterdir()), folder, SETS)
    counts = ", ".join(f"{name} {size}" for sizes in SETS.values() for name, size in sizes.items())
    say(f"Tweets in {demo / 'continual'}: {counts}.")


if __name__ == "__main__":
    prepare()
    prepare_tweets()
