"""What to predict with when training has ended: the mean or draws, and a softmax temperature, from evaluation data.

If the answers are a few labels, this measures the choice between them: at each token where labels differ, the
probabilities of the tokens that can follow. The other tokens follow from those before and would make the model look
surer and more accurate than it is. What commands predict with T is close to this, and equal to it if labels differ at
one token only. For free text every token counts.

The evaluation examples are split in two. One half chooses T for the mean, and τ and T for draws, by their NLL; the
other half reports. `metrics.choice` has the rule, which `ivon-post sweep` uses too. In the end T is fitted again, to
both halves. That T is written to `recommended.json` beside the adapter; the figures there belong to the T before.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm

from ..metrics.calibration import PENALTIES, added_by_a_temperature, nll_at_temperatures
from ..metrics.calibration import TEMPERATURE_GRID as TEMPERATURES
from ..metrics.choice import choose
from ..metrics.scores import Scores, metrics
from ..metrics.verdict import FEWEST, Paired, judge
from ..posterior.recommended import provenance
from ..records.evaluation import Difference, Metrics
from ..records.recommendation import (
    RECOMMENDED_FILE,
    DrawsPoint,
    GridPoint,
    Recommendation,
    Reported,
    Sizes,
    SweepVerdict,
    describe,
)
from ..storage.format import SIGMA_FILE
from ..storage.tensorfile import TensorFile
from .beginning import answers_in, next_tokens_of_answers
from .posterior_loss import evaluating, predicts_next_token
from .saved import adapter_folder

if TYPE_CHECKING:
    from .callback import PosteriorTraining

MOST = 256  # examples
# Of the work of training, in passes over examples: one forward and, for LoRA, about as much backward.
SHARE = 0.1 * 2
DRAWS = 8
TAUS = (4.0, 1.0, 16.0)  # of draws, as many as the share allows, in this order
_LABELS = 128  # of one example, evenly spread over it
# Softmax temperatures of a mean that has not learned all there is, and of one that is overfitted.
UNSURE, OVERFITTED = 0.7, 2.0
_CHUNK = 1024  # labels whose distributions over the vocabulary are worked on at a time


class _Column(NamedTuple):
    """What the mean (τ = ∞), or draws at τ, predict at every temperature: tensors of shape (n, T).

    Each of n is a label of a classifier, an answer out of a few, or a token of a text.
    """

    nll: Tensor
    confidence: Tensor
    correct: Tensor  # (n,)


class _Asked(NamedTuple):
    """What is measured in a batch: tensors over the logits that are looked at, (k,), and over answers, (n,)."""

    places: Tensor  # of the logits, as if they were (rows·length, classes)
    target: Tensor  # the right class, or the place of the right one in `choices`
    answer: Tensor  # the number of the answer that each is of, ascending
    example: Tensor  # of each answer, the number of the example in the batch
    choices: Tensor | None = None  # (k, most) token ids to choose from, filled up with −1; None: all classes


NO_LABELS = "the evaluation data have no labels to predict, as preferences have none; use `ivon-post sweep` with chats"


class NotCalibrated(Exception):
    """Why nothing was measured, in words."""


def calibrate(run: PosteriorTraining, seen: int) -> tuple[Recommendation | None, str]:
    """Return what to predict with, and a line about it, on the first process; every process must call it.

    The model holds its mean before and afterwards. The same data give the same recommendation.

    Args:
        run: a run that has ended.
        seen: the training examples that the run has taken gradients of, by which the share of work is measured.
    """
    try:
        dataset, examples = _evaluation_data(run, seen)
        affordable = int((SHARE * seen / examples - 1) / DRAWS) if run.draws_as_saved else 0
        taus = [math.inf, *TAUS[:affordable]]
        following = next_tokens_of_answers(run.trainer) if "choices" in run.header else {}
        # In an order of their contents, so that the halves do not depend on the number of processes.
        measured = gather_object(list(_measure(run, dataset, taus, following)))
        columns = [columns for _, columns in sorted(measured, key=operator.itemgetter(0))]
        if following and len(columns) < 2 * FEWEST:
            raise NotCalibrated(f"only {len(columns)} evaluation examples have an answer of the training data")
    except NotCalibrated as why:
        return None, f"not calibrated: {why}"
    task = "choice" if following else None
    if not following and any(len(of_mean.nll) > 1 for of_mean, *_ in columns):
        task = "generate"
    too_short = run.draws_as_saved and not affordable
    recommendation, text = _choose(taus, columns, run.trainer.args.seed, task, too_short)
    if recommendation.verdict and recommendation.verdict.differences:
        text += f"; {RECOMMENDED_FILE} beside the adapter holds it, and every command that predicts takes it"
    return recommendation, text + _advice(recommendation, run)


def _advice(recommendation: Recommendation, run: PosteriorTraining) -> str:
    """Return what the T of a recommended mean says of the run that it is from, if it says something."""
    reported = (recommendation.mean_reported_on, recommendation.reported_on)
    before, after = ((of.nll if of else None) or 0.0 for of in reported)
    if math.isfinite(recommendation.tau) or after >= 0.95 * before:
        return ""  # of a model at chance any T is as good
    if recommendation.temperature <= UNSURE:
        what = "a higher learning_rate, or more steps"
        if 0 < run.given_rate < run.usual:
            what = f"a learning_rate of {run.usual:g}, which is usual for this model, or more steps"
        elif run.usual and not run.given_rate:
            what = f"more steps, or a learning_rate above {run.usual:g}, which it took"
        return f"; so low a T means that there is more to learn: try {what}"
    if recommendation.temperature >= OVERFITTED:
        return "; so high a T means that it is overfitted: try a lower learning_rate, or fewer epochs"
    return ""


def save_recommendation(recommendation: Recommendation, folder: Path, name: str) -> None:
    """Write what to predict with beside the adapter of this name that is in `folder`."""
    header = TensorFile(folder / SIGMA_FILE).metadata
    about = {"adapter": name, **provenance(recommendation, header)}
    recommendation.model_copy(update=about).save(folder / RECOMMENDED_FILE)


def recommend_in_checkpoint(run: PosteriorTraining) -> Path | None:
    """Put what to predict with into the checkpoint that holds the weights at the end of training; return its folder.

    A Trainer saves nothing else of its own. None if there is no such checkpoint.
    """
    state, args = run.trainer.state, run.trainer.args
    checkpoint = Path(run.best_folder or Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
    folders = [adapter_folder(checkpoint, adapter) for adapter in run.adapters]
    if not all((folder / SIGMA_FILE).is_file() for folder in folders):
        return None
    if run.recommendation is not None:
        for folder in folders:
            save_recommendation(run.recommendation, folder, folder.name)
    return checkpoint


def _evaluation_data(run: PosteriorTraining, seen: int) -> tuple[Any, float]:
    """Return the rows to calibrate on, and of how many examples they are.

    These are `MOST` at most, and as many as one pass in the share of work allows.
    """
    dataset: Any = run.trainer.eval_dataset
    if hasattr(run.trainer, "reward_funcs"):
        raise NotCalibrated("a run that learns from rewards has no labels to predict")
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    if dataset is None:
        raise NotCalibrated("there are no evaluation data; set val_set_size or test_datasets (or an eval_dataset)")
    if not hasattr(dataset, "__len__"):
        raise NotCalibrated("the evaluation data are streamed")
    examples = _count_examples(dataset)
    each = max(1.0, examples / max(1, len(dataset)))  # of a row
    count = min(max(1, int(MOST / each)), len(dataset), int(SHARE * seen / each))
    if examples < 2 * FEWEST:
        raise NotCalibrated(f"{examples} evaluation examples tell little; {2 * FEWEST} are needed")
    if count * each < 2 * FEWEST:
        raise NotCalibrated("a tenth of this short run's time is too little; use `ivon-post sweep`")
    generator = torch.Generator().manual_seed(run.trainer.args.seed)
    places = sorted(torch.randperm(len(dataset), generator=generator)[:count].tolist())
    return dataset.select(places) if hasattr(dataset, "select") else Subset(dataset, places), count * each


def _count_examples(dataset: Any) -> int:
    """Return how many examples a dataset has: of packed rows, which say so by TRL's lengths, more than rows."""
    if "seq_lengths" in (getattr(dataset, "column_names", None) or ()):
        return sum(map(len, dataset["seq_lengths"]))
    return len(dataset)


