"""Predictions of a posterior on data: base model, mean, averages over draws (arXiv 2506.14280, section 4.1).

Importing this module imports no torch: what a user got wrong is told at once.

The posterior predictive p(y|x) = E_q[p(y|x, θ)] is the average of the probabilities of S draws. Each draw is
written into the loaded model in place and runs once over the data; draws are shared by all rows (common
random numbers), so rows that differ in temperature or pruning differ in nothing else. Everything that is said of
predictions comes from the scores of that one evaluation.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.chats import Example, choose_task, read_examples
from ..data.encode import EncodedExample, check_tokens, common_length, encode
from ..errors import IVONError, param_ref
from ..metrics.verdict import REFERENCES, differences
from ..models.session import Loading, load_model, load_tokenizer
from ..posterior.posterior import Posterior, check_tau, open_posterior
from ..posterior.prune import Pruning
from ..storage.format import find_base_model

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from ..metrics.scores import Scores
    from .predict import Batch

_AVERAGES = 2**28  # probabilities (of all rows together) that are kept at a time: 1 GiB in float32
_MIN_PREFIX = 8  # a shorter common prefix is not worth its own pass


@dataclass(frozen=True)
class Variant:
    """What a row of the table evaluates: the base model, or the posterior at temperature τ after pruning.

    `tau=math.inf` is the mean, one pass; anything else the average over draws. The log-probabilities of the result are
    divided by `temperature`.

    Raises:
        IVONError: τ is not > 0, or the ratio is outside [0, 1].
    """

    name: str
    tau: float = math.inf
    ratio: float = 0.0
    base: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_tau(self.tau)
        Pruning(self.ratio)

    @property
    def needs_sigma(self) -> bool:
        """Say whether the row takes more of a posterior than its mean."""
        return not self.base and (self.ratio > 0 or math.isfinite(self.tau))

    def passes(self, samples: int) -> int:
        """Return how many passes over the data the row takes."""
        return 1 if self.base or math.isinf(self.tau) else samples

    @property
    def source(self) -> Variant:
        """Return what the row's predictions are made from: rows with the same source share its passes."""
        return replace(self, name="", temperature=1.0)


def rows_of(tau: float = 1.0, ratio: float = 0.1) -> dict[str, Variant]:
    """Return the five rows of the paper's tables 1 and 2, by name."""
    rows = [
        Variant("base", base=True),
        Variant("mean"),
        Variant("mean-pruned", ratio=ratio),
        Variant("posterior", tau=tau),
        Variant("posterior-pruned", tau=tau, ratio=ratio),
    ]
    return {row.name: row for row in rows}


@dataclass
class _Average:
    """Running means over draws of the probabilities (n, classes), of the entropies (n,) and of the variance of one row.

    Running, so that the average of equal draws is that draw to the last bit.
    """

    mean: Tensor
    entropy: Tensor
    variance: Tensor
    draws: int = 0

    def add(self, slots: Tensor, probabilities: Tensor) -> None:
        """Add the next draws' `probabilities` (draws, m, classes) at `slots` (m,)."""
        from ..metrics.scores import entropy

        for number, one in enumerate(probabilities, start=self.draws + 1):
            away = one - self.mean[slots]
            self.mean[slots] += away / number
            self.entropy[slots] += (entropy(one) - self.entropy[slots]) / number
            spread = (away * (one - self.mean[slots])).sum(1)  # Welford's
            self.variance[slots] += (spread - self.variance[slots]) / number

    def scores(self, target: Tensor, group: Tensor, temperature: float, keep: bool) -> Scores:
        """Return the scores of the average at a temperature; what draws say of theirs they do not of a scaled one."""
        import torch

        from ..metrics.scores import Scores
        from ..metrics.temperature import rescale

        if temperature == 1:
            return Scores.of(self.mean, target, self.entropy, group, self.variance, keep)
        unknown = None if self.draws == 1 else torch.full_like(self.entropy, math.nan)
        return Scores.of(rescale(self.mean, temperature), target, unknown, group, unknown, keep)


def count_passes(rows: Sequence[Variant], samples: int) -> int:
    """Return how many passes over the data `evaluate` takes."""
    return sum(source.passes(samples) for source in {row.source for row in rows})


