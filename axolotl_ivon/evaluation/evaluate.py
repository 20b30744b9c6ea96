"""Predictions of a posterior on data: base model, mean, averages over draws (arXiv 2506.14280, section 4.1).

The posterior predictive p(y|x) = E_q[p(y|x, θ)] is the average of the probabilities of S draws. Each draw is written
into the loaded model in place and runs once over the data. All variants share the draws (common random numbers), so
variants that differ in temperature or pruning differ in nothing else. Imports no torch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..data.chats import Example, choose_task, read_examples, read_files, read_questions
from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..models.session import Loading, Session, has_head
from ..posterior.posterior import Posterior, open_posterior
from ..reporter import SILENT, Reporter
from .variants import Variant

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from ..metrics.scores import Scores
    from ..models.batching import Batch
    from ..models.draws import AdapterSlots
    from .predict import Predictor
    from .served import ServedModel

_AVERAGES = 2**28  # probabilities (of all variants together) that are kept at a time: 1 GiB in float32


@dataclass(frozen=True)
class Sampling:
    """How many draws are averaged, and how they run.

    Attributes:
        samples: draws.
        seed: draw k of every variant is `posterior.sample(seed, k)`, with the same noise at every τ and ratio.
        batch_size: prompts in a batch, or None to choose; halved when the memory runs out.
        draws_per_pass: how many draws run in one batch over the shared base weights.
        keep: whether the scores keep the probabilities also with the task "generate", whose classes are all tokens.
    """

    samples: int = 10
    seed: int = 0
    batch_size: int | None = None
    draws_per_pass: int = 1
    keep: bool = False


def evaluate(
    model: PeftModel,
    posterior: Posterior,
    items: Sequence[EncodedExample],
    variants: Sequence[Variant],
    task: str,
    sampling: Sampling = Sampling(),
    reporter: Reporter = SILENT,
    kept: KeptDraws | None = None,
) -> list[Scores]:
    """Score the predictions of every variant on `items`; the model is left as it was.

    Args:
        model: the adapter over its base model, as `load_model` returns it.
        kept: the draws of earlier calls with the same model, posterior and sampling, which are not made again; those
            of this call are added. They stay in memory.

    Returns:
        For every variant the scores of all items; `group` is the item's index.

    Raises:
        IVONError: the model does not fit the posterior, draws cannot be stacked, or one prompt alone is too large.
    """
    from ..metrics.scores import Scores
    from ..models.draws import AdapterSlots, evaluating
    from .predict import Predictor

    slots = AdapterSlots(model)
    slots.check(posterior.mean)
    predictor = Predictor(model, task, sampling.batch_size, reporter)
    sources = list(dict.fromkeys(variant.source for variant in variants))
    keep = sampling.keep or task != "generate"
    passes = sum(source.passes(sampling.samples) for source in sources)
    advance = reporter.begin("evaluating", passes * len(items))
    scores: list[list[Scores]] = []
    with evaluating(model):
        prefix = predictor.common_prefix(items)
        for chunk in _chunks(items, predictor.classes(items) * len(sources)):
            running = _passes(slots, posterior, sources, sampling, kept)
            averages = _accumulate(predictor, chunk, sources, running, prefix, advance)
            scores.append([averages[v.source].scores(chunk, v.temperature, keep) for v in variants])
    return [Scores.concatenate(parts) for parts in zip(*scores, strict=True)]


class Chunk(NamedTuple):
    """Examples whose averages fit the memory together, by length; for each prediction its example and right class."""

    items: list[EncodedExample]
    group: Tensor
    target: Tensor


def _chunks(items: Sequence[EncodedExample], classes: int) -> Iterator[Chunk]:
    """Cut the examples, shortest first, into chunks; nearly always there is one."""
    import torch

    def chunk(numbers: list[int]) -> Chunk:
        group = torch.tensor([number for number in numbers for _ in items[number].positions])
        target = torch.tensor([target for number in numbers for target in items[number].targets])
        return Chunk([items[number] for number in numbers], group, target)

    numbers: list[int] = []
    held = 0
    for number in sorted(range(len(items)), key=lambda number: len(items[number].ids)):
        size = len(items[number].positions) * classes
        if numbers and held + size > _AVERAGES:
            yield chunk(numbers)
            numbers, held = [], 0
        numbers.append(number)
        held += size
    yield chunk(numbers)


_Running = Callable[[], AbstractContextManager[None]]  # gives the block in which draws run
KeptDraws = dict[tuple[Variant, range], _Running]  # by source and members


def _passes(
    slots: AdapterSlots, posterior: Posterior, sources: Sequence[Variant], sampling: Sampling, kept: KeptDraws | None
) -> Iterator[tuple[Variant, int, _Running]]:
    """Yield the passes, all sources for the same draws together: the source, and how many draws run in which block.

    The next pass's draws are made in a thread while the model is busy with this one's.
    """
    pruned = functools.cache(posterior.prune)

    def draws(source: Variant, members: range) -> list[Mapping[str, Tensor]]:
        if source.base or (source, members) in (kept or ()):
            return []
        if math.isinf(source.tau):
            return [dict(pruned(source.ratio).mean)]
        tempered = pruned(source.ratio).temper(source.tau)
        return [tempered.sample(sampling.seed, member) for member in members]

    step = sampling.draws_per_pass
    todo = [
        (source, range(start, min(start + step, source.passes(sampling.samples))))
        for start in range(0, sampling.samples, step)
        for source in sources
        if start < source.passes(sampling.samples)
    ]
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draws, *todo[0])
        for position, (source, members) in enumerate(todo):
            ready = coming.result()
            if position + 1 < len(todo):
                coming = pool.submit(draws, *todo[position + 1])
            running = slots.drawn(ready) if ready else (kept or {}).get((source, members), slots.without)
            if kept is not None:
                kept[source, members] = running
            yield source, len(members), running


@dataclass
class Average:
    """Running means over draws of the probabilities (n, classes), of the entropies (n,) and of the variance (n,).

    Running, so that the average of equal draws is that draw to the last bit.
    """

    mean: Tensor
    entropy: Tensor
    variance: Tensor
    draws: int = 0

    def add(self, slots: Tensor, probabilities: Tensor) -> None:
        """Add the next draws' `probabilities` (draws, m, classes) at `slots` (m,)."""
        from ..metrics.scores import entropy

        for number, drawn in enumerate(probabilities, start=self.draws + 1):
            away = drawn - self.mean[slots]
            self.mean[slots] += away / number
            self.entropy[slots] += (entropy(drawn) - self.entropy[slots]) / number
            spread = (away * (drawn - self.mean[slots])).sum(1)  # Welford's
            self.variance[slots] += (spread - self.variance[slots]) / number

    def scores(self, chunk: Chunk, temperature: float, keep: bool) -> Scores:
        """Return the scores at a temperature."""
        from ..metrics.calibration import scores_at
        from ..metrics.scores import Scores

        target = chunk.target.to(self.mean.device)
        if temperature == 1:
            return Scores.of(self.mean, target, self.entropy, chunk.group, self.variance, keep)
        return scores_at(temperature, self.mean, target, chunk.group, self.draws > 1, keep)


