"""Evaluation against PEFT run one prompt and one draw at a time, the model's own loss, and a closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from brute_force import class_probabilities, draw_probabilities
from caches import NAMES, rename_cache
from heard import Heard
from peft import LoraConfig, get_peft_model
from tiny import build_classifier, build_llama, build_lora, chat, with_sigma, write_chats
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.data.chats import read_examples
from axolotl_ivon.data.encode import EncodedExample, common_length
from axolotl_ivon.evaluation.evaluate import Evaluation, EvaluationData, Sampling, evaluate
from axolotl_ivon.evaluation.run import describe, run
from axolotl_ivon.evaluation.variants import Variant, VariantChoice, paper_variants
from axolotl_ivon.metrics.calibration import TEMPERATURES
from axolotl_ivon.metrics.scores import Scores, metrics
from axolotl_ivon.models.draws import AdapterSlots
from axolotl_ivon.models.session import Loading
from axolotl_ivon.records.base import save_lines
from axolotl_ivon.reporter import Reporter

DRAWS = Sampling(samples=3, seed=5)
ROWS = list(paper_variants(tau=0.5, ratio=0.3).values())


def close(one: list[Scores], other: list[Scores], tolerance: float = 1e-5) -> None:
    for a, b in zip(one, other, strict=True):
        first, second = a.group.argsort(stable=True), b.group.argsort(stable=True)
        for name in ("confidence", "nll", "brier", "entropy", "expected_entropy"):
            torch.testing.assert_close(
                getattr(a, name)[first], getattr(b, name)[second], rtol=tolerance, atol=tolerance
            )


@pytest.fixture(scope="module", params=["choice", "generate"])
def evaluation(request: pytest.FixtureRequest, tiny_adapter: Path, chats: Path) -> Evaluation:
    return Evaluation(tiny_adapter, EvaluationData([chats], task=request.param))


TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}"
)


def test_the_nll_of_an_answer_is_the_loss_that_axolotl_trains(
    tiny_adapter: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    strategies = pytest.importorskip("axolotl.prompt_strategies.chat_template")
    adapter, data = copied(tiny_adapter), tmp_path / "data.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = TRIMMING
    tokenizer.save_pretrained(adapter)
    records = [
        chat("red sun", answer) for answer in (" A", "blue moon \n", "\n\none two", "<think>\nno\n</think>\n\nB")
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluation = Evaluation(adapter, EvaluationData([data], task="generate"))
    prompter = strategies.ChatTemplatePrompter(tokenizer, TRIMMING)
    own = strategies.ChatTemplateStrategy(
        prompter, tokenizer, False, 512, roles_to_train=["assistant"], train_on_eos="turn"
    )
    [mean] = evaluation.run([Variant("mean")])
    nll = mean.mean_of_groups(mean.nll)
    for record, value in zip(records, nll.tolist(), strict=True):
        row = own.tokenize_prompt(record)
        with torch.no_grad():
            model = evaluation.model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        assert value == pytest.approx(model.loss.item(), abs=1e-4)


@pytest.fixture(scope="module")
def scores(evaluation: Evaluation) -> list[Scores]:
    return evaluation.run(ROWS, DRAWS)


def each_draw(evaluation: Evaluation, posterior: Posterior | None, draws: int) -> Tensor:
    """Return probabilities (draws, predictions, classes); of one draw those of the mean."""
    if posterior is None:
        return draw_probabilities(evaluation.base_model, evaluation.items, None, [{}])
    drawn = [posterior.sample(5, member) for member in range(draws)] if draws > 1 else [posterior.mean]
    return draw_probabilities(evaluation.base_model, evaluation.items, evaluation.posterior.folder, drawn)


def is_by_hand(
    score: Scores, evaluation: Evaluation, posterior: Posterior | None, draws: int, temperature: float = 1
) -> None:
    """Check scores against the average over `draws` of `posterior`; of the base model without one."""
    p = each_draw(evaluation, posterior, draws).mean(0) ** (1 / temperature)
    group = torch.tensor([i for i, item in enumerate(evaluation.items) for _ in item.targets])
    target = torch.tensor([target for item in evaluation.items for target in item.targets])
    expected = Scores.of(p / p.sum(1, keepdim=True), target, group=group)
    order = score.group.argsort(stable=True)
    assert score.group[order].equal(group)
    for name in ("confidence", "nll", "brier", "entropy"):
        torch.testing.assert_close(getattr(score, name)[order], getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_every_variant_is_what_peft_gives_one_prompt_at_a_time(evaluation: Evaluation, scores: list[Scores]) -> None:
    q = evaluation.posterior
    sources = {
        "base": (None, 1),
        "mean": (q, 1),
        "mean-pruned": (q.prune(0.3), 1),
        "posterior": (q.temper(0.5), 3),
        "posterior-pruned": (q.prune(0.3).temper(0.5), 3),
    }
    assert [row.name for row in ROWS] == list(sources)
    for row, score in zip(ROWS, scores, strict=True):
        is_by_hand(score, evaluation, *sources[row.name])
        if row.name.startswith("posterior"):
            assert (score.entropy - score.expected_entropy).min() > 0  # Jensen: draws that differ disagree
        else:
            assert score.entropy.equal(score.expected_entropy)
        if evaluation.task == "generate":
            assert score.probabilities is None
        else:
            torch.testing.assert_close(score.probabilities.max(1).values, score.confidence)


def test_draws_disagree_by_mutual_information_and_variance(evaluation: Evaluation, scores: list[Scores]) -> None:
    found = next(score for row, score in zip(ROWS, scores, strict=True) if row.name == "posterior")
    draws = each_draw(evaluation, evaluation.posterior.temper(0.5), 3)
    order = found.group.argsort(stable=True)
    expected = torch.special.entr(draws).sum(2).mean(0)
    torch.testing.assert_close(found.expected_entropy[order], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance[order], draws.var(0, correction=0).sum(1), rtol=1e-2, atol=1e-7)
    # What the averaging gains in the Brier score.
    target = torch.tensor([target for item in evaluation.items for target in item.targets])
    one_hot = nn.functional.one_hot(target, draws.shape[2])
    gain = (draws - one_hot).square().sum(2).mean(0) - found.brier[order]
    torch.testing.assert_close(found.variance[order], gain, rtol=1e-2, atol=1e-5)


def test_a_temperature_takes_no_pass_of_its_own(evaluation: Evaluation) -> None:
    rows = [
        Variant("mean"),
        Variant("hot", temperature=3.0),
        Variant("posterior", tau=0.5),
        Variant("cold", tau=0.5, temperature=0.5),
    ]
    heard = Heard()
    _, hot, _, cold = evaluation.run(rows, DRAWS, heard)
    assert sum(count for count, _ in heard.counts["evaluating"]) == 4 * len(evaluation.items)
    is_by_hand(hot, evaluation, evaluation.posterior, 1, temperature=3.0)
    is_by_hand(cold, evaluation, evaluation.posterior.temper(0.5), 3, temperature=0.5)
    assert metrics(hot)["mutual_information"] == 0
    assert metrics(cold)["mutual_information"] is None  # that is of draws, and nobody scaled a draw


def test_temperatures_are_fitted_on_the_other_file(tiny_adapter: Path, tmp_path: Path, chats: Path) -> None:
    valid = write_chats(tmp_path / "valid.jsonl", 30, seed=8)
    for task in ("choice", "generate"):
        evaluation = Evaluation(tiny_adapter, EvaluationData([chats], task=task, calibrate=valid))
        assert len(evaluation.items) == 24
        assert len(evaluation.held_out) == 30
        plain = [Variant("mean"), Variant("posterior", tau=0.5)]
        fitted = evaluation.temperatures(plain, Sampling(samples=2, seed=5))
        assert [row.name for row in fitted] == ["mean+temperature", "posterior+temperature"]
        alone = Evaluation(tiny_adapter, EvaluationData([valid], task=task))

        def nll(row: Variant, factor: float, alone: Evaluation = alone) -> float:
            [score] = alone.run([replace(row, temperature=row.temperature * factor)], Sampling(samples=2, seed=5))
            return metrics(score)["nll"]

        for row in fitted:
            if row.temperature not in TEMPERATURES:
                assert nll(row, 1) < min(nll(row, 0.9), nll(row, 1.1))
    with pytest.raises(IVONError, match="calibrate fits a temperature for mean and posterior"):
        run(tiny_adapter, EvaluationData([chats], calibrate=valid), VariantChoice(["base"]))


def test_temperatures_are_fitted_on_what_fits_the_memory(
    tiny_adapter: Path, tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = write_chats(tmp_path / "valid.jsonl", 30, seed=8)
    evaluation = Evaluation(tiny_adapter, EvaluationData([chats], calibrate=valid))
    monkeypatch.setattr("axolotl_ivon.evaluation.evaluate._AVERAGES", 2 * 11)
    heard = Heard()
    [few] = evaluation.temperatures([Variant("mean")], reporter=heard)
    assert "first 11 examples" in heard.notes[0]
    first = tmp_path / "first.jsonl"
    first.write_text("".join(valid.read_text().splitlines(keepends=True)[:11]))
    [same] = Evaluation(tiny_adapter, EvaluationData([chats], calibrate=first)).temperatures([Variant("mean")])
    assert few.temperature == pytest.approx(same.temperature, rel=1e-4)


@pytest.mark.parametrize("name", ["ood", "calibrate"])
def test_other_files_are_other_data_with_the_same_choices(
    tiny_adapter: Path, tmp_path: Path, chats: Path, name: str
) -> None:
    copy, strange = tmp_path / "copy.jsonl", tmp_path / "strange.jsonl"
    copy.write_text("\n".join(reversed(chats.read_text().splitlines())))
    strange.write_text(write_chats(strange, 9, seed=3).read_text().replace('"A"', '"C"'))
    for path, message in (
        (chats, "it has the same questions as data .*chats.jsonl"),
        (copy, "it has the same questions as data .*chats.jsonl"),
        *([(strange, r"the answer 'C' .*strange.jsonl:\d+.* the choices A,B of data")] if name == "calibrate" else []),
        (tmp_path / "nowhere.jsonl", "there is no such file"),
    ):
        with pytest.raises(IVONError, match=f"{name} .*{message}"):
            Evaluation(tiny_adapter, EvaluationData([chats], **{name: [path] if name == "ood" else path}))


def test_averages_that_do_not_fit_are_made_in_chunks(
    evaluation: Evaluation, scores: list[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("axolotl_ivon.evaluation.evaluate._AVERAGES", 40 * len(evaluation.choices or range(400)))
    heard = Heard()
    close(evaluation.run(ROWS, DRAWS, heard), scores)
    assert sum(count for count, _ in heard.counts["evaluating"]) == 9 * len(evaluation.items)


def test_the_tokenizers_padding_side_does_not_matter(
    tiny_adapter: Path, chats: Path, scores: list[Scores], evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerBase, "padding_side", "left")
    other = Evaluation(tiny_adapter, EvaluationData([chats], task=evaluation.task))
    assert other.reader.tokenizer.padding_side != evaluation.reader.tokenizer.padding_side
    close(other.run(ROWS, DRAWS), scores)


def test_infinite_tau_is_the_mean_to_the_last_bit(evaluation: Evaluation) -> None:
    mean, cold, still = evaluation.run(
        [Variant("mean"), Variant("posterior", tau=math.inf), Variant("mean")], Sampling(samples=7)
    )
    assert mean.nll.equal(cold.nll)
    assert mean.nll.equal(still.nll)
    # Draws of no width, really averaged, are the mean too.
    q = evaluation.posterior.temper(math.inf)
    [drawn] = evaluation.run([Variant("posterior", tau=1)], Sampling(samples=7), posterior=q)
    for name in ("confidence", "nll", "brier", "entropy", "expected_entropy"):
        assert getattr(drawn, name).equal(getattr(mean, name))


def test_rows_share_draws_and_take_no_extra_pass(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, float]] = []
    sample = Posterior.sample

    def spy(self: Posterior, seed: int = 0, member: int = 0) -> dict[str, Tensor]:
        seen.append((seed, member, self.tau))
        return sample(self, seed, member)

    monkeypatch.setattr(Posterior, "sample", spy)
    calls = []
    forward = evaluation.model.forward
    monkeypatch.setattr(evaluation.model, "forward", lambda **kw: calls.append(len(kw["input_ids"])) or forward(**kw))
    grid = [Variant("", tau=tau, ratio=ratio) for tau in (0.5, 2.0, math.inf) for ratio in (0.0, 0.2)]
    heard = Heard()
    evaluation.run(grid, Sampling(samples=3, seed=9, batch_size=6), heard)
    assert sorted(set(seen)) == [(9, member, tau) for member in range(3) for tau in (0.5, 2.0)]
    assert sum(count for count, _ in heard.counts["evaluating"]) == 14 * 24  # no more than 6 points × 3 draws
    assert len(calls) <= 14 * (24 // 6 + 1)  # the batches, and the common prefix


def fingerprint(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_model_and_files_are_left_as_they_were(tiny_adapter: Path, chats: Path) -> None:
    files = {path: path.read_bytes() for path in tiny_adapter.iterdir()}
    evaluation = Evaluation(tiny_adapter, EvaluationData([chats]))
    model = evaluation.model
    model.train()
    model.get_submodule("base_model.model.lm_head").eval()
    before = fingerprint(model)
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    forwards = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    evaluation.run(ROWS, Sampling(samples=2, draws_per_pass=2))
    assert fingerprint(model) == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == gradients
    assert {name for name, module in model.named_modules() if "forward" in module.__dict__} == forwards
    assert {path: path.read_bytes() for path in tiny_adapter.iterdir()} == files


def test_an_interrupted_evaluation_leaves_the_model_too(evaluation: Evaluation) -> None:
    before = fingerprint(evaluation.model)

    class Interrupting(Reporter):
        def advance(self, doing: str, count: int, total: int) -> None:
            if count:
                raise KeyboardInterrupt

    for at_once in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            evaluation.run([Variant("", tau=1)], Sampling(samples=2, draws_per_pass=at_once), Interrupting())
    assert fingerprint(evaluation.model) == before
    assert torch.is_grad_enabled()


def test_an_adapter_without_sigma_has_a_base_and_a_mean(plain_adapter: Path, chats: Path) -> None:
    base, mean, *_ = ROWS
    assert len(Evaluation(plain_adapter, EvaluationData([chats]), [base, mean]).run([base, mean])) == 2
    with pytest.raises(IVONError, match="evaluate its mean with `ivon-post eval` and rows base,mean"):
        Evaluation(plain_adapter, EvaluationData([chats]), ROWS)


# One begins another, and "yes" begins three; the third is one token.
LABELS = ["yes no", "yes no bird", "A", "yes sun", "dog cat"]


def write_labels(path: Path) -> Path:
    questions = ["red sun", "one two three four five", "moon", "A B C D", "yes no", "good", "bad rain dog", "red sun"]
    lines = [json.dumps(chat(question, LABELS[n % len(LABELS)])) for n, question in enumerate(questions)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("lines", [True, False])
def test_labels_may_be_scored_by_the_mean_over_their_tokens(
    tiny_adapter: Path, tmp_path: Path, lines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lines:
        monkeypatch.setattr("axolotl_ivon.evaluation.predict.Predictor._attends", lambda *_: False)
    data = EvaluationData([write_labels(tmp_path / "data.jsonl")], task="choice", by_length=True)
    evaluation = Evaluation(tiny_adapter, data)
    [mean] = evaluation.run([Variant("mean")], DRAWS)
    is_by_hand(mean, evaluation, evaluation.posterior, 1)
    [summed] = Evaluation(tiny_adapter, replace(data, by_length=False)).run([Variant("mean")], DRAWS)
    assert not torch.allclose(mean.nll, summed.nll, atol=1e-3)


@pytest.mark.parametrize("per_pass", [1, 2])
@pytest.mark.parametrize("prefix", [2, 10**6])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_labels_of_several_tokens_run_once_in_the_pass_of_the_prompt(
    tiny_adapter: Path, tmp_path: Path, attention: str, prefix: int, per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("axolotl_ivon.evaluation.predict._MIN_PREFIX", prefix)
    evaluation = Evaluation(tiny_adapter, EvaluationData([write_labels(tmp_path / "data.jsonl")], task="choice"))
    evaluation.model.base_model.model.set_attn_implementation(attention)
    sizes: list[int] = []
    forward = evaluation.model.forward
    monkeypatch.setattr(
        evaluation.model, "forward", lambda **kw: sizes.append(kw["input_ids"].numel()) or forward(**kw)
    )
    rows = [Variant("base", base=True), Variant("mean"), Variant("posterior", tau=0.5)]
    heard = Heard()
    base, mean, drawn = evaluation.run(rows, replace(DRAWS, draws_per_pass=per_pass, batch_size=1), heard)
    nodes = len({label[:n] for label in evaluation.items[0].candidates or () for n in range(1, len(label))})
    tokens = sum(len(item.ids) + nodes for item in evaluation.items)
    if prefix > 2:  # each token of prompt and labels once in each of 5 passes, and the trial on the shortest prompt
        assert 5 * tokens < sum(sizes) < 5.4 * tokens
    for score, posterior, draws in (
        (base, None, 1),
        (mean, evaluation.posterior, 1),
        (drawn, evaluation.posterior.temper(0.5), 3),
    ):
        is_by_hand(score, evaluation, posterior, draws)
    close(evaluation.run(rows, replace(DRAWS, draws_per_pass=per_pass)), [base, mean, drawn])


@pytest.mark.parametrize(
    "config",
    [
        # Every second layer forgets the common prefix, which then must not be cut off.
        Gemma2Config(sliding_window=3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=400,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=8),
        # Positions are absolute, and the layers transposed.
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400),
    ],
    ids=["gemma2", "gpt2"],
)  # fmt: skip
@pytest.mark.parametrize("task", ["choice", "labels", "generate"])
def test_other_architectures(
    tmp_path: Path, tiny_llama: Path, chats: Path, config: PretrainedConfig, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("axolotl_ivon.evaluation.predict._MIN_PREFIX", 2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    modules = ["c_attn"] if config.model_type == "gpt2" else ["q_proj"]
    adapter = with_sigma(build_lora(tmp_path / "base", tmp_path / "adapter", target_modules=modules))
    path, task = (write_labels(tmp_path / "labels.jsonl"), "choice") if task == "labels" else (chats, task)
    evaluation = Evaluation(adapter, EvaluationData([path], task=task))
    rows = [Variant("mean"), Variant("posterior", tau=0.1)]
    mean, drawn = evaluation.run(rows, DRAWS)
    is_by_hand(mean, evaluation, evaluation.posterior, 1)
    is_by_hand(drawn, evaluation, evaluation.posterior.temper(0.1), 3)
    close(evaluation.run(rows, Sampling(samples=3, seed=5, draws_per_pass=2, batch_size=5)), [mean, drawn])


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_quantized_bases(tmp_path: Path, chats: Path, load_in: str) -> None:
    base = build_llama(tmp_path / "base", hidden_size=128, intermediate_size=128)
    adapter = with_sigma(build_lora(base, tmp_path / "adapter"))
    evaluation = Evaluation(adapter, EvaluationData([chats]), loading=Loading(load_in=load_in))
    layer = evaluation.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert load_in in type(layer).__name__
    exact = Evaluation(adapter, EvaluationData([chats])).run(ROWS, Sampling(samples=2))
    found = evaluation.run(ROWS, Sampling(samples=2))
    close(found, exact, tolerance=0.1)
    close(evaluation.run(ROWS, Sampling(samples=2, draws_per_pass=2)), found, tolerance=0.01)


def test_tokens_that_training_added(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<|mood|>"])
    path = tmp_path / "data.jsonl"
    path.write_text(chats.read_text().replace('"content": "', '"content": "<|mood|>'))
    for saved in (["embed_tokens", "lm_head"], None):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        base.resize_token_embeddings(len(tokenizer))
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
        folder = tmp_path / f"adapter-{bool(saved)}"
        get_peft_model(base, lora).save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
    data, mean = EvaluationData([path], task="generate"), [Variant("mean")]
    evaluation = Evaluation(tmp_path / "adapter-True", data, mean)
    assert evaluation.model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    evaluation.run(mean)
    with pytest.raises(IVONError, match="is new to the base model"):
        Evaluation(tmp_path / "adapter-False", data, mean)


def test_a_classification_head(tmp_path: Path, tiny_llama: Path) -> None:
    folder = with_sigma(build_classifier(tiny_llama, tmp_path / "head"))
    path = tmp_path / "data.jsonl"
    texts = ["red sun", "moon", "cold dog cat bird", "yes no"]
    path.write_text("".join(f'{{"text": "{text}", "label": {i % 3}}}\n' for i, text in enumerate(texts)))
    heard = Heard()
    evaluated = run(folder, EvaluationData([path]), sampling=Sampling(samples=4), reporter=heard)
    assert (evaluated.record.task, evaluated.record.choices) == ("classify", ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert [row.name for row in evaluated.record.rows] == ["mean", "posterior"]
    assert heard.notes == ["no row for the base model: its classification head is not trained"]
    mean, drawn = evaluated.scores
    assert (drawn.entropy > drawn.expected_entropy).all()
    right = class_probabilities(tiny_llama, texts, folder)[range(4), [0, 1, 2, 0]]
    torch.testing.assert_close((-mean.nll).exp(), right[mean.group].double(), rtol=1e-4, atol=0)
    other = tmp_path / "other.jsonl"  # of another set of labels
    rows = [{"text": f"{text} rain", "label": label} for text, label in zip(texts, "weEr", strict=True)]
    other.write_text("\n".join(map(json.dumps, rows)))
    beside = run(folder, EvaluationData([path], [other]), sampling=Sampling(samples=4))
    assert {row.data for row in beside.record.ood} == {str(other)}


class Linear(nn.Module):
    """Two logits, (f(x), 0): f is linear in LoRA's A, so over a Gaussian A it is Gaussian."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs
        self.layer = nn.Linear(inputs.shape[1], 1, bias=False)
        self.config = SimpleNamespace(num_labels=2, pad_token_id=0)
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        f = self.layer(self.inputs[input_ids[:, 0]])
        return SimpleNamespace(logits=torch.cat([f, torch.zeros_like(f)], 1))


