"""The posterior over an adapter's weights, q = N(mean, diag(σ²)): reading, writing, changing."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import IVONError, param_ref, printable
from ..noise import normals
from ..reporter import SILENT, Reporter
from ..storage.atomic import check_space, new_folder
from ..storage.dtypes import NUMPY
from ..storage.format import CONFIG_FILE, MEAN_FILE, SIGMA_FILE, copy_companions, moved_config, write_json
from .adapter import (
    SIGMA_SHA256,
    TRAINING_TAU,
    UNPRUNED,
    Adapter,
    check_sigma,
    modules,
    posterior_number,
    write_sigma,
)
from .card import keep_true
from .chain import links, shared
from .combine import check_data, combine, shares
from .prune import Pruning, pruning_masks
from .tensors import Tensors, fingerprint, head_size, write_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Posterior:
    """q = N(mean, diag(σ²)) over the weights of one PEFT adapter.

    Attributes:
        mean: the adapter's tensors under PEFT's own names, in their own dtypes.
        sigma: the standard deviations, float32, same names and shapes; 0 where a weight was pruned or not trained.
        metadata: the header of ivon_sigma.safetensors, all strings.
        config: adapter_config.json.
        folder: where it was read from, or None; the card and the tokenizer there go along when it is saved.
        inputs: every folder that it was made from; none is ever overwritten.
        mean_metadata: the header of adapter_model.safetensors.
        aliases: name -> first name of tensors that were saved twice because the model shares them.

    `mean` and `sigma` read or compute a tensor each time it is asked for, so an adapter of any size needs the memory of
    a few; `dict(q.mean)` holds them all. Nothing modifies a posterior, neither a change to what it was made from nor to
    a tensor that it gave: `prune`, `temper` and `dataclasses.replace` return new ones. `metadata` and `config` are
    plain dicts, for JSON; give `replace` others rather than writing to them. A posterior can be copied and pickled.
    """

    mean: Tensors
    sigma: Tensors
    metadata: dict[str, str]
    config: dict[str, Any]
    folder: Path | None
    inputs: tuple[Path, ...]
    mean_metadata: Mapping[str, str]
    aliases: Mapping[str, str]
    # Known of these tensors, so not computed again; `replace` forgets them unless they are given anew.
    known_fingerprint: InitVar[str | None] = None
    known_sigma: InitVar[str | None] = None
    known_pruned: InitVar[Mapping[str, int] | None] = None
    _fingerprint: str | None = field(init=False)
    _sigma_fingerprint: str | None = field(init=False)
    _pruned: Mapping[str, int] = field(init=False)

    def __init__(
        self,
        mean: Mapping[str, torch.Tensor],
        sigma: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        config: Mapping[str, Any],
        *,
        folder: Path | None = None,
        inputs: Iterable[Path] | None = None,
        mean_metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
        aliases: Mapping[str, str] = MappingProxyType({}),
        known_fingerprint: str | None = None,
        known_sigma: str | None = None,
        known_pruned: Mapping[str, int] | None = None,
    ) -> None:
        """`inputs` are [`folder`] by default."""
        vars(self).update(
            mean=Tensors.of(mean, copied=True),
            sigma=Tensors.of(sigma, copied=True),
            metadata=dict(metadata),
            config=dict(config),
            folder=folder,
            inputs=tuple(inputs) if inputs is not None else (folder,) if folder else (),
            mean_metadata=dict(mean_metadata),
            aliases=dict(aliases),
            _fingerprint=known_fingerprint,
            _sigma_fingerprint=known_sigma,
            _pruned=dict(known_pruned or {}),
        )

    def __repr__(self) -> str:
        parts = [f"{self.mean.weights:,} weights of {len(modules(self.mean))} modules"]
        for name, value in (("r", self.config.get("r")), ("λ", self.metadata.get("ess"))):
            with contextlib.suppress(TypeError, ValueError):
                parts.append(f"{name} {float(value):g}")  # type: ignore[arg-type]  # from a file: anything
        parts += [f"τ {self.tau:g}", f"{self.pruned_ratio:.3g} pruned"]
        return printable(f"<Posterior {self.folder or 'in memory'}: {', '.join(parts)}>")

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike[str], reporter: Reporter = SILENT) -> Posterior:
        """Read an adapter folder, or a Hugging Face Hub id, with its ivon_sigma.safetensors.

        Raises:
            IVONError: there is no such adapter, it has no σ, its files do not belong together, or they hold
                values that no posterior has (the message says which).
        """
        adapter = Adapter(path_or_hub_id)
        if adapter.sigma is None:
            raise IVONError(
                f"{path_or_hub_id} has no {SIGMA_FILE}, so it is no posterior: `ivon-post info`, `merge`, `predict`, "
                "`ivon-post eval --rows base,mean` and `ivon-post generate --mean` take it; `ivon-post fit` gives it "
                "one, as training with `optimizer: ivon_lora` does"
            )
        digests = adapter.check_pair(reporter)
        check_sigma(adapter.folder / SIGMA_FILE, adapter.sigma, reporter)
        return cls(
            adapter.mean,
            adapter.sigma,
            adapter.metadata,
            adapter.config,
            folder=adapter.folder,
            mean_metadata=adapter.mean_metadata,
            aliases=_find_aliases(adapter.mean, adapter.sigma, digests),
            known_fingerprint=adapter.metadata["mean_sha256"],
            known_sigma=adapter.metadata.get(SIGMA_SHA256),
        )

    @property
    def tau(self) -> float:
        """The temperature of the posterior: σ was divided by its root."""
        return posterior_number(self.metadata, "tau")

    @property
    def training_tau(self) -> float:
        """The factor of `tau` that training chose to narrow its draws; it says nothing about the data."""
        return posterior_number(self.metadata, TRAINING_TAU)

    @property
    def pruned_ratio(self) -> float:
        """The largest ratio that was pruned so far."""
        return posterior_number(self.metadata, "pruned_ratio")

    def pruned(self) -> dict[str, int]:
        """Return, per tensor, how many weights are pruned: mean and σ are 0, in a tensor that was trained."""

        def count(key: str) -> int:
            if key in self._pruned:
                return self._pruned[key]
            mean, sigma = self.mean.float32(key), self.sigma.raw(key)
            if not sigma.any() and mean.any():
                return 0
            return int(np.count_nonzero((sigma == 0) & (mean == 0)))

        return self.mean.each(count)

    def prune(
        self, ratio: float, criterion: str = "snr", scope: str = "adapter", seed: int = 0, reporter: Reporter = SILENT
    ) -> Posterior:
        """Return the posterior with mean and σ of the `ratio` least important weights set to 0; itself at ratio 0.

        `criterion` is "snr" (|m|/σ, smallest first; arXiv 2506.14280), "sigma" (largest σ first), "magnitude",
        "random" (drawn with `seed`), or one that an extension adds. `scope` is "adapter" (ranked over all
        tensors) or "tensor" (the same share of each). Afterwards round(ratio·weights) weights are 0, or as many as were
        pruned before if that is more; ties are broken by name and place. Tensors that were saved but not trained (σ is
        0 everywhere, the mean is not) are neither pruned nor counted. Two copies of a tensor, saved because the model
        shares it, are pruned alike.

        Raises:
            IVONError: a ratio outside [0, 1], an unknown criterion or scope, or σ that is 0 everywhere.
        """
        pruning = Pruning(ratio, criterion, scope, seed)
        if not ratio:
            return self
        masks = pruning_masks(self.mean, self.sigma, pruning, self.aliases, reporter)

        def zero(key: str, raw: np.ndarray) -> np.ndarray:
            if key not in masks:
                return raw
            # Whatever the dtype, a product of its bits with 0 or 1: many times faster than assigning to a mask.
            bits = raw.reshape(-1).view(f"u{raw.itemsize}")
            return np.multiply(bits, np.unpackbits(~masks[key][0], count=raw.size)).view(raw.dtype).reshape(raw.shape)

        # Pruning changes the fingerprint. Documents of this posterior apply to the pruned one, which keeps the first.
        origin = {UNPRUNED: self._fingerprint} if masks and self._fingerprint else {}
        return replace(
            self,
            mean=self.mean.map(zero) if masks else self.mean,
            sigma=self.sigma.map(zero),
            metadata={**origin, **self.metadata, "pruned_ratio": repr(max(float(ratio), self.pruned_ratio))},
            known_fingerprint=None if masks else self._fingerprint,
            known_sigma=self._sigma_fingerprint,
            known_pruned={key: zeros for key, (_, zeros) in masks.items()},
        )

    def temper(self, tau: float) -> Posterior:
        """Return the posterior at temperature τ (arXiv 2506.14280): λ·τ for λ, so σ/√τ; inf gives the mean.

        Repeated temperatures multiply.

        Raises:
            IVONError: τ is not > 0.
        """
        check_tau(tau)

        def cool(key: str, raw: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                cooled = raw / math.sqrt(tau)
            if tau < 1 and raw.size and not np.isfinite(cooled.max()):
                raise IVONError(f"{param_ref('tau')} {tau} makes σ of {key} infinite; choose a larger one")
            return cooled

        return replace(
            self,
            sigma=self.sigma if tau == 1 else self.sigma.map(cool),
            metadata={**self.metadata, "tau": repr(float(tau) * self.tau)},
            known_fingerprint=self._fingerprint,
            known_sigma=self._sigma_fingerprint,
        )

    def _at_training_tau(self, tau: float) -> Posterior:
        """Return the posterior as it would be if its training had chosen this temperature."""
        header = {"tau": repr(self.tau / self.training_tau * tau), TRAINING_TAU: repr(tau)}
        tempered = self.temper(tau / self.training_tau)
        return replace(tempered, metadata={**tempered.metadata, **header}, known_fingerprint=self._fingerprint)

    def draw(self, seed: int = 0, member: int = 0, dtype: str | None = None) -> Tensors:
        """Return one draw θ ~ q, as `sample` does, whose tensors are made when they are asked for.

        `dtype` ("F32", "BF16", "F16") replaces the mean's.
        """
        specs = {
            key: (dtype if dtype and self.mean.is_float(key) else own, shape)
            for key, (own, shape) in self.mean.specs.items()
        }

        def at(key: str) -> np.ndarray:
            if not self.mean.is_float(key):
                return self.mean.raw(key)
            theta = normals(self.mean.size(key), "draw", seed, member, self.aliases.get(key, key))
            theta = theta.reshape(self.mean.specs[key][1])
            theta *= self.sigma.raw(key)
            if self.mean.specs[key][0] == "F64":
                theta = theta + self.mean.raw(key)
            else:
                theta += self.mean.float32(key)
            return theta.astype(NUMPY[specs[key][0]], copy=False)

        return Tensors(specs, at)

    def sample(self, seed: int = 0, member: int = 0) -> dict[str, torch.Tensor]:
        """Return one draw θ ~ q: mean + σ·ε, rounded to the mean's dtype, under PEFT's names.

        The sum is taken in float32, for a float64 mean in float64. ε ~ N(0, I) depends only on `seed`, `member` and
        the tensor's name: it is the same on every machine, in every thread, and for every τ and pruning ratio. Where
        σ is 0 the draw is the mean. Tensors that were saved twice because the model shares them get one draw.
        """
        return dict(self.draw(seed, member))

    def save_pretrained(
        self, folder: str | os.PathLike[str], overwrite: bool = False, reporter: Reporter = SILENT
    ) -> None:
        """Write a complete PEFT adapter with its σ: `folder` appears whole, or not at all.

        Raises:
            IVONError: the folder exists (and not `overwrite`), holds the input, or cannot be written.
        """
        check_space(Path(folder), self.mean.bytes + self.sigma.bytes, "mean and σ")
        with new_folder(Path(folder), overwrite, self.inputs) as new:
            if self.folder:
                copy_companions(self.folder, new)
            write_json(new / CONFIG_FILE, moved_config(self.config, self.folder, Path(folder)))
            known = self._fingerprint
            digests = write_tensors(new / MEAN_FILE, self.mean, self.mean_metadata, reporter, hashed=not known)
            known = known or fingerprint(self.mean, digests)
            write_sigma(new / SIGMA_FILE, self.sigma, self.metadata, known, reporter, self._sigma_fingerprint)
            header = {**self.metadata, "mean_sha256": known}
            with contextlib.suppress(IVONError):  # a damaged card goes along as it is
                changed = known != self.metadata.get("mean_sha256")
                keep_true(new, header, self.config, head_size(self.mean.specs), changed)

    @classmethod
    def _prior_of(cls, posteriors: Sequence[Posterior], sha256: str) -> Posterior:
        """Read the posterior of this fingerprint, which some of `posteriors` go on from, and temper it as they are."""
        children = [q for q in posteriors if any(link.sha256 == sha256 for link in links(q.metadata))]
        name = next(link.name for link in links(children[0].metadata) if link.sha256 == sha256)
        prior = None
        with contextlib.suppress(IVONError):
            prior = cls.from_pretrained(name)
        if prior is None or prior.metadata.get("mean_sha256") != sha256:
            folders = " and ".join(str(q.folder) for q in children)
            raise IVONError(
                f"{folders} continue one posterior, which is no longer at {name}; give its folder as well (what it "
                "knows still counts once)"
            )
        return prior.temper(posteriors[0].tau / prior.tau) if prior.tau != posteriors[0].tau else prior

    @classmethod
    def combine(
        cls, posteriors: Sequence[Posterior], method: str = "precision", weights: Sequence[float] | None = None
    ) -> Posterior:
        """Return one posterior made of several over the same base model; see `posterior.combine.combine`.

        A posterior that several of them go on from is read from where they had it, unless it is among them. Where their
        trainings chose different temperatures, the least of these is that of all.

        Raises:
            IVONError: as `shares` and `combine` do; two of them, as they were read from folders, hold the same data,
                which would count twice; or the posterior that several of them go on from is not where it was.
        """
        share = shares(len(posteriors), method, weights)
        check_data(posteriors)
        taus = {q.training_tau for q in posteriors}
        if len(taus) > 1 and len({q.tau / q.training_tau for q in posteriors}) == 1:
            posteriors = [q._at_training_tau(min(taus)) for q in posteriors]
        priors = [cls._prior_of(posteriors, sha256) for sha256 in shared([q.metadata for q in posteriors])]
        parts = combine(posteriors, method, share, priors if method == "precision" else ())
        inputs = [folder for q in posteriors for folder in q.inputs]
        combined = cls(*parts, folder=posteriors[0].folder, inputs=inputs)
        if any(q.pruned_ratio for q in posteriors):

            def zeros(key: str) -> int:
                mean = combined.mean.float32(key)
                return int(np.count_nonzero(mean == 0)) if mean.any() else 0

            # At τ = ∞ every σ is 0, so what was pruned shows in the mean alone.
            counts = combined.pruned() if math.isfinite(combined.tau) else combined.mean.each(zeros)
            combined.metadata["pruned_ratio"] = repr(sum(counts.values()) / max(combined.mean.weights, 1))
        return combined


def check_tau(tau: float) -> None:
    """Raise IVONError unless τ is > 0; commands ask before they read anything."""
    if not tau > 0:
        raise IVONError(f"{param_ref('tau')} {tau} is not > 0; 1 is the posterior itself, inf the mean")


def open_posterior(adapter: str | Path, mean_only: bool = False) -> Posterior:
    """Read an adapter as a posterior; without σ it has width 0, if only the mean is wanted.

    Raises:
        IVONError: the adapter cannot be read, or has no σ and more than the mean is wanted.
    """
    held = Adapter(adapter)
    if held.sigma is not None:
        return Posterior.from_pretrained(adapter)
    if not mean_only:
        raise IVONError(
            f"{adapter} has no {SIGMA_FILE}, so there are no draws and no pruning; evaluate its mean with "
            f"`ivon-post eval` and {param_ref('rows')} base,mean, or give it a σ with `ivon-post fit`"
        )
    specs = {key: ("F32", shape) for key, (_, shape) in held.mean.specs.items()}
    zeros = Tensors(specs, lambda key: np.zeros(specs[key][1], np.float32))
    return Posterior(held.mean, zeros, {}, held.config, folder=held.folder)


def _find_aliases(mean: Tensors, sigma: Tensors, digests: Mapping[str, str]) -> dict[str, str]:
    """Return name -> first name for tensors that were saved twice because the model shares them.

    PEFT writes a shared tensor once under each name. Equal bytes in mean and σ tell it apart from tensors
    that merely start equal, as B = 0 does: those are constant.
    """
    aliases: dict[str, str] = {}
    first: dict[tuple[str, object], str] = {}
    for key in sorted(mean):
        twin = first.setdefault((digests[key], mean.specs[key]), key)
        if twin == key or not mean.size(key):
            continue
        raw = mean.raw(key)
        if (raw != raw.flat[0]).any() and np.array_equal(sigma.raw(key), sigma.raw(twin)):
            aliases[key] = twin
    return aliases
