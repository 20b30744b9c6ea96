"""The table of settings: what each is called, may be, is where nobody gives it, and means.

From it follow the YAML keys (`keys.py`), what the presets take (`presets.py`), what the header of
`ivon_sigma.safetensors` keeps, and the table of docs/train.md. A test holds the parameters of `attach` and `IVONLoRA`
against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

OPTIMIZER, PLUGIN = "ivon_lora", "axolotl_ivon.IVONLoRAPlugin"


def _no_boolean(value: Any) -> Any:
    """Refuse what pydantic takes for 1 or 0."""
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_boolean)]
Average = Annotated[float, Field(ge=0, lt=1)]
# From left to right: 1e-3 is a string in YAML, and a number.
Prior = Annotated[
    Literal["empirical"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] | Annotated[str, Field(min_length=1)],
    Field(union_mode="left_to_right"),
    BeforeValidator(_no_boolean),
]


class Setting(NamedTuple):
    """A setting of a run.

    Attributes:
        name: the parameter of `attach`; beta1 and beta2 are the two of `betas`.
        type: what the value of the YAML key must be.
        paper: the value in the paper's commonsense runs (arXiv 2506.14280): that of the preset "paper" and, where
            `IVONLoRA` has the parameter, its default.
        auto: the value of the preset "auto"; None where it is unset, or follows from the run by a rule of
            `presets.Preset`.
        rule: the value of "auto" in words, where there is more to say than the value.
        header: whether the header of σ has it: "always", "unless paper" (where it is absent it is the paper's), or "".
        help: the meaning, in Markdown.
    """

    name: str
    type: Any
    paper: Any
    auto: Any
    rule: str = ""
    header: Literal["always", "unless paper", ""] = "always"
    help: str = ""

    def means(self, text: str) -> Setting:
        """Return the setting with its meaning."""
        return self._replace(help=text)

    @property
    def key(self) -> str:
        """The key of the YAML."""
        return "ivon_lambda" if self.name == "ess" else f"ivon_{self.name}"  # `lambda` is no name in Python

    @property
    def default(self) -> str:
        """The value of an unset key, in Markdown."""
        auto = self.rule or _shown(self.auto)
        return auto if self.auto == self.paper else f"{auto}; {_shown(self.paper)} by `paper`"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"`{value}`"
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


_LATER: Any = {"header": "unless paper"}
Hessian = Literal["reparameterized", "squared_gradients"]
Direction = Literal["newton", "adam"]

SETTINGS = (
    Setting("preset", Literal["auto", "paper"], "auto", "auto").means(
        "the values of unset keys. `auto` fits them to N, the number of steps and the LoRA weights, and takes "
        "`learning_rate` as the most that a step may move a weight; `paper`: the paper's for commonsense, and "
        "`learning_rate` is α"
    ),
    Setting("gamma", Positive, 5000.0, None).means(
        "γ of the effective sample size λ = γ·√N, N being the number of training examples. Smaller: a wider "
        "posterior, better calibrated on little data; larger: closer to the mean"
    ),
    Setting("ess", Positive, None, None, "1000·N or more; γ·√N by `paper`").means(
        "the effective sample size λ itself, instead of `ivon_gamma`; needed for streamed data"
    ),
    Setting("h0", Positive, 5e-2, None, "by λ").means("the initial Hessian; smaller means wider draws at the start"),
    Setting("clip", Positive, 5e-3, 1e-2).means(
        "ξ, the bound on the preconditioned gradient of each weight: a step moves it by at most α·ξ"
    ),
    Setting("beta1", Average, 0.9, 0.9).means("β1, the running average of the gradient"),
    Setting("beta2", Average, 0.9995, None, "by the number of steps").means(
        "β2, the running average of the posterior precision: `auto` remembers the whole run, and a "
        "fifth of it by `ivon_direction: newton`"
    ),
    Setting("prior", Prior, "empirical", "empirical").means(
        "the prior: `empirical` fits the variance of each tensor; a number δ is IVON's fixed prior, which acts as "
        "weight decay; a folder or Hub id of an earlier adapter with σ: training continues it and does not forget"
    ),
    Setting(
        "prior_strength", Positive, 1.0, 0.1, "0.1, with a number as prior 1, with an earlier adapter 300", **_LATER
    ).means(
        "κ, a factor on the prior's precision. At 0.1 the prior is √10 as wide as the one that fits the tensor best, "
        "and σ shows more of the data. The smaller κ, the faster an earlier adapter is forgotten"
    ),
    Setting("hessian", Hessian, "reparameterized", "squared_gradients", **_LATER).means(
        "the estimate ĥ of the Hessian: `squared_gradients` is B·ĝ² for a step of B losses (tokens of a language "
        "model), `reparameterized` IVON's ĝ·(θ−m)/σ²"
    ),
    Setting(
        "direction",
        Direction,
        "newton",
        None,
        "`adam`; `newton` with `rl: grpo`, `ivon_rescale_lr`, or where `adam` lacks what it needs",
        **_LATER,
    ).means(
        "the step. `adam`: Adam's g/√E[ĝ²], as long as AdamW's at the same `learning_rate`, with narrower draws in "
        "short runs; it needs `ivon_hessian: squared_gradients` and `ivon_prior: empirical`. `newton`: IVON's g/p, by "
        "`auto` nearly everywhere at its bound, and so a sign"
    ),
    Setting("h0_steps", Positive, None, 10.0, **_LATER).means(
        "the number of steps that `ivon_h0` counts as; unset, it fades as β2^t"
    ),
    Setting("rescale_lr", bool, False, False, **_LATER).means(
        "whether the learning rate of a tensor is (h0 + δ)·α, the optional line of IVON's Algorithm 1: "
        "α is then 1/`ivon_h0` times as large. With `auto` only where no `learning_rate` is set"
    ),
    Setting("eval_samples", Annotated[int, Field(ge=0)], 0, 0, header="").means(
        "the number of draws whose averaged prediction every evaluation scores too: `eval_loss_posterior` beside "
        "`eval_loss`, which is the mean's"
    ),
    Setting("calibrate", bool, True, True, header="").means(
        "whether the end of training finds out on the evaluation data what to predict with, and writes "
        "`recommended.json` beside the adapter"
    ),
    Setting("draws", Literal["shared", "per_rank"], "shared", "shared", header="").means(
        "`shared`: one draw for all processes, so that a run does not depend on their number; `per_rank`: one for "
        "each, with ĝ and ĥ averaged, for less variance"
    ),
    Setting("rollouts", Literal["mean", "draws"], "mean", "mean", header="").means(
        "what writes the completions of `rl: grpo`: `mean`, or `draws`: each group of completions is from "
        "several draws, and each completion's gradient is taken at the draw that wrote it"
    ),
    Setting("rollout_draws", Annotated[int, Field(ge=1)], None, None, "2 with `ivon_rollouts: draws`", header="").means(
        "the number of draws that write a group of completions: a divisor of `num_generations` and of "
        "`gradient_accumulation_steps`"
    ),
)
PAPER = {setting.name: setting.paper for setting in SETTINGS}
# What did not exist when format 1 of the header, and the optimizer's state, were fixed.
ADDED_LATER = {setting.name: setting.paper for setting in SETTINGS if setting.header == "unless paper"}


def settings_header(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries of the header of σ for the values of all settings, by their names."""
    kept = [s.name for s in SETTINGS if s.header == "always"]
    kept += [name for name, usual in ADDED_LATER.items() if values.get(name, usual) != usual]
    return {name: "true" if values[name] is True else str(values[name]) for name in kept}
