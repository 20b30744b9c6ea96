"""How much every training example shaped the mean, by the Memory-Perturbation Equation (arXiv 2310.19273).

One gradient of an example's loss, at the mean m, predicts the effect of leaving the example out, without retraining.
The objective is λ·(mean loss of N examples) + KL, so an example's loss ℓᵢ has the weight λ/N in it, and without it

    m₋ᵢ ≈ m + (λ/N)·σ²·∇ℓᵢ(m)

to first order; docs/influence-derived.md derives it, and names the cases in which it is exact. The backward pass hands
over the gradients of one parameter at a time. They are multiplied by σ², and leave two numbers an example.

Importing this module imports no torch: a wrong input is refused at once.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..data.chats import read_examples
from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..models.batching import Batches, Halving
from ..models.session import Loading, Session
from ..posterior.posterior import Posterior
from ..records.influence import SCORES, InfluenceRecord
from ..reporter import SILENT, Reporter
from ..storage.format import SIGMA_FILE, header_number

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..models.gradients import ExampleGradients

_T = TypeVar("_T")


class Products(NamedTuple):
    """What examples' gradients g of their losses leave behind, each float64 [k]."""

    losses: Tensor
    own: Tensor  # Σ σ²·g²
    along: Tensor | None  # Σ σ²·g·(a direction), if there is one


def products(
    gradients: ExampleGradients[_T],
    examples: Sequence[_T],
    variance: Mapping[str, Tensor],
    direction: Mapping[str, Tensor] | None = None,
) -> Products:
    """Run one backward pass over `examples`, and meet each one's gradient with σ² and with σ²·`direction`.

    Both are by parameter, float32 of its shape; what is not in `variance` does not move.
    """
    import torch

    device = next(iter(variance.values())).device
    own = torch.zeros(len(examples), device=device)
    along = torch.zeros(len(examples), device=device)

    def consume(name: str, first: int, some: Tensor) -> None:
        if name not in variance:
            return
        part, flat = slice(first, first + len(some)), some.flatten(1)
        scaled = variance[name].flatten()
        if direction is not None and name in direction:
            along[part] += flat @ (scaled * direction[name].flatten())
        own[part] += flat.square_() @ scaled

    losses = gradients(examples, consume)
    return Products(losses.cpu().double(), own.cpu().double(), None if direction is None else along.cpu().double())


def log_odds_variance(losses: Tensor, own: Tensor) -> Tensor:
    """Return the variance under σ of log(p/(1 − p)), to first order, p = exp(−loss) being what the answers have.

    Its gradient is −∇ℓ/(1 − p). Of two classes it is the same whichever is right: the variance of the logit.
    """
    import torch

    return own / torch.expm1(-losses).square().clamp_min(sys.float_info.min)


@dataclass(frozen=True)
class Influences:
    """The influence of each row of the training data on a posterior.

    Attributes:
        rows: the scores of each row, in order.
        summary: what they were computed with: `ess` (λ), `train_size` (N), `tau`, `base_model`, `mean_sha256`.
    """

    rows: list[InfluenceRecord]
    summary: dict[str, Any]


def influence(
    adapter: str | Path,
    data: str | Path,
    on: str | Path | None = None,
    *,
    limit: int | None = None,
    loading: Loading = Loading(),
    batch_size: int | None = None,
    reporter: Reporter = SILENT,
) -> Influences:
    """Return how much each row of `data` shaped the mean of a posterior, from one backward pass over the rows.

    The loss is that of training: the tokens of the assistant's turns, or the label of a classifier.

    Args:
        adapter: a folder or Hub id, with σ.
        data: a JSONL file of chats, as the adapter was trained on.
        on: another one, for the effect on the loss there; one more pass, over it.
        limit: use only the first examples of each file.
        loading: how the base model is found and held in memory.
        batch_size: examples in a batch, or None to choose; fewer when the memory runs out.
        reporter: is told of progress.

    Raises:
        IVONError: the data or the adapter cannot be read, its σ is 0 or does not say λ, the base model does not fit, or
            a single example does not fit the memory.
    """
    examples = read_examples(data, limit)
    others = read_examples(on, limit, "on") if on is not None else []
    posterior = Posterior.from_pretrained(adapter)
    if not any(posterior.sigma.raw(key).any() for key in posterior.sigma):
        raise IVONError(f"{adapter}: every σ is 0, so no weight would move; give the posterior before it was tempered")
    ess, size = _weights(posterior, adapter, len(examples), limit is None, reporter)
    session = Session.open(posterior, loading, reporter)
    items = session.encode_for_training(examples + others)
    trained, judged = items[: len(examples)], items[len(examples) :]
    scored = session.with_answers(trained, f"{param_ref('data')} {data}", reporter)
    passes = _Passes(session, posterior, batch_size, reporter)
    direction = None
    if on is not None:
        judged = session.with_answers(judged, f"{param_ref('on')} {on}", reporter)
        direction = passes.mean_gradient(judged, reporter.begin(f"gradient on {Path(on).name}", len(judged)))
    tokens = sum(len(item.positions) for item in scored) / len(scored)
    advance = reporter.begin("influence", len(scored))
    scores = passes.scores(scored, direction, ess / size / tokens, advance)
    sha = posterior.metadata["mean_sha256"]
    rows = []
    for index, (example, item) in enumerate(zip(examples, trained, strict=True)):
        values: dict[str, Any] = scores.get(id(item), dict.fromkeys(SCORES))
        finite = {name: None if x is None or not math.isfinite(x) else x for name, x in values.items()}
        more = {"line": example.line, "question": example.question, "answer": example.answer, "mean_sha256": sha}
        rows.append(InfluenceRecord.model_validate({"index": index, **finite, **more}))
    summary: dict[str, Any] = {"ess": ess / posterior.tau, "train_size": size, "tau": posterior.tau}
    summary |= {"base_model": session.base_model, "mean_sha256": sha}
    return Influences(rows, summary)


