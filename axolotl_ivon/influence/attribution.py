"""What every training example has done to the mean, by the Memory-Perturbation Equation (arXiv 2310.19273).

One gradient of an example's loss, at the mean m, tells what leaving the example out would do, without retraining. The
objective is λ·(mean loss of N examples) + KL, so an example's loss ℓᵢ has the weight λ/N in it, and without it

    m₋ᵢ ≈ m + (λ/N)·σ²·∇ℓᵢ(m)

to first order; docs/influence.md derives it, and says where it is exact. Gradients meet σ² as the backward pass hands
them over, a parameter at a time, and leave two numbers an example.

Importing this module imports no torch: what a user got wrong is told at once.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..data.chats import Example, read_examples
from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..models.session import Loading, Session
from ..posterior.posterior import Posterior
from ..reporter import SILENT, Reporter
from ..storage.atomic import new_file
from ..storage.format import SIGMA_FILE, read_lines

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.gradients import ExampleGradients

_T = TypeVar("_T")
SCORES = ("loss", "leverage", "sensitivity", "on")


class Products(NamedTuple):
    """What examples' gradients g of their losses leave behind, each float64 [k].

    Attributes:
        losses: the examples' losses.
        own: Σ σ²·g².
        along: Σ σ²·g·(a direction), or None without one.
    """

    losses: Tensor
    own: Tensor
    along: Tensor | None


def products(
    gradients: ExampleGradients[_T],
    examples: Sequence[_T],
    variance: Mapping[str, Tensor],
    direction: Mapping[str, Tensor] | None = None,
) -> Products:
    """Run one backward pass over `examples`, and meet each one's gradient with σ² and with σ²·`direction`.

    Args:
        variance: σ² by parameter, float32 of its shape; what is not in it does not move.
        direction: a gradient by parameter, likewise.
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


# ---------------------------------------------------------------------- an adapter's


@dataclass(frozen=True)
class Influences:
    """What a posterior says of the rows of its training data.

    Attributes:
        rows: a dictionary for each row, in order. `index` (from 0); `loss`: mean over the answer's tokens, at the mean;
            `leverage`: the variance under σ of the answer's log-odds; `sensitivity`: by how much the loss would rise if
            the row were left out; `on`: the same of the loss on other data, below 0 where the row hurts, or None
            without them; and `line`, `question` and `answer`, to find it by. Losses are in nats. A row whose answer
            does not fit the model has None throughout.
        facts: what they were computed with: `ess` (λ), `train_size` (N), `tau`, `base_model`, `mean_sha256`.
    """

    rows: list[dict[str, Any]]
    facts: dict[str, Any]


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
    """Return how much each row of `data` made the mean of a posterior what it is; one backward pass over the rows.

    The loss is that of training: the tokens of the assistant's turns, or a classifier's label.

    Args:
        adapter: a folder or Hub id, with σ.
        data: a JSONL file of chats, as the adapter was trained on.
        on: another one, for the effect on the loss there; one more pass, over it.
        limit: use the first so many examples of each file.
        loading: how the base model is found and held in memory.
        batch_size: examples in a batch, or None to choose; fewer when the memory runs out.
        reporter: hears of progress.

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
    from ..models.gradients import adapter_parameters

    model = session.model
    items = session.encode_for_training(examples + others)
    parameters = adapter_parameters(model)
    variance = {}
    for name in parameters:
        sigma = posterior.sigma[name]
        if sigma.any():  # else it was not trained
            variance[name] = sigma.to(model.device).square()
    scored = [item for item in items[: len(examples)] if item.positions]
    if len(scored) < len(examples):
        left = f"{len(examples) - len(scored)} of {len(examples)} rows have no answer that fits the model"
        if not scored:
            raise IVONError(f"{param_ref('data')} {data}: {left}; give shorter conversations")
        reporter.notify(f"{left} and are left out")
    work = _Work(session, {name: parameters[name] for name in variance}, batch_size, reporter)
    direction = None
    if on is not None:
        told = [item for item in items[len(examples) :] if item.positions]
        if not told:
            raise IVONError(f"{param_ref('on')} {on}: no row has an answer that fits the model; give shorter ones")
        direction = work.mean_gradient(told, reporter.begin(f"gradient on {Path(on).name}", len(told)))
    tokens = sum(len(item.positions) for item in scored) / len(scored)
    found = work.scores(scored, variance, direction, ess / size / tokens, reporter.begin("influence", len(scored)))
    rows = []
    for index, (example, item) in enumerate(zip(examples, items, strict=False)):
        values = found.get(id(item), dict.fromkeys(SCORES))
        row = {"index": index, **{name: _finite(values.get(name)) for name in SCORES}}
        rows.append({**row, "line": line_of(example), **_texts(example)})
    facts = {
        "ess": ess / posterior.tau,
        "train_size": size,
        "tau": posterior.tau,
        "base_model": session.base_model,
        "mean_sha256": posterior.metadata.get("mean_sha256"),
    }
    return Influences(rows, facts)


def line_of(example: Example) -> int:
    """Return the number of an example's line in its file, from 1."""
    return int(example.source.rsplit(":", 1)[1])