def test_many_draws_of_a_linear_gaussian_model_give_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, 5, generator=generator)
    model = get_peft_model(Linear(inputs), LoraConfig(r=1, lora_alpha=1, target_modules=["layer"]))
    keys = list(AdapterSlots(model).places)
    a_key, b_key = (next(key for key in keys if part in key) for part in ("lora_A", "lora_B"))
    mean = {a_key: torch.randn(1, 5, generator=generator), b_key: torch.ones(1, 1)}
    sigma = {a_key: torch.rand(1, 5, generator=generator) + 0.5, b_key: torch.zeros(1, 1)}
    posterior = Posterior(mean, sigma, {}, {})
    items = [EncodedExample([i], [0], [0]) for i in range(len(inputs))]
    draws = 4000
    tau = 0.7
    row = Variant("posterior", tau=tau)
    [scores] = evaluate(model, posterior, items, [row], "classify", Sampling(samples=draws, draws_per_pass=100))
    with torch.no_grad():
        mu = (inputs @ model.base_model.model.layer.base_layer.weight.T + inputs @ mean[a_key].T).squeeze(1).double()
    sd = (inputs.square() @ sigma[a_key].square().T).squeeze(1).double().div(tau).sqrt()
    # E[sigmoid(N(μ, s²))] by quadrature on a fine grid.
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    values = torch.sigmoid(mu[:, None] + sd[:, None] * z)
    expected = values @ density
    spread = ((values.square() @ density) - expected.square()).sqrt() / math.sqrt(draws)
    found = (-scores.nll).exp()
    assert ((found - expected).abs() < 4 * spread).all()
    # The test has teeth: neither the mean's prediction nor τ the wrong way round would pass.
    wrong = torch.sigmoid(mu[:, None] + sd[:, None] * tau * z) @ density
    assert ((torch.sigmoid(mu) - expected).abs() > 4 * spread).any()
    assert ((wrong - expected).abs() > 4 * spread).any()


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 5}, {"draws_per_pass": 2}, {"draws_per_pass": 3, "batch_size": 7}],
    ids=str,
)
def test_batches_and_stacked_draws_change_nothing(
    evaluation: Evaluation, scores: list[Scores], options: dict[str, int]
) -> None:
    close(evaluation.run(ROWS, Sampling(samples=3, seed=5, **options)), scores)