def _accumulate(
    predictor: Predictor,
    chunk: Chunk,
    sources: Sequence[Variant],
    passes: Iterator[tuple[Variant, int, _Running]],
    prefix: Sequence[int],
    advance: Callable[[int], None],
) -> dict[Variant, Average]:
    """Average the predictions of all passes over a chunk, for each source; `prefix` is run once a pass."""
    import torch

    size = (len(chunk.target), predictor.classes(chunk.items))
    dtype = torch.float32 if predictor.task == "generate" else torch.float64
    zeros = functools.partial(torch.zeros, dtype=dtype, device=predictor.device)
    averages = {source: Average(zeros(size), zeros(size[0]), zeros(size[0])) for source in sources}
    batches: dict[int, list[Batch]] = {}
    for source, copies, running in passes:
        average = averages[source]
        if copies not in batches:
            batches[copies] = predictor.batches(chunk.items, len(prefix), copies)
        with running():
            cache = predictor.cache(prefix, copies) if prefix else None
            for batch in batches[copies]:
                for part, probabilities in predictor.predict(batch, cache, copies):
                    average.add(part.slots, probabilities)
                    advance(len(part) * copies)
        average.draws += copies
    return averages


@dataclass(frozen=True)
class EvaluationData:
    """The files of an evaluation, and how they are read.

    Attributes:
        files: JSONL files of chats.
        ood: files out of their distribution; where labels are predicted, texts and chats without answers will do.
        calibrate: a file to fit softmax temperatures on.
        task: "choice", "generate" or "classify"; by default "classify" if the adapter has a classification head,
            "choice" if `choices` are given or every answer is a label of training, else by the answers (`detect_task`).
        choices: the strings to choose from; by default the labels of training if every answer is one of them, else the
            answers in `files`.
        by_length: score choices by the mean log-probability of their tokens; by default by the sum.
        limit: take the first so many examples of each file.
        risk, coverage: the share of wrong answers, or of sets with the right one, that is to be promised, or None. The
            task "generate" is refused with either.
    """

    files: Sequence[str | Path]
    ood: Sequence[str | Path] = ()
    calibrate: str | Path | None = None
    task: str | None = None
    choices: Sequence[str] | None = None
    by_length: bool = False
    limit: int | None = None
    risk: float | None = None
    coverage: float | None = None