def _draws_at(tau: float) -> int:
    return DRAWS if math.isfinite(tau) else 1


def _measure(
    run: PosteriorTraining, dataset: Any, taus: Sequence[float], following: Mapping[tuple[int, ...], Sequence[int]]
) -> Iterator[tuple[int, list[_Column]]]:
    """Yield a hash of every example of this process, and what each τ predicts for its labels.

    `following` has which tokens go on each beginning of an answer, where answers are labels.
    """
    trainer: Any = run.trainer
    kept = trainer.__dict__.pop("_eval_dataloaders", None)  # where workers persist, by a name that knows no data
    try:
        loader = trainer.get_eval_dataloader(dataset)
    finally:
        trainer.__dict__.pop("_eval_dataloaders", None)
        if kept is not None:
            trainer._eval_dataloaders = kept
    passes = sum(map(_draws_at, taus))
    shown = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    with evaluating(trainer.model):
        for batch in tqdm(loader, desc=f"calibrating, {passes} pass{'es' * (passes > 1)}", disable=not shown):
            inputs = trainer._prepare_inputs(batch)
            labels = inputs.pop("labels", None)
            if labels is None:
                raise NotCalibrated(NO_LABELS)
            if labels.is_floating_point() or (labels.dim() == 2 and not predicts_next_token(trainer.model)):
                raise NotCalibrated("its labels are neither classes of a text nor the tokens of an answer")
            if "input_ids" not in inputs:
                raise NotCalibrated("the inputs of the evaluation data are no texts")
            ids, attended = inputs["input_ids"].cpu(), inputs.get("attention_mask")
            if labels.dim() == 1:
                rows = torch.arange(len(labels), device=labels.device)
                asked, number = _Asked(rows, labels, rows.cpu(), rows.cpu()), rows.cpu()[:, None].expand(ids.shape)
            else:
                number = _examples(labels, inputs.get("position_ids"))
                asked = _choices(labels, number, following) if following else _tokens(labels, number)
            by_tau = [_columns(run, tau, inputs, labels, asked) for tau in taus]
            read = attended.cpu().bool() if attended is not None and attended.shape == ids.shape else True
            for example in asked.example.unique().tolist():
                here, own = asked.example == example, ids[(number == example) & read]
                columns = [_Column(*(values[here] for values in column)) for column in by_tau]
                yield zlib.crc32(own.numpy().tobytes()), columns