def evaluate(
    model: PeftModel,
    posterior: Posterior,
    items: Sequence[EncodedExample],
    rows: Sequence[Variant],
    task: str,
    *,
    samples: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    draws_per_pass: int = 1,
    keep: bool | None = None,
    progress: Callable[[int], None] | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> list[Scores]:
    """Score the predictions of every row on `items`; the model is left as it was.

    Draw k of every row is `posterior.sample(seed, k)`, with the same noise at every τ and ratio. Rows that differ in
    nothing but their temperature share their passes.

    Args:
        model: the adapter over its base model, as `load_model` returns it.
        batch_size: prompts in a batch, or None to choose; halved when the memory runs out, which `notify` is
            told.
        draws_per_pass: how many draws run in one batch over the shared base weights.
        keep: whether the scores keep the probabilities; by default unless the task is "generate", whose classes are
            all tokens.
        progress: called with the number of examples that a pass (or as many passes as there are draws) just
            did.

    Returns:
        For every row the scores of all items; `group` is the item's index.

    Raises:
        IVONError: the model does not fit the posterior, draws cannot be stacked, or one prompt alone is too
            large.
    """
    import torch

    from ..metrics.scores import Scores
    from ..models.draws import AdapterSlots, evaluating
    from .predict import Predictor

    slots = AdapterSlots(model)
    slots.check(posterior.mean)
    predictor = Predictor(model, task, batch_size, notify)
    order = sorted(range(len(items)), key=lambda index: len(items[index].ids))
    scores: list[list[Scores]] = [[] for _ in rows]
    sources = list(dict.fromkeys(row.source for row in rows))
    keep = task != "generate" if keep is None else keep
    with evaluating(model):
        skip = _prefix_length(items, task)
        if skip and predictor.prefix(items[0].ids[:skip], 1) is None:
            skip = 0
        for chunk in _chunks(order, items, predictor.classes(items) * len(sources)):
            part = [items[index] for index in chunk]
            group = torch.tensor([index for index in chunk for _ in items[index].positions])
            target = torch.tensor([target for item in part for target in item.targets])
            size = (len(target), predictor.classes(items))
            dtype = torch.float32 if task == "generate" else torch.float64
            zeros = functools.partial(torch.zeros, dtype=dtype, device=predictor.device)
            averages = [_Average(zeros(size), zeros(size[0]), zeros(size[0])) for _ in sources]
            batches: dict[int, list[Batch]] = {}
            for number, draws in _passes(posterior, sources, samples, seed, draws_per_pass):
                copies = len(draws)
                if copies not in batches:
                    batches[copies] = predictor.batches(part, skip, copies)
                average = averages[number]
                with model.disable_adapter() if sources[number].base else slots.drawn(draws):
                    prefix = predictor.prefix(items[0].ids[:skip], copies) if skip else None
                    for batch in batches[copies]:
                        for piece, probabilities in predictor.predict(batch, prefix, copies):
                            average.add(piece.slots, probabilities)
                            if progress:
                                progress(len(piece) * copies)
                average.draws += copies
            target = target.to(predictor.device)
            for found, row in zip(scores, rows, strict=True):
                average = averages[sources.index(row.source)]
                found.append(average.scores(target, group, row.temperature, keep))
    return [Scores.concatenate(parts) for parts in scores]


def _prefix_length(items: Sequence[EncodedExample], task: str) -> int:
    """Return how many tokens all items begin with, short of any scored position: they run once a pass."""
    if task == "classify" or len(items) < 2:
        return 0
    length = min(common_length([item.ids for item in items]), min(item.positions[0] for item in items))
    return length if length >= _MIN_PREFIX else 0


def _chunks(order: Sequence[int], items: Sequence[EncodedExample], classes: int) -> Iterator[list[int]]:
    """Cut the examples so that the averages of one chunk fit the memory; nearly always there is one chunk."""
    chunk: list[int] = []
    held = 0
    for index in order:
        size = len(items[index].positions) * classes
        if chunk and held + size > _AVERAGES:
            yield chunk
            chunk, held = [], 0
        chunk.append(index)
        held += size
    yield chunk


def _passes(
    posterior: Posterior, rows: Sequence[Variant], samples: int, seed: int, draws_per_pass: int
) -> Iterator[tuple[int, list[Mapping[str, Tensor]]]]:
    """Yield (row number, adapter tensors of the draws of one pass), all rows for the same members together.

    The next pass's draws are made in a thread while the model is busy with this one's.
    """
    pruned = {row.ratio: posterior.prune(row.ratio) if row.ratio else posterior for row in rows if not row.base}

    def draws(row: Variant, members: range) -> list[Mapping[str, Tensor]]:
        if row.base:
            return [{}]
        if math.isinf(row.tau):
            return [dict(pruned[row.ratio].mean)]
        source = pruned[row.ratio].temper(row.tau)
        return [source.sample(seed, member) for member in members]

    todo = [
        (number, row, range(start, min(start + draws_per_pass, row.passes(samples))))
        for start in range(0, samples, draws_per_pass)
        for number, row in enumerate(rows)
        if start < row.passes(samples)
    ]
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draws, *todo[0][1:])
        for position, (number, _, _) in enumerate(todo):
            ready = coming.result()
            if position + 1 < len(todo):
                coming = pool.submit(draws, *todo[position + 1][1:])
            yield number, ready


