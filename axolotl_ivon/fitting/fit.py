"""A posterior for an adapter that has only a mean: data, λ, one of the three methods, and the facts of the header.

Importing this module imports no torch: what a user got wrong is told at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.chats import Example, read_examples
from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..evaluation.evaluate import Evaluation, Variant, evaluate
from ..models.session import Loading, Session
from ..noise import generator as numpy_generator
from ..posterior.adapter import UNPRUNED, Adapter
from ..posterior.card import CARD_FILE, update_card
from ..posterior.posterior import Posterior
from ..posterior.tensors import fingerprint
from ..reporter import SILENT, Reporter
from ..storage.format import SIGMA_FILE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .fisher import Squares
    from .ivon import Averages
    from .precision import Prior

METHODS = ("ivon", "fisher", "tfb")
# λ that the validation data choose from, as multiples of the one that N gives.
FACTORS = tuple(4.0**k for k in range(-3, 4))
TOLERANCE = 0.01  # nats


@dataclass(frozen=True)
class Settings:
    """What is fitted, and how; see `fit` for what each means.

    Raises:
        IVONError: a value is out of range, or does not go with the method.
    """

    method: Literal["ivon", "fisher", "tfb"] = "ivon"
    empirical: bool = False
    ess: float | None = None
    prior: Literal["empirical"] | float = "empirical"
    prior_strength: float = 1.0
    validation: str | None = None
    anchor: str | None = None
    tolerance: float | None = None
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise IVONError(f"{param_ref('method')} {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        tfb = self.method == "tfb"
        for name, used in (
            ("empirical", not tfb),
            ("ess", not tfb),
            ("prior", not tfb),
            ("prior_strength", not tfb),
            ("validation", not tfb),
            ("anchor", tfb),
            ("tolerance", tfb),
        ):
            value = getattr(self, name)
            if not used and value != getattr(type(self), name):
                what = (
                    f"the width of {param_ref('method')} tfb is found by {param_ref('tolerance')} alone"
                    if tfb
                    else f"it is for {param_ref('method')} tfb"
                )
                shown = "" if value is True else f" {value}"
                raise IVONError(f"{param_ref(name)}{shown}: {what}; leave it out")
        if self.ess is not None and self.validation is not None:
            raise IVONError(
                f"{param_ref('ess')} {self.ess:g}: {param_ref('validation')} chooses it; leave one of them out"
            )
        for name, least, fix in (
            ("ess", 0, "give a number > 0"),
            ("prior_strength", 0, "give a number > 0; 1 is the KL-optimal prior"),
            ("tolerance", 0, "give nats > 0"),
            ("samples", 1, "give a number of draws"),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least and value > 0):
                raise IVONError(f"{param_ref(name)} {value:g}: {fix}")
        if self.prior != "empirical" and not (
            isinstance(self.prior, (int, float)) and math.isfinite(self.prior) and self.prior > 0
        ):
            raise IVONError(f"{param_ref('prior')} {self.prior!r}: give empirical, or a number > 0")

    @property
    def held_out(self) -> str | None:
        """The file on which predictions are evaluated, where one is named."""
        return self.validation or self.anchor


def fit(
    adapter: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    refit: bool = False,
    limit: int | None = None,
    task: str | None = None,
    choices: Sequence[str] | None = None,
    loading: Loading = Loading(),
    batch_size: int | None = None,
    state: Path | None = None,
    reporter: Reporter = SILENT,
    **settings: Any,
) -> Posterior:
    """Return the posterior of an adapter around its own mean, which stays as it is, byte for byte.

    σ² = 1/(λ·(h + δ)) as in training, with δ of the prior and h by the method. Its header says `fit_method` and what
    it was fitted on.

    Args:
        adapter: a folder or Hub id.
        data: JSONL files of chats, as the adapter was trained on. What counts is the answers, all assistant turns, or
            the label of a classifier.
        settings: `method`: "ivon", IVON's updates of the precision at draws (`fitting.ivon`); "fisher", the Fisher
            information at the mean in one pass (`fitting.fisher`); "tfb", the widest noise on A within a tolerance
            (`fitting.tfb`). `empirical`: labels of the data in place of labels drawn from the model. `ess`: λ; by
            default that of `ivon_preset: auto` for N examples, or with `validation` (a file) the one whose averaged
            draws have the lowest NLL there, of 1/64 to 64 times that. `prior` and `prior_strength`: as in `IVONLoRA`.
            `anchor` (the data by default) and `tolerance` of tfb: the NLL of averaged draws there may be this many
            nats above the mean's. `samples`, `seed`: draws that are averaged, and the seed of all that is random.
        refit: replace the σ that an adapter has.
        limit: use the first so many examples of each file.
        task, choices: how the validation or anchor data are predicted, as for `ivon-post eval`.
        loading: how the base model is found and held in memory.
        batch_size: examples in a batch, or None to choose; fewer when the memory runs out.
        state: a file from which an interrupted fit goes on; it stays until `save` removes it.
        reporter: hears of progress.

    Raises:
        IVONError: a setting is out of range, the adapter has σ already (and not `refit`) or does not fit the data or
            the base model, there are no data, or the memory is too small.
    """
    files = [data] if isinstance(data, (str, Path)) else data
    job = _Job(adapter, files, Settings(**settings), refit, limit, batch_size)
    job.load(task, choices, loading, reporter)
    return job.run(state, reporter)


def save(
    posterior: Posterior,
    folder: Path,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
    state: Path | None = None,
) -> None:
    """Write a fitted posterior, whole or not at all, and remove the `state` of its fit.

    The model card, where there is one, tells of it.

    Raises:
        IVONError: as `Posterior.save_pretrained`.
    """
    posterior.save_pretrained(folder, overwrite, reporter)
    if (folder / CARD_FILE).is_file():
        with contextlib.suppress(IVONError):  # a damaged card goes along as it is
            update_card(folder)
    if state:
        state.unlink(missing_ok=True)


def summary(posterior: Posterior) -> dict[str, Any]:
    """Return how many weights have a σ, and the medians of σ and of |m|/σ among them (None without any)."""
    sigma = np.concatenate([posterior.sigma.raw(key).ravel() for key in posterior.sigma])
    mean = np.concatenate([posterior.mean.float32(key).ravel() for key in posterior.mean])
    drawn = sigma > 0
    medians = [float(np.median(x)) if x.size else None for x in (sigma[drawn], np.abs(mean[drawn]) / sigma[drawn])]
    return {"weights": int(drawn.sum()), "sigma_median": medians[0], "snr_median": medians[1]}


class _Job:
    """One fit: the adapter, its base model, and data that are tokenised for it."""

    def __init__(
        self,
        adapter: str | Path,
        data: Sequence[str | Path],
        settings: Settings,
        refit: bool,
        limit: int | None,
        batch_size: int | None,
    ) -> None:
        self.settings, self.limit, self.batch_size = settings, limit, batch_size
        self.data = [Path(path) for path in data]
        self.examples: list[Example] = []
        for path in self.data:
            if self.data.count(path) > 1:
                raise IVONError(f"{param_ref('data')} {path} is given twice; give each file once")
            self.examples += read_examples(path, limit)
        self.digest = hashlib.sha256(b"".join(path.read_bytes() for path in self.data)).hexdigest()
        if settings.held_out:
            read_examples(settings.held_out, limit, "validation" if settings.validation else "anchor")
        self.adapter = Adapter(adapter)
        if self.adapter.sigma is not None and not refit:
            how = self.adapter.metadata.get("fit_method")
            came = f"fitted by {how}" if how else "trained"
            raise IVONError(
                f"{adapter} has a σ already, {came}, in {SIGMA_FILE}; replace it in the copy that is written with "
                f"{param_ref('refit')}"
            )

    def load(
        self,
        task: str | None,
        choices: Sequence[str] | None,
        loading: Loading,
        reporter: Reporter,
    ) -> None:
        """Load the base model, and tokenise the data."""
        settings = self.settings
        held_out = [settings.held_out] if settings.held_out else self.data if settings.method == "tfb" else []
        self.evaluation: Evaluation | None = None
        if held_out:
            self.evaluation = Evaluation(
                self.adapter.folder,
                held_out,
                rows=[Variant("mean")],
                task=task,
                choices=choices,
                limit=self.limit,
                begin=reporter.begin,
                **asdict(loading),
            )
            self.session = Session(self.evaluation.model, self.adapter)
        else:
            self.session = Session.open(self.adapter, loading, reporter)
        self.model = self.session.model
        from ..models.gradients import make_differentiable

        make_differentiable(self.model)
        items = self.session.encode_for_training(self.examples)
        self.items = [item for item in items if item.positions]
        if len(self.items) < len(items):
            left = (
                f"{len(items) - len(self.items)} of {len(items)} examples have no answer within "
                f"{self.session.max_length} tokens"
            )
            if not self.items:
                raise IVONError(f"{param_ref('data')}: {left}; give shorter conversations")
            reporter.notify(f"{left} and are left out")

    def run(self, path: Path | None, reporter: Reporter) -> Posterior:
        """Fit."""
        from ..models.gradients import adapter_parameters
        from .state import State

        self.reporter = reporter
        self.parameters = adapter_parameters(self.model)
        self.fingerprint = fingerprint(self.adapter.mean, self.adapter.digests())
        self.state = State(path, self._key())
        if self.settings.method == "tfb":
            sigma, facts = self._tfb()
        else:
            sigma, facts = self._by_information()
        return self._posterior(sigma, facts)

    def _key(self) -> str:
        """Return what identifies this fit."""
        held_out = self.evaluation.items if self.evaluation else []
        facts = {
            "mean": self.fingerprint,
            "settings": asdict(self.settings),
            "items": _digest(self.items),
            "held_out": _digest(held_out),
            "model": self.session.base_model,
            "dtype": str(next(self.model.get_base_model().parameters()).dtype),
            "batch_size": self.batch_size,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _posterior(self, sigma: Mapping[str, Tensor], facts: Mapping[str, str]) -> Posterior:
        """Return the posterior with these σ by parameter; what is saved without being trained has σ = 0."""
        import torch

        names = {parameter: name for name, parameter in self.parameters.items()}
        held: dict[str, Tensor] = {}
        first: dict[str, str] = {}  # of the keys under which a shared parameter was saved
        aliases: dict[str, str] = {}
        for key, (_, shape) in sorted(self.adapter.mean.specs.items()):
            name = names.get(self.session.slots.places.get(key))  # type: ignore[arg-type]
            held[key] = torch.zeros(shape) if name is None or name not in sigma else sigma[name].float().cpu()
            if name is not None and first.setdefault(name, key) != key:
                aliases[key] = first[name]
        before, old = self.adapter.metadata, self.adapter.sigma
        if old is not None and float(before.get("pruned_ratio", 0)):
            for key, value in held.items():  # what was pruned stays so
                pruned = (old.raw(key) == 0) & (self.adapter.mean.float32(key) == 0)
                value[torch.from_numpy(np.ascontiguousarray(pruned))] = 0
        kept = {name: before[name] for name in ("pruned_ratio", UNPRUNED, "moved", "travel") if name in before}
        header = {
            "tau": "1.0",
            "pruned_ratio": "0.0",
            **kept,
            "fit_method": self.settings.method,
            "fit_data": ", ".join(path.name for path in self.data),
            "fit_data_sha256": self.digest,
            "fit_seed": str(self.settings.seed),
            "train_size": str(len(self.items)),
            **facts,
            "mean_sha256": self.fingerprint,
        }
        return Posterior(
            self.adapter.mean,
            held,
            header,
            self.adapter.config,
            folder=self.adapter.folder,
            mean_metadata=self.adapter.mean_metadata,
            aliases=aliases,
            known_fingerprint=self.fingerprint,
        )

    # ---------------------------------------------------------------- by information

    def _by_information(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        from ..settings.presets import PRESETS
        from .precision import Prior

        settings, preset = self.settings, PRESETS["auto"]
        weights = sum(parameter.numel() for parameter in self.parameters.values())
        ess = settings.ess or preset.ess(len(self.items), weights)
        prior = Prior(ess, settings.prior, settings.prior_strength)
        if settings.method == "fisher":
            information, steps = self._fisher(), 0
            if settings.validation:
                prior = self._choose(information, prior)
        else:
            information, prior, steps = self._ivon(prior)
        facts = {
            "ess": str(prior.ess),
            "prior": str(settings.prior),
            "prior_strength": str(settings.prior_strength),
            "hessian": "fisher",
            "fit_labels": "data" if settings.empirical else "sampled",
            **({"fit_steps": str(steps)} if steps else {}),
            **({"fit_validation": Path(settings.validation).name} if settings.validation else {}),
        }
        return self._sigma(information, prior), facts

    def _sigma(self, information: Mapping[str, Tensor], prior: Prior) -> dict[str, Tensor]:
        means = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {name: prior.sigma(h, prior.delta(h, means[name])) for name, h in self._complete(information).items()}

    def _complete(self, information: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return h of all parameters; the loss depends on none whose h nobody has heard of."""
        import torch

        return {
            name: information[name] if name in information else torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in self.parameters.items()
        }

    @contextlib.contextmanager
    def _squarer(self) -> Iterator[tuple[Callable[[Sequence[EncodedExample]], Squares], torch.Generator | None]]:
        """Give what squares gradients of batches, and the generator of the labels, which is seeded for each."""
        import torch

        from ..models.gradients import ExampleGradients, example_losses, negative_log_likelihood
        from .fisher import Squarer, residual_loss

        drawn = None if self.settings.empirical else torch.Generator(self.model.device)
        loss = negative_log_likelihood if drawn is None else residual_loss(drawn)
        losses = functools.partial(example_losses, self.model, loss=loss)
        with ExampleGradients(self.model, self.parameters, losses, self.reporter) as gradients:
            if len(self.items) > 1:  # before labels are seeded, so that the trial takes none of them
                by_length = sorted(self.items, key=lambda item: len(item.ids))
                gradients.try_on([by_length[0], by_length[len(by_length) // 2]])
            yield Squarer(gradients, lambda item: len(item.positions), self.reporter), drawn

    def _batches(
        self, batches: Iterator[list[EncodedExample]], done: int, drawn: torch.Generator | None
    ) -> Iterator[list[EncodedExample]]:
        """Yield the batches after the first `done`, and seed the labels of each by its number."""
        for number, batch in enumerate(itertools.islice(batches, done, None), start=done):
            if drawn is not None:
                drawn.manual_seed(int(numpy_generator("labels of fit", self.settings.seed, number).integers(2**62)))
            yield batch

    def _fisher(self) -> dict[str, Tensor]:
        from ..models.batching import Batches
        from .fisher import Squares, fisher
        from .state import Snapshot

        batches = Batches(self.items, self.batch_size, self.model.device.type, self.session.classes).once()
        kept = self.state.read()
        at = 0, Squares({}, 0)
        if kept:
            total = {name: value.to(self.model.device) for name, value in kept.tensors.items()}
            at = kept.facts["batches"], Squares(total, kept.facts["losses"])
        done = self.reporter.begin("Fisher information", len(self.items))
        done(sum(map(len, batches[: at[0]])))

        def snapshot() -> Snapshot:
            return Snapshot(at[1].total, {"losses": at[1].losses, "batches": at[0]})

        with self._squarer() as (square, drawn), self.state.kept(snapshot):
            sums = enumerate(fisher(square, self._batches(iter(batches), at[0], drawn), at[1]), start=at[0] + 1)
            for at in sums:
                done(len(batches[at[0] - 1]))
                self.state.keep(snapshot)
        if self.settings.validation:
            self.state.write(snapshot())
        return at[1].information()

    def _ivon(self, prior: Prior) -> tuple[dict[str, Tensor], Prior, int]:
        """Return h at draws of a σ that has settled; with validation data at that λ first, then at the one chosen."""
        from ..settings.presets import PRESETS
        from .ivon import Averages

        fan_ins = [value.shape[-1] for name, value in self.parameters.items() if ".lora_A." in name]
        start: Any = PRESETS["auto"].first_h0(prior.ess, fan_ins)
        progress, stage = Averages(), 0
        if kept := self.state.read():
            progress, stage = Averages.restored(kept, self.model.device), kept.facts["stage"]
            prior = prior._replace(ess=kept.facts["ess"])
        stages = 2 if self.settings.validation else 1
        steps = 0
        while True:
            progress = self._settle(progress, prior, start, stage)
            steps += progress.step
            information = self._complete(progress.information())
            stage += 1
            if stage >= stages:
                return information, prior, steps
            prior, start, progress = self._choose(information, prior), information, Averages()

    def _settle(self, progress: Averages, prior: Prior, start: Any, stage: int) -> Averages:
        from ..models.batching import Batches
        from .ivon import MOST, SETTLED, iterate
        from .state import Snapshot

        def snapshot() -> Snapshot:
            kept = progress.kept()
            return Snapshot(kept.tensors, {**kept.facts, "stage": stage, "ess": prior.ess})

        batches = Batches(self.items, self.batch_size, self.model.device.type, self.session.classes)
        doing = "fitting σ" if not stage else "fitting σ at the λ chosen"
        done = self.reporter.begin(doing, 0)
        done(progress.step)
        with self._squarer() as (square, drawn), self.state.kept(snapshot):
            stream = self._batches(batches.endless(self.settings.seed), progress.step, drawn)
            told = progress.change
            steps = iterate(self.parameters, square, stream, prior, start, progress, self.settings.seed)
            for progress in steps:
                done(1)
                if progress.change != told and progress.step >= 8:
                    told = progress.change
                    self.reporter.say(
                        f"{progress.step} steps: σ changed by {told:.1%} since half as many (settled at {SETTLED:.0%})"
                    )
                self.state.keep(snapshot)
        if self.settings.validation:
            self.state.write(snapshot())
        if not progress.settled:
            self.reporter.notify(
                f"σ has not settled after {MOST:,} steps: it still changes by {progress.change or 0:.1%}; a larger "
                f"{param_ref('batch_size')} would do"
            )
        return progress

    def _choose(self, information: Mapping[str, Tensor], prior: Prior) -> Prior:
        """Return the prior at the λ whose averaged draws have the lowest NLL on the validation data."""
        assert self.evaluation is not None
        settings, evaluation = self.settings, self.evaluation
        ladder = [prior.ess * factor for factor in FACTORS]
        done = self.reporter.begin("choosing λ", len(ladder) * settings.samples * len(evaluation.items))
        losses = []
        for ess in ladder:
            posterior = self._posterior(self._sigma(information, prior._replace(ess=ess)), {})
            losses.append(self._nll(posterior, Variant("posterior", tau=1.0), done))
        best = min(range(len(ladder)), key=lambda i: losses[i])
        table = ", ".join(f"{ess:.3g}: {loss:.3f}" for ess, loss in zip(ladder, losses, strict=True))
        self.reporter.say(f"NLL on {settings.validation} by λ: {table}; λ = {ladder[best]:.3g}")
        if best in (0, len(ladder) - 1):
            self.reporter.notify(
                f"λ = {ladder[best]:.3g} is at the edge of what was tried; see what `ivon-post sweep` says of τ"
            )
        return prior._replace(ess=ladder[best])

    def _nll(self, posterior: Posterior, row: Variant, done: Callable[[int], None]) -> float:
        """Return the NLL of one prediction on the held-out data; the draws are the same for every posterior."""
        assert self.evaluation is not None
        [scores] = evaluate(
            self.model,
            posterior,
            self.evaluation.items,
            [row],
            self.evaluation.task,
            samples=self.settings.samples,
            seed=self.settings.seed,
            batch_size=self.batch_size,
            progress=done,
            notify=self.reporter.notify,
        )
        value = float(scores.nll.mean())
        return value if math.isfinite(value) else math.inf

    # ---------------------------------------------------------------- TFB

    def _tfb(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        from .state import Snapshot
        from .tfb import FARTHEST, MOST, first_width, noise_shape, widest

        assert self.evaluation is not None
        settings = self.settings
        tolerance = TOLERANCE if settings.tolerance is None else settings.tolerance
        shape = noise_shape(self.model, self.parameters)
        width = first_width(shape, {name: self.parameters[name].detach() for name in shape})
        if not width:
            raise IVONError(
                f"{self.adapter.folder} has no LoRA matrices with weights other than 0; {param_ref('method')} tfb is "
                f"for LoRA: use ivon"
            )
        unit = self._posterior(shape, {})
        kept = self.state.read()
        known: dict[str, float] = dict(kept.facts["nll"]) if kept else {}
        passes = 1 + (MOST - 1) * settings.samples
        done = self.reporter.begin("finding the width", passes * len(self.evaluation.items))

        def nll(width: float) -> float:
            if (name := repr(width)) not in known:
                row = Variant("mean") if not width else Variant("posterior", tau=width**-2)
                known[name] = self._nll(unit, row, done)
                self.state.write(Snapshot({}, {"nll": known}))
            return known[name]

        mean = nll(0.0)
        found, tried = widest(lambda width: nll(width) - mean - tolerance, width, MOST - 1)
        for one, cost in tried:
            self.reporter.say(
                f"σ_q = {one:.4g}: NLL {mean + cost + tolerance:.4f}, {cost + tolerance:+.4f} of {tolerance:g}"
            )
        if not found:
            raise IVONError(
                f"{param_ref('tolerance')} {tolerance:g}: every width that was tried raises the NLL by more; allow more"
            )
        if found >= FARTHEST * width:
            self.reporter.notify(
                "noise six times as large as the weights does not raise the NLL by as much; nothing wider was tried: "
                "do the data depend on the adapter?"
            )
        facts = {
            "tfb_sigma_q": repr(found),
            "tfb_tolerance": str(tolerance),
            "tfb_anchor": ", ".join(path.name for path in ([Path(settings.anchor)] if settings.anchor else self.data)),
            "tfb_nll_mean": f"{mean:.6g}",
            "tfb_nll": f"{known[repr(found)]:.6g}",
            "tfb_evaluations": str(len(known)),
        }
        return {name: value * found for name, value in shape.items()}, facts


def _digest(items: Sequence[EncodedExample]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.ids, item.positions, item.targets, item.candidates)).encode())
    return digest.hexdigest()
