"""The values of settings that nobody gave: the paper's, or those of rules that fit them to the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import IVONError, param_ref
from .table import PAPER, SETTINGS

# A learning rate above this is an α and none for AdamW: no step of an AdamW run moves a weight of an adapter so far.
MAX_LEARNING_RATE = 0.01
# In so many passes over the data, or fewer, there is nothing to gain from noise.
FEW_PASSES = 5
# Steps that p should remember, as a share of the run, and by Adam's direction: benchmarks/fidelity/NOTES.md.
MEMORY, ADAM_MEMORY = 0.2, 1.0
# The most that a sign may move a weight where no learning rate is given.
LONGEST_SIGN = 2.5e-4
# The best learning rate of AdamW for LoRA falls with the model's width by these powers, in Thinking Machines' "LoRA
# Without Regret" and the cookbook of their Tinker; and what it is here at a width of 2000, where theirs is 5e-4.
POWERS_OF_WIDTH = {"llama": 0.781, "qwen": 0.0775}
RATE_AT_USUAL_WIDTH, USUAL_WIDTH, LEAST_WIDTH = 1.9e-4, 2000, 512
MANY_PASSES = (10.0, 20.0)  # from the first to the second the rules of few passes give way to those of many
FEW_PASSES_RATE = 2  # by how much it is higher in few
# In many an adapter on more than so many matrices, whatever its rank, learns its data by heart, by AdamW as well. Its
# rate falls by the root of their number, to this share at least.
USUAL_MATRICES, LEAST_SHARE = 12, 0.25
USUAL_PASSES = 31.0  # in more it falls by the root, as weights that follow noise get no farther then
# The highest temperature of short runs: of the noise, nothing is then left to see.
NARROWEST = 1e4
# How far weights get by Adam's direction in few passes, as a part of how far they can: where gradients are noise,
# g/√E[ĝ²] is about a fifth.
FEW_PASSES_REACH = 0.2


def effective_sample_size(n: int, gamma: float = 5000.0) -> float:
    """Return λ = γ·√N, the effective sample size of IVON-LoRA (arXiv 2506.14280, section 3).

    Args:
        n: number of training examples N.
        gamma: γ; the paper's value for commonsense reasoning is 5000.

    Raises:
        ValueError: if `n` or `gamma` is not positive.
    """
    if not n > 0:
        raise ValueError(f"n must be a positive number of training examples, got {n}")
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    return gamma * math.sqrt(n)


def usual_rate(config: Any, epochs: float, matrices: int = 0) -> float:
    """Return the learning rate of a run by Adam's direction that gives none, from the model's transformers config.

    It is 5e-4 for SmolLM2-135M, 2e-4 for Qwen2.5-0.5B, and 1.1e-4 for Llama-3.1-8B. Up to ten epochs it is twice that;
    `epochs` 0 means unknown, and does not double it. In many epochs it is lower for an adapter on many `matrices` (see
    `adapted_matrices`), and in more than 31 for any adapter. A kind of model without a known power gets the lowest of
    the known rates. Models narrower than 512 have the rate of one of 512.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    ratio = USUAL_WIDTH / max(width if isinstance(width, int) else USUAL_WIDTH, LEAST_WIDTH)
    kind = str(getattr(text, "model_type", ""))
    powers = [power for name, power in POWERS_OF_WIDTH.items() if kind.startswith(name)]
    rate = min(RATE_AT_USUAL_WIDTH * ratio**power for power in powers or POWERS_OF_WIDTH.values())
    share = min(1.0, max(LEAST_SHARE, math.sqrt(USUAL_MATRICES / max(matrices, 1))))
    many = float(np.interp(epochs, MANY_PASSES, (0, 1)))
    rate *= share**many * math.sqrt(USUAL_PASSES / max(epochs, USUAL_PASSES))
    return float(f"{rate * (FEW_PASSES_RATE ** (1 - many) if epochs else 1):.2g}")


def adapted_matrices(names: Iterable[str]) -> int:
    """Return how many matrices of a model an adapter with weights of these names is on."""
    return sum(".lora_A." in name for name in names)


def passes(steps: int, size: int, batch: float) -> float:
    """Return how often a run sees its data, whose last batch may be smaller: steps over those of an epoch."""
    return steps / max(1, math.ceil(size / batch))


class Step(NamedTuple):
    """How a run steps: the direction, and the temperature τ of its posterior."""

    direction: str
    tau: float = 1.0