class Evaluation:
    """An adapter with its base model in memory, and data files tokenised for it: ready to score rows.

    Attributes:
        task: "choice", "generate" or "classify".
        choices: the strings to choose from, or the labels; empty for "generate".
        examples: what is evaluated.
        files: the data files with the numbers of their examples, in the order given.
        ood_files: likewise what is to be told from the data; their examples come after the data's.
        items: the examples, tokenised; `held_out` those of the file to fit temperatures on.
        base_model: the name of the base model.
    """

    def __init__(
        self,
        adapter: str | Path,
        data: Sequence[str | Path],
        *,
        rows: Sequence[Variant] = (),
        ood: Sequence[str | Path] = (),
        calibrate: str | Path | None = None,
        task: str | None = None,
        choices: Sequence[str] | None = None,
        limit: int | None = None,
        base_model: str | None = None,
        load_in: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        begin: Callable[[str], object] = lambda doing: None,
    ) -> None:
        """Read the data, then the adapter, then the base model: a mistake shows before the slower steps.

        torch is imported after all that can be checked without it; `begin` is told what begins then.

        `task` is found by default: "classify" if the adapter has a classification head, else what the answers
        look like (`detect_task`). `limit` takes the first examples of each file only. `ood` are files out of the data's
        distribution, `calibrate` is one to fit temperatures on; choices are those of `data`.

        Raises:
            IVONError: as `read_examples`, `find_choices`, `open_posterior`, `load_model` and `encode` do; `ood` or
                `calibrate` hold the data itself, or answers that are no choices of the data.
        """
        self.examples: list[Example] = []
        self.files: dict[str, range] = {}
        self.ood_files: dict[str, range] = {}
        for path, files, name in [(p, self.files, "data") for p in data] + [(p, self.ood_files, "ood") for p in ood]:
            if str(path) in files:
                raise IVONError(f"{param_ref(name)} {path} is given twice; give each file once")
            more = read_examples(path, limit, name)
            files[str(path)] = range(len(self.examples), len(self.examples) + len(more))
            self.examples += more
        examples = self.examples[: self.ood_files[str(ood[0])].start] if ood else self.examples
        held_out = read_examples(calibrate, limit, "calibrate") if calibrate is not None else []
        others = [(path, "ood", [self.examples[i] for i in where]) for path, where in self.ood_files.items()]
        if calibrate is not None:
            others.append((str(calibrate), "calibrate", held_out))
        for path, name, found in others:
            self._check_other(path, name, found)
        self.posterior = open_posterior(adapter, mean_only=bool(rows) and not any(row.needs_sigma for row in rows))
        folder = self.posterior.folder
        assert folder is not None
        head = self.posterior.config.get("task_type") == "SEQ_CLS"
        self.task, self.choices = choose_task(examples, head, task, choices)
        task = self.task
        for path, name, found in others:
            strange = next((e for e in found if self.choices and e.answer not in self.choices), None)
            if strange:
                raise IVONError(
                    f"{param_ref(name)} {path}: the answer {strange.answer!r} ({strange.source}) is not among the "
                    f"choices {','.join(self.choices)} of {param_ref('data')}; give a file with the same choices"
                )
        base = find_base_model(self.posterior.config, folder, base_model)
        begin("loading the base model")
        self.model = load_model(folder, Loading(base, load_in, device, dtype), classify=task == "classify")
        config: Any = self.model.get_base_model().config
        self.base_model = str(config._name_or_path)
        tokenizer = load_tokenizer(folder, self.base_model)
        label2id: dict[str, int] = {}
        if task == "classify":
            label2id = dict(config.label2id)
            if config.pad_token_id is None:  # decoders find the end of a text by it
                config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
            self.choices = tuple(sorted(label2id, key=lambda label: label2id[label]))
        everything = self.examples + held_out
        items = encode(
            tokenizer,
            everything,
            task,
            choices=self.choices,
            label2id=label2id,
            max_length=getattr(config, "max_position_embeddings", None),
        )

        tokens = self.model.get_input_embeddings().weight.shape[0]
        for item, example in zip(items, everything, strict=True):
            check_tokens(item.ids, tokens, example.source)
        self.items, self.held_out = items[: len(self.examples)], items[len(self.examples) :]

    def _check_other(self, path: str, name: str, found: Sequence[Example]) -> None:
        """Raise IVONError if `found` are the questions of a data file."""
        questions = {repr(example.messages) for example in found}
        for data, where in self.files.items():
            if questions == {repr(self.examples[i].messages) for i in where}:
                raise IVONError(
                    f"{param_ref(name)} {path}: it has the same questions as {param_ref('data')} {data}; "
                    "give a file with others"
                )

    def temperatures(
        self, rows: Sequence[Variant], *, notify: Callable[[str], None] = lambda message: None, **options: Any
    ) -> list[Variant]:
        """Return NAME+temperature for each of `rows`: the temperatures that minimize the NLL of the file `calibrate`.

        They are fitted on as many of its first examples as fit the memory. `options` are those of `evaluate`.
        """
        import torch

        from ..metrics.temperature import TEMPERATURES, fit_temperature
        from .predict import Predictor

        classes = Predictor(self.model, self.task, None, notify).classes(self.held_out)
        most = _AVERAGES // (classes * len(rows))
        sizes = itertools.accumulate(len(item.positions) for item in self.held_out)
        items = self.held_out[: max(1, sum(size <= most for size in sizes))]
        if len(items) < len(self.held_out):
            notify(f"temperatures are fitted on the first {len(items)} examples: more do not fit the memory")
        target = torch.tensor([target for item in items for target in item.targets])
        fitted = []
        for row, scores in zip(
            rows,
            evaluate(self.model, self.posterior, items, rows, self.task, keep=True, notify=notify, **options),
            strict=True,
        ):
            assert scores.probabilities is not None
            temperature = fit_temperature(scores.probabilities[scores.group.argsort(stable=True)], target)
            if temperature in TEMPERATURES:
                notify(
                    f"the temperature of the {row.name} is at its limit, {temperature:g}: the file that it is fitted "
                    "on is too small, or too easy"
                )
            fitted.append(replace(row, name=f"{row.name}+temperature", temperature=temperature))
        return fitted

    def meaningful(
        self, rows: Sequence[Variant], notify: Callable[[str], None] = lambda message: None
    ) -> list[Variant]:
        """Return `rows` without the base model where its classification head is untrained, which `notify` is told.

        The trained head is then among the adapter's saved modules, and the base model's own is random.
        """
        if self.task != "classify" or not self.posterior.config.get("modules_to_save"):
            return list(rows)
        notify("no row for the base model: its classification head is not trained")
        return [row for row in rows if not row.base]

    def run(self, rows: Sequence[Variant], **options: Any) -> list[Scores]:
        """Return `evaluate`'s scores of every row; `options` are its own."""
        return evaluate(self.model, self.posterior, self.items, rows, self.task, **options)