def _weights(
    posterior: Posterior, adapter: str | Path, rows: int, every_row: bool, reporter: Reporter
) -> tuple[float, int]:
    """Return what the data weigh in a posterior before it was tempered, from the header of σ: λ, and N.

    N, the number of examples, is that of the rows where the header does not say it.
    """
    ess, size = header_number(posterior.metadata, "ess"), int(header_number(posterior.metadata, "train_size") or 0)
    if ess is None or ess <= 0:
        raise IVONError(
            f"{adapter}: {SIGMA_FILE} has no effective sample size (ess), by which an example weighs; train with "
            "IVON, or fit with method ivon or fisher"
        )
    if size < 1:
        reporter.notify(f"the adapter does not say how many examples it was trained on: taken to be these {rows}")
        size = rows
    elif every_row and size != rows:
        reporter.notify(
            f"the adapter was trained on {size} examples, and these are {rows}: give the data of its training"
        )
    return ess * posterior.tau, size


class _Passes:
    """Backward passes over a loaded model, of fewer examples at once when the memory runs out."""

    def __init__(self, session: Session, posterior: Posterior, batch_size: int | None, reporter: Reporter) -> None:
        from ..models.gradients import adapter_parameters, exact_negative_log_likelihood, example_losses

        self._session, self._size, self._reporter = session, batch_size, reporter
        self._losses = functools.partial(example_losses, session.model, loss=exact_negative_log_likelihood)
        self._halving = Halving(reporter=reporter)
        self._variance: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, parameter in adapter_parameters(session.model).items():
            if (sigma := posterior.sigma[name]).any():  # else it was not trained
                self._variance[name], self._parameters[name] = sigma.to(session.device).square(), parameter

    def mean_gradient(self, items: Sequence[EncodedExample], advance: Callable[[int], None]) -> dict[str, Tensor]:
        """Return the gradient of the loss on `items`, the mean over all their tokens, by parameter."""
        import torch

        from ..models.gradients import ExampleGradients

        count = sum(len(item.positions) for item in items)
        total: dict[str, Tensor] = {}

        def losses(parts: Sequence[Sequence[EncodedExample]]) -> Tensor:
            # A batch is one example here, of which autograd sums.
            return torch.stack([self._losses(part).sum() / count for part in parts])

        with ExampleGradients(self._session.model, self._parameters, losses) as gradients:

            def run(part: Sequence[EncodedExample]) -> dict[str, Tensor]:
                mean: dict[str, Tensor] = {}
                gradients([part], lambda name, first, some: mean.__setitem__(name, some[0].clone()))
                return mean

            for part, mean in self._in_parts(items, run):
                for name, value in mean.items():
                    total[name] = total[name] + value if name in total else value
                advance(len(part))
        return total

    def scores(
        self,
        items: Sequence[EncodedExample],
        direction: Mapping[str, Tensor] | None,
        weight: float,
        advance: Callable[[int], None],
    ) -> dict[int, dict[str, float | None]]:
        """Return the scores by the `id` of every item; `weight` is that of a token's loss in the objective."""
        from ..models.gradients import ExampleGradients

        scores: dict[int, dict[str, float | None]] = {}
        with ExampleGradients(self._session.model, self._parameters, self._losses, self._reporter) as gradients:
            run = functools.partial(products, gradients, variance=self._variance, direction=direction)
            for part, result in self._in_parts(items, run):
                leverage = log_odds_variance(result.losses, result.own).tolist()
                along = [None] * len(part) if result.along is None else (weight * result.along).tolist()
                columns = zip(part, result.losses.tolist(), result.own.tolist(), leverage, along, strict=True)
                for item, loss, own, spread, on in columns:
                    tokens = len(item.positions)
                    values = (loss / tokens, spread, weight * own / tokens, on)
                    scores[id(item)] = dict(zip(SCORES, values, strict=True))
                advance(len(part))
        return scores

    def _in_parts(
        self, items: Sequence[EncodedExample], run: Callable[[Sequence[EncodedExample]], _T]
    ) -> Iterator[tuple[Sequence[EncodedExample], _T]]:
        session = self._session
        for batch in Batches(items, self._size, session.device.type, session.classes).once():
            yield from self._halving.over(batch, run)