def _texts(example: Example) -> dict[str, str]:
    return {"question": example.messages[-1]["content"], "answer": example.answer}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _weights(
    posterior: Posterior, adapter: str | Path, rows: int, every: bool, reporter: Reporter
) -> tuple[float, int]:
    """Return λ·τ, what the data weigh in the posterior as it is, and N."""
    try:
        ess = float(posterior.metadata["ess"])
    except (KeyError, ValueError):
        ess = math.nan
    if not (math.isfinite(ess) and ess > 0):
        raise IVONError(
            f"{adapter}: {SIGMA_FILE} has no effective sample size (ess), by which an example weighs; train with IVON, "
            "or fit with method ivon or fisher"
        )
    try:
        size = int(posterior.metadata["train_size"])
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        reporter.notify(f"the adapter does not say how many examples it was trained on: taken to be these {rows}")
        return ess * posterior.tau, rows
    if every and size != rows:
        reporter.notify(
            f"the adapter was trained on {size} examples, and these are {rows}: give the data of its training"
        )
    return ess * posterior.tau, size


class _Work:
    """The passes over a loaded model, of fewer examples at once when the memory runs out."""

    def __init__(
        self,
        session: Session,
        parameters: Mapping[str, Any],
        batch_size: int | None,
        reporter: Reporter,
    ) -> None:
        from ..models.batching import Halving
        from ..models.gradients import exact_negative_log_likelihood, example_losses

        self._session, self._parameters, self._size, self._reporter = session, parameters, batch_size, reporter
        self._losses = functools.partial(example_losses, session.model, loss=exact_negative_log_likelihood)
        self._halving = Halving(reporter=reporter)

    def mean_gradient(self, items: Sequence[EncodedExample], done: Callable[[int], None]) -> dict[str, Tensor]:
        """Return the gradient of the loss on `items`, the mean over all their tokens, by parameter."""
        import torch

        from ..models.gradients import ExampleGradients

        count = sum(len(item.positions) for item in items)
        total: dict[str, Tensor] = {}

        def losses(
            parts: Sequence[Sequence[EncodedExample]],
        ) -> Tensor:  # a batch is one example here, of which autograd sums
            return torch.stack([self._losses(part).sum() / count for part in parts])

        with ExampleGradients(self._session.model, self._parameters, losses) as gradients:

            def run(part: Sequence[EncodedExample]) -> dict[str, Tensor]:
                found: dict[str, Tensor] = {}
                gradients([part], lambda name, first, some: found.__setitem__(name, some[0].clone()))
                return found

            for part, found in self._in_parts(items, run):
                for name, value in found.items():
                    total[name] = total[name] + value if name in total else value
                done(len(part))
        return total

    def scores(
        self,
        items: Sequence[EncodedExample],
        variance: Mapping[str, Tensor],
        direction: Mapping[str, Tensor] | None,
        weight: float,
        done: Callable[[int], None],
    ) -> dict[int, dict[str, float | None]]:
        """Return the scores by the `id` of every item; `weight` is that of a token's loss in the objective."""
        from ..models.gradients import ExampleGradients

        scores: dict[int, dict[str, float | None]] = {}
        with ExampleGradients(self._session.model, self._parameters, self._losses, self._reporter) as gradients:
            run = functools.partial(products, gradients, variance=variance, direction=direction)
            for part, found in self._in_parts(items, run):
                leverage = log_odds_variance(found.losses, found.own).tolist()
                along = [None] * len(part) if found.along is None else (weight * found.along).tolist()
                pairs = zip(part, found.losses.tolist(), found.own.tolist(), leverage, along, strict=True)
                for item, loss, own, spread, towards in pairs:
                    tokens = len(item.positions)
                    scores[id(item)] = {
                        "loss": loss / tokens,
                        "leverage": spread,
                        "sensitivity": weight * own / tokens,
                        "on": towards,
                    }
                done(len(part))
        return scores

    def _in_parts(
        self, items: Sequence[EncodedExample], run: Callable[[Sequence[EncodedExample]], _T]
    ) -> Iterator[tuple[Sequence[EncodedExample], _T]]:
        from ..models.batching import Batches

        session = self._session
        for batch in Batches(items, self._size, session.device.type, session.classes).once():
            yield from self._halving.over(batch, run)