def _examples(labels: Tensor, positions: Tensor | None) -> Tensor:
    """Return the number of the example that each token (rows, length) is of; a packed row has several."""
    begins = torch.zeros(labels.shape, dtype=torch.bool)
    begins[:, 0] = True
    if positions is not None and positions.shape == labels.shape:
        begins |= positions.cpu() == 0
    return begins.flatten().cumsum(0).view(labels.shape) - 1


def _tokens(labels: Tensor, number: Tensor) -> _Asked:
    """Return what is asked of texts: every token, or some of a long row."""
    chosen = []
    for row, of_row in enumerate(labels[:, 1:]):
        there = (of_row != -100).nonzero().squeeze(1)
        if len(there) > _LABELS:
            there = there[torch.linspace(0, len(there) - 1, _LABELS, device=there.device).long()]
        chosen.append(row * labels.shape[1] + there)
    places = torch.cat(chosen)
    example = number.flatten()[places.cpu() + 1]
    return _Asked(places, labels.flatten()[places + 1], torch.arange(len(places)), example)


def _choices(labels: Tensor, number: Tensor, following: Mapping[tuple[int, ...], Sequence[int]]) -> _Asked:
    """Return what is asked of answers that are labels: where labels part, which way; nothing of an unknown label."""
    places: list[int] = []
    target: list[int] = []
    answer: list[int] = []
    example: list[int] = []
    choices: list[Sequence[int]] = []
    for row, tokens in enumerate(labels.tolist()):
        trained = [i for i, token in enumerate(tokens) if token != -100]
        for turn in answers_in((tokens, trained)):
            known = True
            parts: list[tuple[int, int, Sequence[int]]] = []
            for length, place in enumerate(turn):
                ways = following.get(tuple(tokens[i] for i in turn[:length]), ())
                if not ways:  # it has ended
                    break
                known = known and tokens[place] in ways
                if known and place and len(ways) > 1:
                    parts.append((row * len(tokens) + place - 1, ways.index(tokens[place]), ways))
            if known and parts:
                places += [place for place, _, _ in parts]
                target += [right for _, right, _ in parts]
                choices += [ways for _, _, ways in parts]
                answer += [len(example)] * len(parts)
                example.append(int(number[row, turn[0]]))
    most = max(map(len, choices), default=1)
    filled = [[*ways, *[-1] * (most - len(ways))] for ways in choices]
    return _Asked(
        places=torch.tensor(places, dtype=torch.long, device=labels.device),
        target=torch.tensor(target, dtype=torch.long, device=labels.device),
        answer=torch.tensor(answer, dtype=torch.long),
        example=torch.tensor(example, dtype=torch.long),
        choices=torch.tensor(filled, dtype=torch.long, device=labels.device).view(-1, most),
    )


