"""What a run recommends at its end: held against the saved adapter, scored anew by PEFT, and against what must win."""

from __future__ import annotations

import json
import logging
import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import WORDS, chat
from trainers import before_every_loss, lora_weights, same
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from axolotl_ivon import Posterior, attach
from axolotl_ivon.decisions.recommendation import recommended_for
from axolotl_ivon.metrics.bootstrap import compare
from axolotl_ivon.metrics.scores import Scores
from axolotl_ivon.records.recommendation import Recommendation, Sizes
from axolotl_ivon.training.calibration import DRAWS, TEMPERATURES, _advice, _choose, _Column, _mean_of_groups

ROWS = torch.randint(3, 40, (120, 9), generator=torch.Generator().manual_seed(2))
ROWS[:, 5:] = 7  # what the model is sure of too early
DATA = Dataset.from_list([{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in ROWS.tolist()])
RUN = {"max_steps": 60, "per_device_train_batch_size": 8, "save_strategy": "no", "learning_rate": 2e-4}
PASSES = 1 + 3 * DRAWS  # what a run must have seen for all of them: 120·25/0.2


def train(attached: Any, folder: str = "", settings: Any = None, rows: int = 120, **changes: Any) -> Any:
    trainer = attached({"gamma": 30.0, **(settings or {})}, folder, **{**RUN, **changes})
    trainer.eval_dataset = DATA.select(range(rows))
    trainer.train()
    trainer.save_model()
    return trainer


@torch.no_grad()
def nll_of(model: Any, rows: list[int], temperature: float) -> float:
    ids = ROWS[rows]
    logs = (model(input_ids=ids).logits[:, 3:-1].float() / temperature).log_softmax(-1)
    return -float(logs.gather(-1, ids[:, 4:, None]).mean())


def minus_log_prior(temperature: float) -> float:
    return math.log(temperature) ** 2 / 2 / 0.3**2


def test_it_is_what_the_saved_adapter_does(attached: Any, tiny_llama: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    trainer = train(attached)
    recommendation = Recommendation.load(tmp_path / "recommended.json", "recommended")
    posterior = Posterior.from_pretrained(tmp_path)
    assert recommendation.mean_sha256 == posterior.metadata["mean_sha256"]
    taken = recommended_for(tmp_path)
    assert taken
    assert (taken.tau, taken.rule.temperature) == (recommendation.tau, recommendation.temperature)
    assert recommendation.draws is None, "480 examples are too few for draws to be tried"
    not_tried = "; draws were not tried, since the run is too short for that"
    assert recommendation.verdict.text.endswith(not_tried)
    assert not_tried in caplog.text
    assert f"calibrated on {96} evaluation examples: the mean" in caplog.text
    assert (recommendation.task, " per token)" in caplog.text) == ("generate", True)
    assert "accuracy" not in recommendation.describe(), "of tokens it says nothing about a text"
    assert recommendation.sentences()[0] in (tmp_path / "README.md").read_text()
    # The examples and the halves are drawn by the run's seed.
    places = sorted(torch.randperm(120, generator=torch.Generator().manual_seed(5))[:96].tolist())
    places.sort(key=lambda i: zlib.crc32(ROWS[i].numpy().tobytes()))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(5)).tolist()
    choose, report = ([places[i] for i in half] for half in (order[:48], order[48:]))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path).eval()

    def best(rows: list[int]) -> float:
        labels = len(rows) * ROWS[0, 4:].numel()
        return min(TEMPERATURES, key=lambda t: labels * nll_of(model, rows, t) + minus_log_prior(t))

    assert recommendation.temperature == best(places) != 1, "all choose T"
    assert recommendation.mean_reported_on.nll == pytest.approx(nll_of(model, report, 1.0), rel=1e-4)
    reported = nll_of(model, report, best(choose))
    assert recommendation.reported_on.nll == pytest.approx(reported, rel=1e-4)
    # Nothing of it changes what was trained.
    without = train(attached, "without", {"calibrate": False})
    assert not (tmp_path / "without/recommended.json").exists()
    assert same(lora_weights(without.model), lora_weights(trainer.model))