@pytest.mark.parametrize("name", NAMES)
def test_the_common_prefix_runs_once_and_the_cache_may_have_either_name(
    evaluation: Evaluation, scores: list[Scores], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = rename_cache(evaluation.model, name, monkeypatch)
    monkeypatch.setattr("axolotl_ivon.evaluation.predict._MIN_PREFIX", 2)
    close(evaluation.run(ROWS, DRAWS), scores)
    # The prefix ran by itself, and what followed it without it.
    prefix = common_length([item.ids for item in evaluation.items])
    assert lengths.count(prefix) > 1
    assert max(lengths) == max(len(item.ids) for item in evaluation.items) - prefix
    monkeypatch.setattr("axolotl_ivon.evaluation.predict._MIN_PREFIX", 10**6)
    close(evaluation.run(ROWS, DRAWS), scores)
    assert max(lengths) == max(len(item.ids) for item in evaluation.items)


def test_out_of_memory_halves_the_batch(
    evaluation: Evaluation, scores: list[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = evaluation.model.forward

    def small(**inputs: Tensor) -> object:
        if len(inputs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(evaluation.model, "forward", small)
    heard = Heard()
    close(evaluation.run(ROWS, DRAWS, heard), scores)
    assert heard.notes[0].startswith("out of memory with 24 prompts in a batch; going on with 12")
    assert len(heard.notes) <= 4  # what was learned is remembered in the later batches and passes
    monkeypatch.setattr(evaluation.model, "forward", lambda **_: small(input_ids=torch.zeros(99, 1)))
    with pytest.raises(IVONError, match="out of memory with a single prompt"):
        evaluation.run(ROWS, Sampling(samples=3))


def test_every_line_says_what_the_scores_say(
    evaluation: Evaluation, scores: list[Scores], chats: Path, tmp_path: Path
) -> None:
    save_lines(tmp_path / "out.jsonl", describe(evaluation, ROWS, scores))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    examples = read_examples(chats)
    assert [(line["data"], line["line"]) for line in lines] == [(str(chats), n) for n in range(1, 25)]
    for number, (line, example, item) in enumerate(zip(lines, examples, evaluation.items, strict=True)):
        assert (line["question"], line["answer"]) == (example.messages[-1]["content"], example.answer)
        assert list(line["rows"]) == [row.name for row in ROWS]
        for score, found in zip(scores, line["rows"].values(), strict=True):
            own = score.group == number
            for name, values in (
                ("confidence", score.confidence),
                ("nll", score.nll),
                ("entropy", score.entropy),
                ("mutual_information", score.entropy - score.expected_entropy),
            ):
                assert found[name] == pytest.approx(values[own].mean().item(), abs=1e-12)
            share = score.correct[own].mean().item()
            if evaluation.task == "generate":
                assert (found["tokens"], found["accuracy"]) == (len(item.targets), pytest.approx(share))
                continue
            assert sum(found["probabilities"].values()) == pytest.approx(1)
            assert found["probabilities"][found["prediction"]] == found["confidence"]
            assert found["right"] == (found["prediction"] == example.answer) == bool(share)