def _columns(run: PosteriorTraining, tau: float, inputs: dict[str, Any], labels: Tensor, asked: _Asked) -> _Column:
    """Return what a τ predicts for the labels of a batch: one forward pass, or the average of its draws'."""
    trainer: Any = run.trainer
    averaged: Any = None
    logits: Any = None
    for number in range(_draws_at(tau)):
        at: AbstractContextManager[None] = nullcontext()
        if math.isfinite(tau):
            at = run.optimizer.evaluation_draw(number, tau)
        with at, trainer.compute_loss_context_manager():
            logits = getattr(trainer.model(**inputs), "logits", None)
        if logits is None or logits.shape[: labels.dim()] != labels.shape:
            raise NotCalibrated("the model gives no logits for the labels of the evaluation data")
        logits = logits.reshape(-1, logits.shape[-1])[asked.places].float()
        if asked.choices is not None:
            logits = logits.gather(1, asked.choices.clamp_min(0)).masked_fill(asked.choices < 0, -math.inf)
        if math.isfinite(tau):
            probabilities = logits.softmax(-1)
            averaged = probabilities if averaged is None else averaged.add_(probabilities)
    logs = logits if averaged is None else averaged.div_(DRAWS).clamp_min_(1e-38).log_()
    parts = [_at_temperatures(*part) for part in zip(logs.split(_CHUNK), asked.target.split(_CHUNK), strict=True)]
    # The probability of an answer is the product of those of its parts. With several parts the most probable label may
    # differ from the guess token by token, so its confidence is unknown here (NaN).
    of_parts = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    nll, of_guess, wrong = (
        values.new_zeros(len(asked.example), *values.shape[1:]).index_add_(0, asked.answer, values)
        for values in of_parts
    )
    unknown = asked.answer.bincount(minlength=len(asked.example)) > 1
    return _Column(nll, of_guess.neg().exp().masked_fill(unknown[:, None], math.nan), wrong == 0)