# ---------------------------------------------------------------------- files


def suspicious(rows: Sequence[Mapping[str, Any]], by: str) -> list[int]:
    """Return the numbers of the rows that have a score, the most suspicious first: `on` upwards, others downwards."""
    sign = 1 if by == "on" else -1
    return sorted((i for i, row in enumerate(rows) if row[by] is not None), key=lambda i: sign * rows[i][by])


def check_by(by: str, with_on: bool) -> None:
    """Raise IVONError if rows cannot be ranked by this."""
    if by == "on" and not with_on:
        raise IVONError(f"{param_ref('by')} on: it is the effect on other data; name them with {param_ref('on')}")


def check_keep(keep: float) -> None:
    """Raise IVONError unless it is a share of the rows."""
    if not 0 < keep < 1:
        raise IVONError(f"{param_ref('keep')} {keep:g} is outside (0, 1); 0.9 leaves the most suspicious tenth out")


def save(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a JSONL file, whole or not at all.

    Raises:
        IVONError: the file cannot be written.
    """
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: str | Path, name: str) -> list[dict[str, Any]]:
    """Read what `save` has written; `name` is the parameter that gave the path.

    Raises:
        IVONError: the file cannot be read, or is no such file.
    """
    rows: list[dict[str, Any]] = []
    for source, row in read_lines(path, name):
        numbers = [row.get(score, "") for score in SCORES]
        fine = all(x is None or (type(x) in (int, float) and math.isfinite(x)) for x in numbers)
        if not fine or row.get("index") != len(rows):
            raise IVONError(f"{source}: it is no line of what `ivon-post influence` writes; write the file anew")
        rows.append({**row, "line": row.get("line", len(rows) + 1)})
    return rows


def check_same(rows: Sequence[Mapping[str, Any]], scores: str | Path, data: str | Path) -> None:
    """Raise IVONError unless `rows`, read from `scores`, are of the data."""
    examples = read_examples(data)
    differs = f"{len(rows)} rows, not {len(examples)}" if len(rows) != len(examples) else ""
    for row, example in zip(rows, examples, strict=False):
        texts = _texts(example).items()
        other = next((name for name, text in texts if row.get(name, text) != text), None)
        if other and not differs:
            differs = f"row {row['index']} has another {other}"
    if differs:
        raise IVONError(
            f"{param_ref('scores')} {scores}: {differs}, so they are of other data than {param_ref('data')} {data}; "
            f"compute them anew, without {param_ref('scores')}"
        )


def flagged(rows: Sequence[Mapping[str, Any]], by: str, keep: float) -> list[int]:
    """Return the numbers of the most suspicious rows, so many that the share `keep` is left (at least one row)."""
    return suspicious(rows, by)[: len(rows) - max(1, round(keep * len(rows)))]


def save_without(path: Path, data: str | Path, lines: Collection[int]) -> None:
    """Write the file `data` without these lines (numbers from 1), the others byte for byte, whole or not at all.

    Raises:
        IVONError: the file cannot be written.
    """
    with (
        open(data, encoding="utf-8", newline="") as source,
        new_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        file.writelines(line for number, line in enumerate(source, start=1) if number not in lines)