def check_promise(task: str, **promises: float | None) -> None:
    """Raise an IVONError if the task has no answers of which one of the `promises`, by parameter, could be made."""
    for name, value in promises.items():
        if value is None or task != "generate":
            continue
        raise IVONError(
            f"{param_ref(name)} {value:g}: the task generate scores tokens, and a promise is about answers; "
            "generate them, and use `ivon-post mbr --risk`"
        )


def _read_asked(path: str | Path, limit: int | None, name: str) -> list[Example]:
    """Read a file as `read_examples` does; one of texts, or of chats without answers, as `predict` reads it."""
    try:
        return read_examples(path, limit, name)
    except IVONError:
        questions = list[Example]()
        with suppress(IVONError):
            questions += read_questions(path, limit)
        if not questions:
            raise
        return questions


class Evaluation:
    """An adapter with its base model in memory, and data files tokenised for it: ready to score variants.

    Attributes:
        task: "choice", "generate" or "classify".
        choices: the strings to choose from, or the labels; empty for "generate".
        examples: what is evaluated.
        files: the data files with the numbers of their examples, in the order given.
        ood_files: the same for the files out of the distribution; their examples come after the data's.
        of_no_label: the numbers of those out of the distribution whose answer is none of the labels, or not there.
        items: the examples, tokenised; `held_out` those of the file to fit temperatures on.
        reader: turns chats into tokens.
        base_model: the name of the base model.
        model: the adapter over it, in memory; there is none with `served`.
        served: members on servers, in place of a model in memory, or None.
    """

    def __init__(
        self,
        adapter: str | Path,
        data: EvaluationData,
        variants: Sequence[Variant] = (),
        loading: Loading = Loading(),
        reporter: Reporter = SILENT,
        served: ServedModel | None = None,
    ) -> None:
        """Read the data, then the adapter, then the base model: a mistake shows before the slower steps.

        Without σ the adapter will do if none of `variants` needs it.

        Raises:
            IVONError: as `read_examples`, `choose_task`, `open_posterior` and `Session.open` do; a file is there
                twice; the file to calibrate on has answers that are no choices of the data.
        """
        self.examples: list[Example] = []
        self.files = self._place(read_files(data.files, data.limit, "data"))
        self.ood_files = self._place(read_files(data.ood, data.limit, "ood", _read_asked))
        held_out = read_examples(data.calibrate, data.limit, "calibrate") if data.calibrate is not None else []
        others = [(path, "ood", [self.examples[i] for i in where]) for path, where in self.ood_files.items()]
        others += [(str(data.calibrate), "calibrate", held_out)] if held_out else []
        for path, name, examples in others:
            questions = {repr(example.messages) for example in examples}
            for file, where in self.files.items():
                if questions == {repr(self.examples[i].messages) for i in where}:
                    raise IVONError(
                        f"{param_ref(name)} {path}: it has the same questions as {param_ref('data')} {file}; "
                        "give a file with others"
                    )
        mean_only = bool(variants) and not any(variant.needs_sigma for variant in variants)
        self.served = served
        self.posterior = served.members.posterior if served else open_posterior(adapter, mean_only=mean_only)
        own = self.examples[: sum(map(len, self.files.values()))]
        self.task, self.choices = choose_task(
            own, has_head(self.posterior), data.task, data.choices, self.posterior.metadata, reporter
        )
        if data.by_length and self.task != "choice":
            reporter.notify(f"{param_ref('by_length')} is about choices and changes nothing: the task is {self.task}")
        check_promise(self.task, risk=data.risk, coverage=data.coverage)
        for path, name, examples in others:
            silent = next((e for e in examples if not (e.answer or e.says_more)), None)
            if self.task == "generate" and silent:
                raise IVONError(
                    f"{param_ref(name)} {path}: {silent.source} has no answer, whose tokens are scored by "
                    f"{param_ref('task')} generate; give chats with answers"
                )
            strange = next((e for e in examples if self.choices and e.answer not in self.choices), None)
            if strange and name == "calibrate":
                raise IVONError(
                    f"{param_ref(name)} {path}: the answer {strange.answer!r} ({strange.source}) is not among the "
                    f"choices {','.join(self.choices)} of {param_ref('data')}; give a file with the same choices"
                )
        if served is not None:
            served.members.start(reporter)
            self.reader, self.base_model = served.members.reader, served.members.base_model
        else:
            session = Session.open(self.posterior, loading, reporter)
            self.reader, self.model, self.base_model = session, session.model, session.base_model
        self.choices = self.choices or self.reader.labels
        self.of_no_label = {i for i in range(len(own), len(self.examples)) if self._has_no_label(self.examples[i])}
        # The first label stands in for their answer, by which the encoder would refuse them.
        asked = [
            replace(e, answer=self.choices[0], more={}) if i in self.of_no_label else e
            for i, e in enumerate(self.examples)
        ]
        items = self.reader.encode(asked + held_out, self.task, self.choices, data.by_length)
        self.items, self.held_out = items[: len(self.examples)], items[len(self.examples) :]

    def _place(self, files: Mapping[str, Sequence[Example]]) -> dict[str, range]:
        """Put the examples of files to the end of `examples`, and return where each one's are."""
        places: dict[str, range] = {}
        for path, examples in files.items():
            places[path] = range(len(self.examples), len(self.examples) + len(examples))
            self.examples += examples
        return places

    def _has_no_label(self, example: Example) -> bool:
        """Say whether the answer of an example is none of the labels, or of a head their index."""
        if self.task == "generate":
            return False
        index = self.task == "classify" and example.answer.isdecimal() and int(example.answer) < len(self.choices)
        return example.says_more or not (example.answer in self.choices or index)

    def run(
        self,
        variants: Sequence[Variant],
        sampling: Sampling = Sampling(),
        reporter: Reporter = SILENT,
        posterior: Posterior | None = None,
        items: Sequence[EncodedExample] | None = None,
    ) -> list[Scores]:
        """Return the scores of every variant: see `evaluate`. By default of the adapter's posterior on all examples."""
        items = self.items if items is None else items
        if self.served is not None:
            return self.served.evaluate(items, variants, self.task, sampling.keep, reporter)
        return evaluate(self.model, posterior or self.posterior, items, variants, self.task, sampling, reporter)

    def temperatures(
        self, variants: Sequence[Variant], sampling: Sampling = Sampling(), reporter: Reporter = SILENT
    ) -> list[Variant]:
        """Return NAME+temperature for each variant, with the temperature that minimizes the NLL of `held_out`.

        It is fitted on as many of the file's first examples as fit the memory.
        """
        import torch

        from ..metrics.calibration import TEMPERATURES, fit_temperature

        of_tokens = self.served is None and self.task == "generate"
        classes = self.model.config.get_text_config().vocab_size if of_tokens else max(len(self.choices), 1)
        most = _AVERAGES // (classes * len(variants))
        sizes = itertools.accumulate(len(item.positions) for item in self.held_out)
        items = self.held_out[: max(1, sum(size <= most for size in sizes))]
        if len(items) < len(self.held_out):
            reporter.notify(f"temperatures are fitted on the first {len(items)} examples: more do not fit the memory")
        target = torch.tensor([target for item in items for target in item.targets])
        reporter.begin("fitting temperatures")
        scored = self.run(variants, replace(sampling, keep=True), reporter, items=items)
        fitted = []
        for variant, scores in zip(variants, scored, strict=True):
            assert scores.probabilities is not None
            temperature = fit_temperature(scores.probabilities[scores.group.argsort(stable=True)], target)
            if temperature in TEMPERATURES:
                reporter.notify(
                    f"the temperature of the {variant.name} is at its limit, {temperature:g}: the file that it is "
                    "fitted on is too small, or too easy"
                )
            fitted.append(replace(variant, name=f"{variant.name}+temperature", temperature=temperature))
        return fitted