def _at_temperatures(logs: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the NLL of target and guess by p ∝ exp(logs/T), (k, T), and whether the guess is wrong, 1 or 0, (k,)."""
    guess = logs.argmax(-1)
    nll, of_guess = nll_at_temperatures(logs, torch.stack([target, guess], 1)).unbind(1)
    return nll, of_guess, (guess != target).long()


def _choose(
    taus: Sequence[float], columns: list[list[_Column]], seed: int, task: str | None = None, too_short: bool = False
) -> tuple[Recommendation, str]:
    """Return the recommendation from what every τ (inner list) predicts for every example, and a line about it.

    The line says so where the run was `too_short` for draws to be tried.
    """
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed)).tolist()
    choosing, report = order[: len(order) // 2], order[len(order) // 2 :]
    sums = [np.stack([of_example[way].nll.sum(0).numpy() for of_example in columns]) for way in range(len(taus))]
    costs = [(own[choosing].sum(0) + PENALTIES).tolist() for own in sums]
    plain = (0, TEMPERATURES.index(1.0))
    labels = sum(len(of_example[0].nll) for of_example in columns)
    before, added = sums[0][:, plain[1]].sum() / labels, added_by_a_temperature(sums[0])

    def cost(at: tuple[int, int]) -> float:
        return costs[at[0]][at[1]]

    def versus(one: tuple[int, int], other: tuple[int, int]) -> Paired:
        gaps = [columns[i][one[0]].nll[:, one[1]] - columns[i][other[0]].nll[:, other[1]] for i in report]
        return _mean_of_groups(gaps)

    def outcome(one: tuple[int, int], other: tuple[int, int]) -> str:
        return judge(*versus(one, other), len(report))

    # By the number of τ and that of the temperature.
    candidates = [(way, t) for way in range(len(taus)) for t in range(len(TEMPERATURES))]
    others = candidates[len(TEMPERATURES) :]
    after = before + added / labels
    choice = choose(
        plain, candidates[: len(TEMPERATURES)], others, cost, outcome, added if len(report) >= FEWEST else 0.0
    )
    recommended, scaled, draws = choice.recommended, choice.scaled, min(others, key=cost, default=None)

    def measured(at: tuple[int, int], part: Sequence[int]) -> dict[str, Any]:
        return _metrics([columns[i][at[0]] for i in part], at[1])

    def temperature(at: tuple[int, int]) -> float:
        """Return the T of all examples in place of one half's."""
        return 1.0 if at == plain else TEMPERATURES[(sums[at[0]].sum(0) + PENALTIES).argmin()]

    def point(at: tuple[int, int]) -> GridPoint:
        chosen_on, reported_on = (Metrics(**measured(at, part)) for part in (choosing, report))
        own = temperature(at)
        return GridPoint(tau=taus[at[0]], ratio=0.0, temperature=own, chosen_on=chosen_on, reported_on=reported_on)

    def named(at: tuple[int, int]) -> str:
        return describe(taus[at[0]], temperature=temperature(at))

    text = f"calibrated on {len(columns)} evaluation examples: {named(recommended)}"
    if recommended[0]:
        before, after = (measured(at, report)["nll"] for at in (plain, recommended))
    if recommended != plain:
        text += f" (NLL {before:.3g} → {after:.3g}{' per token' if task == 'generate' else ''})"
    elif scaled != plain:
        text += " as it is, since by cross-validation no T helps"
    if draws and recommended != draws:
        text += f"; {named(draws)} are {'worse' if outcome(draws, recommended) == 'worse' else 'level'}"
    if too_short:
        text += "; draws were not tried, since the run is too short for that"
    gain = versus(recommended, plain)
    verdict = SweepVerdict(
        differences={} if recommended == plain else {"nll": Difference(**gain._asdict())},
        outcome="the mean" if recommended == plain else outcome(recommended, plain),
        text=text,
    )
    recommended_point, at_their_own = point(recommended), [point(at) for at in (scaled, draws) if at]
    recommendation = Recommendation(
        tau=recommended_point.tau,
        ratio=0.0,
        temperature=recommended_point.temperature,
        objective="nll",
        score="probability",
        data=["the evaluation data of training"],
        task=task,
        samples=DRAWS,
        seed=seed,
        examples=Sizes(chosen_on=len(choosing), reported_on=len(report)),
        chosen_on=recommended_point.chosen_on,
        reported_on=Reported(**measured(recommended, report)),
        mean_reported_on=point(plain).reported_on,
        verdict=verdict,
        scaled=at_their_own,
        draws=DrawsPoint(tau=taus[draws[0]], temperature=temperature(draws)) if draws else None,
    )
    return recommendation, text


def _mean_of_groups(values: Sequence[Tensor]) -> Paired:
    """Return the mean over all values, and its standard error where those of a group depend on one another.

    It is the error of a ratio of two sums over groups (Cochran 1977, Sampling Techniques, section 6.3).
    """
    sums = torch.stack([group.sum() for group in values])
    counts = torch.tensor([float(len(group)) for group in values], dtype=torch.float64)
    mean = sums.sum() / counts.sum()
    spread = (sums - mean * counts).square().sum() * len(values) / (len(values) - 1)
    return Paired(float(mean), float(spread.sqrt() / counts.sum()))


def _metrics(columns: Sequence[_Column], temperature: int) -> dict[str, Any]:
    """Return NLL at a temperature, and where all confidences are known accuracy and ECE."""
    nll, confidence = (torch.cat([getattr(c, name)[:, temperature] for c in columns]) for name in ("nll", "confidence"))
    correct = torch.cat([column.correct for column in columns]).double()
    unknown = torch.full_like(nll, math.nan)
    group = torch.arange(len(nll))
    values = metrics(Scores(confidence, correct, nll, unknown, unknown, unknown, unknown, group))
    known = ("nll",) if confidence.isnan().any() else ("accuracy", "ece", "nll")
    return {name: values[name] or 0.0 for name in known}