def choose_rows(names: Sequence[str], tau: float = 1.0, ratio: float = 0.1) -> list[Variant]:
    """Return those of `rows_of` that are named, in their own order.

    Raises:
        IVONError: there is no such row.
    """
    known = rows_of(tau, ratio)
    for name in names:
        if name not in known:
            raise IVONError(
                f"{param_ref('rows')} {','.join(names)}: {name!r} is unknown; choose from {','.join(known)}"
            )
    return [row for name, row in known.items() if name in names]


def calibrated_rows(rows: Sequence[Variant]) -> list[Variant]:
    """Return those of `rows` that `Evaluation.temperatures` is for: mean and posterior.

    Raises:
        IVONError: there is neither.
    """
    found = [row for row in rows if row.name in ("mean", "posterior")]
    if not found:
        raise IVONError(
            f"{param_ref('calibrate')} fits a temperature for mean and posterior; have one of them in "
            f"{param_ref('rows')}"
        )
    return found


def summarize(
    evaluation: Evaluation, rows: Sequence[Variant], scores: Sequence[Scores], samples: int
) -> list[dict[str, Any]]:
    """Return what is said of every data file and row, numbers and strings alone.

    Its metrics, their bootstrap standard errors (`se`), a fitted `temperature` where there is one, and for each row of
    `compare.REFERENCES` that is there, `versus_NAME`: the differences to it (`compare.differences`).
    """
    import torch

    from ..metrics.scores import bootstrap, metrics, standard_error

    found = []
    for path, numbers in evaluation.files.items():
        parts = [score.of_groups(torch.tensor(numbers)) for score in scores]
        values = {row.name: metrics(part) for row, part in zip(rows, parts, strict=True)}
        resamples = {row.name: bootstrap(part) for row, part in zip(rows, parts, strict=True)}
        for row, part in zip(rows, parts, strict=True):
            name = row.name
            found.append(
                {
                    "name": name,
                    "data": path,
                    "examples": len(numbers),
                    "predictions": len(part.group),
                    "samples": row.passes(samples),
                    **({} if row.temperature == 1 else {"temperature": row.temperature}),
                    **values[name],
                    "se": {metric: standard_error(drawn) for metric, drawn in resamples[name].items()},
                    **{
                        f"versus_{other}": differences(values[name], values[other], resamples[name], resamples[other])
                        for other in REFERENCES
                        if other in values and other != name
                    },
                }
            )
    return found