class Preset(NamedTuple):
    """Settings that go together: values of the table, and rules for what follows from the run.

    Attributes:
        fixed_ess: λ where it is given outright.
        gamma: γ of λ = γ·√N. None: λ = `per_example`·max(N, few)·max(1, weights/`usual_weights`). The last factor keeps
            the loss that a draw adds, weights/(2·λ) nats, the same for large adapters of any size. In many epochs that
            is too little noise for them, so there the factor is its square root (Adam's direction only).
        per_example, usual_weights: see `gamma`.
        few: the least that N counts as: the first number in up to `few_epochs[0]` epochs, the second from
            `few_epochs[1]` epochs on; in between it falls evenly. A short run learns too slowly among wide draws, and a
            long one overfits among narrow ones.
        few_epochs: see `few`.
        h0: initial Hessian. None: chosen so that σ² starts at `noise` times the variance of PEFT's A matrices; the
            total over all matrices is at most `noise_in_all`, because their disturbances add up.
        noise, noise_in_all: see `h0`.
        clip: ξ.
        beta1, beta2: of the running averages. None: β2 remembers `memory`·steps steps; with Adam's direction, all.
        memory: see `beta2`.
        travel: the farthest a weight can move in a run, Σ α_t·ξ. Without a learning rate, IVON's own direction uses the
            rate that gives this distance, at most `LONGEST_SIGN`. A given rate is the most one step may move a weight.
            None: the given rate is α.
        prior_strength, hessian, h0_steps: as in `IVONLoRA`.
        direction: as in `IVONLoRA`; None for Adam's where it is possible: see `with_direction`.
        number_strength: κ where the prior is a number, which then is δ.
        posterior_strength: κ where the prior is a posterior. 1 is Bayes' rule, but a diagonal posterior ignores what
            weights do together and then holds the old task about a hundred times too weakly.
    """

    gamma: float | None
    h0: float | None
    clip: float
    beta1: float
    beta2: float | None
    travel: float | None
    prior_strength: float
    hessian: str
    direction: str | None
    h0_steps: float | None
    fixed_ess: float | None = None
    posterior_strength: float = 1.0
    number_strength: float = 1.0
    per_example: float = 0.0
    few: tuple[int, int] = (0, 0)
    few_epochs: tuple[float, float] = (0.0, 1.0)
    usual_weights: float = math.inf
    noise: float = 0.0
    noise_in_all: float = 0.0
    memory: float = 0.0

    def ess(self, train_size: int, weights: int, epochs: float = 0.0) -> float:
        """Return λ for N training examples, the number of LoRA weights and that of passes over the examples.

        Raises:
            ValueError: `train_size` is not positive.
        """
        if self.fixed_ess is not None:
            return self.fixed_ess
        if self.gamma is not None:
            return effective_sample_size(train_size, self.gamma)
        effective_sample_size(train_size)  # complains of a wrong N
        few = np.interp(epochs, self.few_epochs, self.few)
        power = float(np.interp(epochs, self.few_epochs, (1, 0.5))) if self.direction != "newton" else 1.0
        return self.per_example * max(train_size, float(few)) * max(1.0, weights / self.usual_weights) ** power

    def first_h0(self, ess: float, fan_ins: Sequence[int]) -> float:
        """Return h0 for LoRA matrices A with these numbers of inputs."""
        if self.h0 is not None:
            return self.h0
        # PEFT's A has variance 1/(3·inputs) at the start, and σ² is 1/(λ·h0) there.
        noise = min(self.noise_in_all, self.noise * len(fan_ins))
        return 3 * sum(fan_ins) / (ess * noise) if fan_ins else PAPER["h0"]

    def strength(self, prior: Any, earlier: bool) -> float:
        """Return κ for this prior: of an earlier posterior, of a number, or of "empirical"."""
        if earlier:
            return self.posterior_strength
        return self.prior_strength if isinstance(prior, str) else self.number_strength

    def with_direction(self, prior: Any, rescale_lr: bool = False, online: bool = False) -> Preset:
        """Return the preset with its direction filled in: Adam's by default.

        It is IVON's own if Adam's is impossible (without squared gradients or the empirical prior, or with
        `rescale_lr`), and in reinforcement learning (`online`).

        Raises:
            IVONError: Adam's was asked for, and one of these settings makes it impossible.
        """
        needed = {
            "hessian": (self.hessian, "squared_gradients"),
            "prior": (prior, "empirical"),
            "rescale_lr": (rescale_lr, False),
        }
        for name, (value, must) in needed.items():
            if isinstance(value, type(must)) and value == must:
                continue
            if self.direction is None:
                return self._replace(direction="newton")
            if self.direction == "adam":
                raise IVONError(
                    f"{param_ref('direction')}: adam goes with {param_ref(name)} {str(must).lower()} alone, not "
                    f"{value}; remove one of them"
                )
        return self._replace(direction=self.direction or ("newton" if online else "adam"))

    def second_beta(self, steps: int, direction: str = "newton") -> float:
        """Return β2 for a run of this number of steps."""
        if self.beta2 is not None:
            return self.beta2
        memory = max(self.memory, ADAM_MEMORY) if direction == "adam" else self.memory
        return 1 - min(0.1, 1 / max(1.0, memory * steps))

    def alpha(self, learning_rate: float, rescale_lr: bool = False) -> float:
        """Return α for a learning rate: itself, or with `travel` learning_rate/ξ, so that a step moves a weight by
        the learning rate at most; 0 for 0.

        Raises:
            IVONError: with `travel`, the rate is above 0.01, or a step has no bound.
        """
        if self.travel is None:
            return learning_rate
        paper = f"or set {param_ref('preset')} to paper, where learning_rate is α"
        if not math.isfinite(self.clip):
            raise IVONError(f"{param_ref('clip')}: {self.clip} bounds no step; give a number, {paper}")
        if rescale_lr and learning_rate:
            raise IVONError(
                f"{param_ref('rescale_lr')}: true leaves a step no bound that learning_rate could be; remove one of "
                f"them, {paper}"
            )
        if learning_rate > MAX_LEARNING_RATE:
            raise IVONError(
                f"{param_ref('learning_rate')}: {learning_rate:g} is too far for a step, which may move a weight by "
                f"learning_rate; give one for AdamW, such as 2e-4, {paper}"
            )
        return learning_rate / self.clip

    @property
    def has_usual_rate(self) -> bool:
        """Whether a run that gives no learning rate has `usual_rate`, once `with_direction` has chosen a direction."""
        return self.direction == "adam" and self.travel is not None

    def step(self, learning_rate: float, steps: int, epochs: float) -> Step:
        """Return how a run of this length steps.

        With Adam's direction a run learns what AdamW would at its learning rate, unless noise drowns it: a B that can
        move 0.01 from zero gives A no gradient among draws of that size. This τ makes draws as narrow, relative to how
        far weights move, as in a run of length `travel`. In up to `FEW_PASSES` epochs, where there is nothing to gain
        from noise, weights are taken to move a fifth of the distance that they can.
        """
        direction, reach = self.direction or "adam", learning_rate * steps / 2
        if direction != "adam" or not (self.travel and reach) or self.gamma is not None or self.fixed_ess is not None:
            return Step(direction)
        if epochs <= FEW_PASSES:
            reach *= FEW_PASSES_REACH
        return Step(direction, min(max(1.0, (self.travel / reach) ** 2), NARROWEST))

    def for_run(
        self,
        size: int,
        shapes: Mapping[str, Sequence[int]],
        learning_rate: float,
        steps: int,
        epochs: float,
    ) -> dict[str, Any]:
        """Return λ, h0, the betas and the fields of `step` for a run with N = `size` and weights of these shapes.

        A `learning_rate` of 0 stands for the one that `travel` gives.
        """
        weights = sum(map(math.prod, shapes.values()))
        ess = self.ess(size, weights, epochs)
        h0 = self.first_h0(ess, [shape[-1] for name, shape in shapes.items() if ".lora_A." in name])
        step = self.step(learning_rate, steps, epochs)
        return {
            "ess": ess,
            "h0": h0,
            "betas": (self.beta1, self.second_beta(steps, step.direction)),
            **step._asdict(),
        }


