"""Outputs that mean the same, by the cosine of their embeddings under a sentence-transformers model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import IVONError, import_optional, one_line, param_ref

SIMILARITY = 0.8
Embedding = Callable[[Sequence[str]], np.ndarray]


def load_embedding(model: str | Path) -> Embedding:
    """Return a model of sentence-transformers (a folder or Hub id) as a function of texts; no code of its own is run.

    The function returns float32 embeddings, shape (n, size), each of length 1. A model that sentence-transformers
    cannot load is an IVONError.
    """
    named = param_ref("embedding_model")
    package = import_optional("sentence_transformers", named, "sentence-transformers", "'axolotl-ivon[mbr]'")
    try:
        loaded = package.SentenceTransformer(
            str(model), device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except Exception as error:  # as many kinds as there are ways to be no model
        raise IVONError(
            f"{named} {model}: cannot be loaded ({one_line(error)}); give a folder that sentence-transformers saved, "
            "or a Hub id, all-MiniLM-L6-v2 say"
        ) from None

    def embed(texts: Sequence[str]) -> np.ndarray:
        # Half a surrogate pair, which a model may write, is no text.
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        return np.asarray(loaded.encode(clean, normalize_embeddings=True, show_progress_bar=False))

    return embed


def by_meaning(answers: Sequence[str | None], embed: Embedding, similarity: float = SIMILARITY) -> list[int]:
    """Return the cluster of each answer.

    From the most frequent answer on, each joins the cluster whose first answer is the most like it, if their cosine is
    at least `similarity`, or else begins a cluster. The order of the outputs does not matter. An empty answer forms a
    cluster of its own.
    """
    texts = [answer for answer in answers if answer is not None]
    if not texts:
        return list(range(len(answers)))
    count = Counter(texts)
    unique = sorted(count, key=lambda text: (-count[text], text))
    vectors = embed(unique)
    leaders: list[int] = []
    cluster: dict[str, int] = {}
    for place, text in enumerate(unique):
        cosines = vectors[leaders] @ vectors[place]
        if leaders and cosines.max() >= similarity:
            cluster[text] = leaders[int(cosines.argmax())]
        else:
            leaders.append(place)
            cluster[text] = place
    return [len(unique) + i if answer is None else cluster[answer] for i, answer in enumerate(answers)]
