"""A posterior for an adapter that has only a mean: settings, data and adapter to a `FitProblem`, and a method for it.

Importing this module imports no torch: a wrong input is refused at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..data.chats import choose_task, read_files
from ..data.encode import EncodedExample
from ..errors import IVONError, param_ref
from ..models.session import Loading, Session, has_head
from ..posterior.adapter import RUN_IDS, Adapter
from ..posterior.card import CARD_FILE, update_card
from ..posterior.posterior import Posterior
from ..posterior.tensors import fingerprint
from ..reporter import SILENT, Reporter
from ..storage.format import SIGMA_FILE
from .problem import FitProblem, HeldOut, Settings


def fit(
    adapter: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    refit: bool = False,
    loading: Loading = Loading(),
    state: Path | None = None,
    reporter: Reporter = SILENT,
    **settings: Any,
) -> Posterior:
    """Return the posterior of an adapter around its own mean, which stays as it is, byte for byte.

    σ² = 1/(λ·(h + δ)) as in training, with δ of the prior and h by the method. The header says `fit_method` and the
    data of the fit.

    Args:
        adapter: a folder or Hub id.
        data: JSONL files of chats, as the adapter was trained on. The answers count: all assistant turns, or the label
            of a classifier.
        refit: replace the σ that an adapter has.
        loading: how the base model is found and held in memory.
        state: a file from which an interrupted fit continues; `save` removes it.
        reporter: is told of progress.
        settings: the fields of `Settings`: `method`, `seed`, `validation`, `limit`, …

    Raises:
        IVONError: a setting is out of range, the adapter has σ already (and not `refit`) or does not fit the data or
            the base model, there are no data, or the memory is too small.
    """
    chosen = Settings(**settings)
    training = read_files([data] if isinstance(data, (str, Path)) else data, chosen.limit, "data")
    held_out = training if chosen.method == "tfb" else {}
    if chosen.validation:
        held_out = read_files([chosen.validation], chosen.limit, "validation")
    judged_examples = list(chain.from_iterable(held_out.values()))
    mean = _open(adapter, refit)
    task, choices = "generate", tuple[str, ...]()
    if held_out:
        task, choices = choose_task(
            judged_examples, has_head(mean), chosen.task, chosen.choices, _of_training(mean.metadata), reporter
        )
    session = Session.open(mean, loading, reporter)
    from ..models.gradients import adapter_parameters, make_differentiable
    from ..training.beginning import data_header
    from .state import State

    make_differentiable(session.model)
    judged = HeldOut(list(held_out), task, session.encode(judged_examples, task, choices)) if held_out else None
    encoded = session.encode_for_training(list(chain.from_iterable(training.values())))
    items = session.with_answers(encoded, param_ref("data"), reporter)
    header = {
        "fit_method": chosen.method,
        "fit_data": ", ".join(Path(path).name for path in training),
        "fit_data_sha256": hashlib.sha256(b"".join(Path(path).read_bytes() for path in training)).hexdigest(),
        "fit_seed": str(chosen.seed),
        "train_size": str(len(items)),
        "mean_sha256": fingerprint(mean.mean, mean.digests()),
    }
    data_of_mean = header["mean_sha256"] + header["fit_data_sha256"]  # whatever the method
    header[RUN_IDS] = hashlib.sha256(data_of_mean.encode()).hexdigest()[:16]
    header |= _of_training(mean.metadata)
    if not session.classify and not header.keys() & {*_OF_TRAINING}:
        found = data_header(session.tokenizer, lambda most: (item.row for item in items[:most]))
        if chosen.limit is not None and any(len(own) >= chosen.limit for own in training.values()):
            found.pop("choices", None)  # the rest of the data may have more
        header |= {**found, _FOUND: " ".join(found)}
    kept = State(state, _key(header["mean_sha256"], chosen, session, items, judged))
    parameters = adapter_parameters(session.model)
    problem = FitProblem(mean, session, parameters, chosen, items, judged, kept, header, reporter)
    method = import_module(f".{chosen.method}", __package__)
    return problem.posterior(method.fit(problem))


# What training has written about its data, by which the mean is asked; a σ that is fitted anew changes none of it.
_OF_TRAINING = ("generation_prompt", "system_prompt", "choices", "chat_template_kwargs")
# In the header of a fit: which of these it has found in data of its own, so that the next fit looks into its data anew.
_FOUND = "fit_found"


def _of_training(header: Mapping[str, str]) -> dict[str, str]:
    """Return what training has written about its data; not what an earlier fit has found (all, before `_FOUND`)."""
    found = header.get(_FOUND, " ".join(_OF_TRAINING) if "fit_method" in header else "").split()
    kept = {name: header[name] for name in _OF_TRAINING if name in header and name not in found}
    return {**kept, _FOUND: ""} if kept else {}


def _open(adapter: str | Path, refit: bool) -> Adapter:
    """Open an adapter; refuse one that has a σ, unless it is to be replaced."""
    opened = Adapter(adapter)
    if opened.sigma is not None and not refit:
        method = opened.metadata.get("fit_method")
        origin = f"fitted by {method}" if method else "trained"
        raise IVONError(
            f"{adapter} has a σ already, {origin}, in {SIGMA_FILE}; replace it in the copy that is written with "
            f"{param_ref('refit')}"
        )
    return opened


def _key(
    mean: str, settings: Settings, session: Session, items: Sequence[EncodedExample], held_out: HeldOut | None
) -> str:
    """Return what identifies a fit, so that the state of another is not taken."""
    reading = ("limit", "task", "choices")  # is in the examples
    identity = {
        "mean": mean,
        "settings": {name: value for name, value in asdict(settings).items() if name not in reading},
        "items": _digest(items),
        "held_out": _digest(held_out.items if held_out else []),
        "model": session.base_model,
        "dtype": str(next(session.model.get_base_model().parameters()).dtype),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _digest(items: Sequence[EncodedExample]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.ids, item.positions, item.targets, item.candidates)).encode())
    return digest.hexdigest()


def save(
    posterior: Posterior, folder: Path, overwrite: bool = False, reporter: Reporter = SILENT, state: Path | None = None
) -> None:
    """Write a fitted posterior, whole or not at all, update its model card, and remove the `state` of its fit.

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