@pytest.mark.parametrize(
    ("labels", "collator"),
    [(("A", "yes", "yes no"), DataCollatorForSeq2Seq), (("A", "yes"), DataCollatorWithFlattening)],
)
def test_where_answers_are_labels_it_is_the_choice_between_them(
    labels: tuple[str, ...],
    collator: Any,
    made: Any,
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second collator packs the rows of a batch into one."""
    caplog.set_level(logging.INFO)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    asked = [
        chat(f"{WORDS[n % 7]} {WORDS[n % 11]} {WORDS[n % 13]}", labels[n * n % 7 % len(labels)])["messages"]
        for n in range(90)
    ]
    rows = []
    for question, answer in asked:
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template([question, answer], return_dict=False)
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    trainer = made(**{**RUN, "max_steps": 72, "learning_rate": 2e-4})
    packs = collator is DataCollatorWithFlattening
    trainer.processing_class, trainer.data_collator = tokenizer, collator() if packs else collator(tokenizer)
    unknown = [{**rows[0], "labels": [-100 if id == -100 else 9 for id in rows[0]["labels"]]}] * 3
    trainer.train_dataset, trainer.eval_dataset = Dataset.from_list(rows), Dataset.from_list(rows + unknown)
    attach(trainer, gamma=30.0)
    trainer.train()
    trainer.save_model()
    recommendation = Recommendation.load(tmp_path / "recommended.json", "recommended")
    assert recommendation.task == "choice"
    assert "calibrated on 90 evaluation examples" in caplog.text
    assert ("accuracy" in recommendation.describe()) == (len(labels) == 2), "of two steps it takes other paths as well"
    assert "per token" not in caplog.text + recommendation.describe()
    # A or yes, and after yes whether it ends.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path).eval()
    [a], [yes, no] = (tokenizer(text)["input_ids"] for text in ("A", "yes no"))
    right, nll = [], []
    for row, (_, answer) in zip(rows, asked, strict=True):
        begin = row["labels"].count(-100)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, begin - 1 : begin + 1]
        is_yes, goes_on = (logits[0, [a, yes]].softmax(0)[1], logits[1, [tokenizer.eos_token_id, no]].softmax(0)[1])
        goes_on = goes_on if len(labels) == 3 else torch.tensor(0.0)
        p = {"A": 1 - is_yes, "yes": is_yes * (1 - goes_on), "yes no": is_yes * goes_on}[answer["content"]]
        nll.append(-math.log(p))
        right.append(bool(p > 0.5))
    at_1 = recommendation.mean_reported_on
    assert recommendation.examples == Sizes(chosen_on=45, reported_on=45)
    places = sorted(range(90), key=lambda i: zlib.crc32(torch.tensor(rows[i]["input_ids"]).numpy().tobytes()))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5)).tolist()
    report = [places[i] for i in order[45:]]
    assert at_1.nll == pytest.approx(sum(nll[i] for i in report) / 45, rel=1e-4)
    if len(labels) == 2:
        assert at_1.accuracy == pytest.approx(sum(right[i] for i in report) / 45)


@pytest.mark.parametrize(("sharper", "words"), [(40.0, "so high a T means that it is overfitted"), (1.0, "")])
def test_a_t_far_above_1_says_that_the_run_was_too_long(
    sharper: float, words: str, attached: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = attached({"gamma": 30.0}, **{**RUN, "learning_rate": 1e-6})
    trainer.model.get_output_embeddings().weight.data.mul_(sharper)
    trainer.eval_dataset = DATA.select(range(120))
    trainer.train()
    [text] = [text for text in caplog.messages if text.startswith("calibrated on")]
    assert words in text
    assert ("so high a T" in text) == bool(words)
    recommendation = trainer.posterior_training.recommendation
    run = trainer.posterior_training
    for tau, temperature, expected in ((math.inf, 0.6, "more to learn"), (math.inf, 1.4, ""), (1.0, 0.6, "")):
        advice = _advice(recommendation.model_copy(update={"tau": tau, "temperature": temperature}), run)
        assert ("more to learn" in advice) == bool(advice) == bool(expected and words)  # of a model at chance, nothing


@pytest.mark.parametrize(
    ("settings", "rate", "words"),
    [
        ({}, 2e-4, "a learning_rate of 0.00055, which is usual for this model, or more steps"),
        ({}, 6e-4, "a higher learning_rate, or more steps"),
        ({}, 0.0, "more steps, or a learning_rate above 0.00055, which it took"),
        ({}, 5.5e-4, "a higher learning_rate, or more steps"),
        ({"direction": "newton"}, 2e-4, "a higher learning_rate, or more steps"),
        ({"preset": "paper"}, 2e-4, "a higher learning_rate, or more steps"),
    ],
)
def test_who_has_more_to_learn_is_told_the_usual_rate(settings: Any, rate: float, words: str, attached: Any) -> None:
    unsure = SimpleNamespace(
        tau=math.inf, temperature=0.6, mean_reported_on=SimpleNamespace(nll=0.5), reported_on=SimpleNamespace(nll=0.4)
    )
    trainer = attached(settings, learning_rate=rate)
    trainer.create_optimizer_and_scheduler(120)  # of 24 examples: twenty epochs
    advice = _advice(unsure, trainer.posterior_training)
    assert advice == f"; so low a T means that there is more to learn: try {words}"


def test_draws_are_tried_in_a_longer_run_and_are_those_of_the_posterior(attached: Any, tmp_path: Path) -> None:
    trainer = attached({"gamma": 30.0}, **{**RUN, "max_steps": 1})
    trainer.eval_dataset = DATA.select(range(60))
    trainer.train()
    run = trainer.posterior_training
    ways = []

    def draw(number: int, tau: float = 1.0, own: Any = run.optimizer.evaluation_draw) -> Any:
        ways.append((number, tau))
        return own(number, tau)

    run.optimizer.evaluation_draw = draw
    before = lora_weights(trainer.model)
    line = run._calibrate(60 * PASSES * 5)
    assert line.startswith("calibrated on 60")
    assert "not tried" not in line
    assert {tau for _, tau in ways} == {1.0, 4.0, 16.0}
    assert {number for number, _ in ways} == set(range(DRAWS))
    assert run.recommendation.draws is not None
    assert same(before, lora_weights(trainer.model))
    param = next(iter(run.params.values()))
    with run.optimizer.evaluation_draw(0, 1.0):
        wide = param.detach() - before[next(iter(run.params))]
    with run.optimizer.evaluation_draw(0, 4.0):
        narrow = param.detach() - before[next(iter(run.params))]
    torch.testing.assert_close(narrow * 2, wide, rtol=1e-3, atol=1e-6)


def test_the_tau_of_draws_comes_on_top_of_the_one_that_training_chose(attached: Any, tmp_path: Path) -> None:
    trainer = attached({}, **{**RUN, "max_steps": 1})
    trainer.eval_dataset = DATA.select(range(60))
    trainer.train()
    trainer.posterior_training._calibrate(60 * PASSES * 5)
    trainer.save_model()
    recommendation, taken = Recommendation.load(tmp_path / "recommended.json", "recommended"), recommended_for(tmp_path)
    draws, saved = recommendation.draws, Posterior.from_pretrained(tmp_path)
    assert recommendation.sigma_sha256 == saved.metadata["sigma_sha256"]
    assert saved.training_tau > 1
    assert draws
    assert taken
    assert taken.for_draws().tau == pytest.approx(draws.tau)


def test_the_best_checkpoint_is_calibrated_where_it_is_kept(attached: Any, tiny_llama: Path, tmp_path: Path) -> None:
    best = {"save_strategy": "steps", "save_steps": 20, "eval_strategy": "steps", "eval_steps": 20}
    trainer = attached({"gamma": 30.0}, **{**RUN, **best, "load_best_model_at_end": True, "metric_for_best_model": "x"})
    evaluate = trainer.evaluate
    worse = iter(range(9))  # so that the first checkpoint is the best
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_x": -next(worse)}
    trainer.args.greater_is_better = True
    trainer.eval_dataset = DATA
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    recommendation = Recommendation.load(tmp_path / "out/recommended.json", "recommended")
    kept, first = (Posterior.from_pretrained(tmp_path / name) for name in ("out", "checkpoint-20"))
    assert recommendation.mean_sha256 == kept.metadata["mean_sha256"] == first.metadata["mean_sha256"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "checkpoint-20")
    everything = nll_of(model.eval(), list(range(120)), 1.0)
    assert recommendation.mean_reported_on.nll == pytest.approx(everything, rel=0.05)
    run = trainer.posterior_training
    name, param = next(iter(run.params.items()))
    with run.optimizer.evaluation_draw(0, 1e12):
        torch.testing.assert_close(param, first.mean[name.replace(".default", "")], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "changes", "line"),
    [
        (30, {}, "30 evaluation examples tell little; 60 are needed"),
        (120, {"max_steps": 3}, "a tenth of this short run's time is too little"),
        (None, {}, "set val_set_size or test_datasets"),
    ],
)
def test_why_a_run_is_not_calibrated(
    attached: Any, tmp_path: Path, caplog: Any, rows: int | None, changes: Any, line: str
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "recommended.json").write_text("{}")  # of an earlier adapter in this folder
    trainer = attached(**{**RUN, "max_steps": 40, **changes})
    trainer.eval_dataset = None if rows is None else DATA.select(range(rows))
    trainer.train()
    trainer.save_model()
    assert caplog.messages[-1].startswith("not calibrated: ")
    assert line in caplog.messages[-1]
    # `attach` logs at a level that is shown what whoever gave evaluation data does not expect.
    assert caplog.records[-1].levelno == (logging.INFO if rows is None else logging.WARNING)
    assert not (tmp_path / "recommended.json").exists()
    assert Posterior.from_pretrained(tmp_path).sigma


def test_the_examples_in_packed_rows_count_each(attached: Any, tmp_path: Path) -> None:
    """axolotl packs in its sampler: three steps see few rows, of forty times as many examples."""
    trainer = attached({"gamma": 30.0, "train_size": 40 * 24}, **{**RUN, "max_steps": 3})
    assert len(trainer.train_dataset) == 24
    trainer.eval_dataset = DATA
    trainer.train()
    assert trainer.posterior_training.recommendation.reported_on.nll


def test_the_examples_in_packed_rows_count_where_lambda_is_given(attached: Any) -> None:
    trainer = attached({"ess": 1e4}, **{**RUN, "max_steps": 3})
    trainer.train()
    trainer.train_dataset = range(960)  # three rows of 320 examples each were one epoch of them
    run = trainer.posterior_training
    assert run._examples_seen(trainer.args, trainer.state) == 960
    trainer.train_dataset = iter(range(960))
    assert run._examples_seen(trainer.args, trainer.state) == 3 * 8


def test_preferences_without_labels_are_no_warning(
    attached: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = attached(folder="a folder", **{**RUN, "max_steps": 40})
    trainer.eval_dataset = DATA.remove_columns("labels")
    trainer.train()
    assert "not calibrated: the evaluation data have no labels to predict" in caplog.messages[-1]
    assert caplog.records[-1].levelno == logging.INFO
    assert f"next: `ivon-post check '{tmp_path / 'a folder'}'`" in caplog.text


def test_rewards_without_calibration_are_no_warning(attached: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = attached(**{**RUN, "max_steps": 1})
    trainer.eval_dataset, trainer.reward_funcs = DATA, []
    trainer.train()
    assert "not calibrated: a run that learns from rewards" in caplog.messages[-1]
    assert caplog.records[-1].levelno == logging.INFO


def test_the_last_checkpoint_has_it_since_a_trainer_saves_nothing_else(
    attached: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = attached({"gamma": 30.0}, **{**RUN, "save_strategy": "steps", "save_steps": 40})
    trainer.eval_dataset = DATA
    trainer.train()
    assert not (tmp_path / "recommended.json").exists()
    assert not (tmp_path / "checkpoint-40/recommended.json").exists()
    last = tmp_path / "checkpoint-60"
    recommendation = Recommendation.load(last / "recommended.json", "recommended")
    assert recommendation.mean_sha256 == Posterior.from_pretrained(last).metadata["mean_sha256"]
    assert f"next: `ivon-post check {last}`" in caplog.text
    trainer.save_model()
    own = Recommendation.load(tmp_path / "recommended.json", "recommended")
    assert own == recommendation.model_copy(update={"adapter": tmp_path.name})


def test_what_fails_there_costs_nothing_that_was_trained(attached: Any, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    trainer = attached(**RUN)
    trainer.eval_dataset = DATA
    trainer.get_eval_dataloader = lambda *_: 1 / 0
    trainer.train()
    trainer.save_model()
    assert "not calibrated: division by zero" in caplog.text
    assert Posterior.from_pretrained(tmp_path).sigma
    assert not (tmp_path / "recommended.json").exists()


def columns(logits: torch.Tensor, target: torch.Tensor) -> list[_Column]:
    """What a way that gives these logits (examples, labels, classes) predicts."""
    scaled = [(logits.double() / t).log_softmax(-1) for t in TEMPERATURES]
    nll = torch.stack([-logs.gather(-1, target[..., None]).squeeze(-1) for logs in scaled], -1)
    confidence = torch.stack([logs.exp().amax(-1) for logs in scaled], -1)
    return [_Column(*each) for each in zip(nll, confidence, logits.argmax(-1) == target, strict=True)]


@pytest.mark.parametrize(
    ("sharpness", "draws", "tau", "temperature"),
    [
        (1.0, 1.0, math.inf, 1.0),  # calibrated, and draws that are the same
        (3.0, 3.0, math.inf, pytest.approx(3.0, rel=0.2)),  # too sure by a factor of three
        (3.0, 0.0, math.inf, pytest.approx(3.0, rel=0.2)),  # draws that know nothing
        (1.3, 1.3, math.inf, pytest.approx(1.3, rel=0.2)),  # a little too sure
        (0.2, None, 4.0, 1.0),  # draws that know what the mean does not
    ],
)
def test_what_is_recommended(sharpness: float, draws: float | None, tau: float, temperature: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(200, 3, 8, generator=generator)
    target = torch.multinomial(truth.flatten(0, 1).softmax(-1), 1, generator=generator).view(200, 3)
    mean = columns(truth * sharpness, target)
    if draws is None:
        other = columns(truth, target)
        mean = columns(torch.randn(200, 3, 8, generator=generator) * sharpness, target)
    else:
        other = columns(truth * draws, target)
    pairs = [list(pair) for pair in zip(mean, other, strict=True)]
    recommendation, line = _choose([math.inf, 4.0], pairs, seed=1)
    assert (recommendation.tau, recommendation.temperature) == (tau, temperature), line
    assert recommendation.draws.tau == 4.0
    assert [point.tau for point in recommendation.scaled] == [math.inf, 4.0]
    assert recommendation.scaled[1].temperature == recommendation.draws.temperature
    assert json.loads(json.dumps(recommendation.dump()))["tau"] == ("inf" if math.isinf(tau) else tau)


def overconfident(seed: int, examples: int) -> list[list[_Column]]:
    """What a mean that is 1.4 times too sure predicts for examples of one label."""
    generator = torch.Generator().manual_seed(seed)
    truth = 2 * torch.randn(examples, 1, 8, generator=generator)
    target = torch.multinomial(truth.flatten(0, 1).softmax(-1), 1, generator=generator).view(examples, 1)
    return [[column] for column in columns(1.4 * truth, target)]


def test_both_halves_choose_the_temperature_that_is_written() -> None:
    differ = 0
    for seed in range(20):
        data = overconfident(seed, 100)
        order = torch.randperm(100, generator=torch.Generator().manual_seed(1)).tolist()
        nll = torch.stack([data[i][0].nll[0] for i in order])
        prior = torch.tensor([minus_log_prior(t) for t in TEMPERATURES])
        half, both = (TEMPERATURES[int((part.sum(0) + prior).argmin())] for part in (nll[:50], nll))
        recommendation, line = _choose([math.inf], data, seed=1)
        assert recommendation.temperature in (1.0, both), line
        differ += recommendation.temperature == both != half
    assert differ >= 5


def test_of_too_few_examples_the_mean_gets_no_temperature() -> None:
    found = [_choose([math.inf], overconfident(0, count), seed=1)[0].temperature for count in (40, 200)]
    assert found[0] == 1 < found[1]


def test_the_error_of_a_mean_over_dependent_labels_is_the_bootstrap_s() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (80,), generator=generator).tolist()
    groups = [torch.randn(1, generator=generator) + 0.3 * torch.randn(k, generator=generator).double() for k in sizes]
    values, number = torch.cat(groups), torch.repeat_interleave(torch.arange(80), torch.tensor(sizes))
    zeros = torch.zeros_like(values)
    one, other = (Scores(zeros, zeros, nll, zeros, zeros, zeros, zeros, number) for nll in (values, zeros))
    difference, error = _mean_of_groups(groups)
    expected = compare(one, other)["nll"]
    assert difference == pytest.approx(expected.difference)
    assert error == pytest.approx(expected.standard_error, rel=0.1)


def test_an_evaluation_set_of_the_trainer_s_own_stays_whole_where_workers_persist(attached: Any) -> None:
    sizes = []
    for persistent in (False, True):
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
        trainer = attached({"gamma": 30.0}, **{**RUN, **workers})
        trainer.eval_dataset = DATA
        if persistent:
            trainer.evaluate()  # whose loader the Trainer keeps
        trainer.train()
        seen: list[int] = []
        before_every_loss(trainer, lambda model, inputs, *rest, seen=seen, **more: seen.append(len(inputs["labels"])))
        trainer.evaluate()
        sizes.append((trainer.posterior_training.recommendation.examples, sum(seen)))
    assert sizes == [(Sizes(chosen_on=48, reported_on=48), 120)] * 2


@pytest.mark.parametrize("kind", ["token classifier", "encoder-decoder"])
def test_labels_that_are_not_the_next_token_are_not_taken_for_it(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At draws of no width the loss of the posterior is the Trainer's own."""
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "token classifier":
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_key_value_heads": 1, "num_labels": 3}
        model: Any = LlamaForTokenClassification(LlamaConfig(**sizes, **shape))
        lora = LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj"])
    else:
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=40, num_layers=1, num_heads=2, **shape))
        lora = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"])
    rows = [{"input_ids": row, "labels": [token % 3 for token in row]} for row in ROWS.tolist()]
    run = TrainingArguments(str(tmp_path), max_steps=40, use_cpu=True, report_to=[], save_strategy="no")
    data = Dataset.from_list(rows)
    trainer = Trainer(get_peft_model(model, lora), run, train_dataset=data, eval_dataset=data)
    attach(trainer, ess=1e12, eval_samples=2)
    trainer.train()
    assert trainer.posterior_training.recommendation is None
    assert "not calibrated: its labels are neither classes of a text nor the tokens of an answer" in caplog.text
    losses = trainer.evaluate()
    assert losses["eval_loss_posterior"] == pytest.approx(losses["eval_loss"], rel=1e-3)


def test_packed_rows_of_trl_count_by_the_examples_in_them(tiny_llama: Path, tmp_path: Path, caplog: Any) -> None:
    import trl

    caplog.set_level(logging.INFO)
    texts = [{"text": " ".join(WORDS[(n * k) % 17] for k in range(1, 7))} for n in range(1, 81)]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(r=4, task_type="CAUSAL_LM"))
    arguments = trl.SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, packing=True, max_length=48, max_steps=60, report_to=[]
    )
    data = Dataset.from_list(texts)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    assert len(trainer.eval_dataset) < 60
    attach(trainer)
    trainer.train()
    assert "calibrated on 80 evaluation examples" in caplog.text