def _preset(name: str, **rules: Any) -> Preset:
    """Return a preset: the table's values, and `rules` for what follows from the run."""
    return Preset(**{s.name: getattr(s, name) for s in SETTINGS if s.name in Preset._fields}, **rules)


# benchmarks/fidelity/NOTES.md says where the numbers are from.
PRESETS = {
    "auto": _preset(
        "auto",
        travel=0.125,
        posterior_strength=300.0,
        per_example=1000.0,
        few=(250, 125),
        few_epochs=MANY_PASSES,
        usual_weights=1e5,
        noise=4.0,
        noise_in_all=64.0,
        memory=MEMORY,
    ),
    "paper": _preset("paper", travel=None),
}


def resolved(preset: str, given: Mapping[str, Any]) -> Preset:
    """Return a preset with the `given` values in place of its own, by their names in the table; None is not given.

    Raises:
        IVONError: there is no such preset.
    """
    if preset not in PRESETS:
        raise IVONError(f"{param_ref('preset')}: {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    strength = given.get("prior_strength")
    values = {**given, "fixed_ess": given.get("ess"), "posterior_strength": strength, "number_strength": strength}
    names = [name for name in Preset._fields if values.get(name) is not None]
    return PRESETS[preset]._replace(**{name: values[name] for name in names})
