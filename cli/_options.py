"""Options and arguments that several commands have, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from axolotl_ivon.models import DTYPES

Command = TypeVar("Command", bound=Callable[..., Any])


class Numbers(click.ParamType):
    """Numbers with commas between."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers in `value`."""
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number, or numbers with commas between", param, ctx)


class BatchSize(click.ParamType):
    """A number of prompts, or `auto`, which is None."""

    name = "auto|n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number, or None for `auto`."""
        if value == "auto":
            return None
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither auto nor a number above 0", param, ctx)
        return int(value)


adapter_argument = click.argument("adapter", metavar="ADAPTER")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
base_model_option = click.option(
    "--base-model", metavar="MODEL", help="Folder or Hub id.  [default: what the adapter's config names]"
)


def dtype_option(text: str, *more: str) -> Callable[[Command], Command]:
    """Add --dtype, with `more` values (the first is the default) before the names of dtypes."""
    kind = click.Choice([*more, *DTYPES])
    return click.option("--dtype", type=kind, default=more[0] if more else None, show_default=bool(more), help=text)


def add_all(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Add options that the help lists in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


model_options = add_all(
    base_model_option,
    click.option("--load-in", type=click.Choice(["8bit", "4bit"]), help="Quantize the base model (bitsandbytes)."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, …"),
    dtype_option("Of the base model. auto: float32 on a CPU, the checkpoint's elsewhere.", "auto"),
)


def batch_option(text: str) -> Callable[[Command], Command]:
    """Add --batch-size."""
    return click.option("--batch-size", type=BatchSize(), default="auto", show_default=True, help=text)


def output_options(default: str) -> Callable[[Command], Command]:
    """Add -o (with the name that is used without it in the help), --overwrite, --json and --quiet."""
    return add_all(
        click.option("--output", "-o", metavar="DIR", help=f"Where to write.  [default: {default}]"),
        click.option("--overwrite", is_flag=True, help="Replace the target if it is there."),
        json_option,
        quiet_option,
    )


def seed_option(text: str) -> Callable[[Command], Command]:
    """Add --seed."""
    return click.option("--seed", type=int, default=0, show_default=True, help=text)


def recommended_option(what: str) -> Callable[[Command], Command]:
    """Add --recommended."""
    return click.option(
        "--recommended", metavar="FILE", help=f"Take {what} from the recommended.json of `ivon-post sweep`."
    )


def settings(
    recommended: str | None, *, tau: float | None = None, ratio: float | None = None, default_ratio: float = 0.0
) -> tuple[float, float]:
    """Return τ and ratio: the options', else the recommendation's, else the defaults."""
    best_tau, best_ratio = 1.0, default_ratio
    if recommended:
        from axolotl_ivon.evaluation.sweep import read_recommended

        best_tau, best_ratio = read_recommended(recommended)
    return best_tau if tau is None else tau, best_ratio if ratio is None else ratio


def complete_criterion(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the pruning criteria that start with what was typed."""
    from axolotl_ivon.posterior.prune import criteria

    return [name for name in criteria() if name.startswith(incomplete)]


# What is evaluated, on what, and how.
evaluation_options = add_all(
    adapter_argument,
    click.option(
        "--data",
        "-d",
        "data",
        multiple=True,
        required=True,
        metavar="FILE",
        help="Chat JSONL as axolotl trains on, one conversation a line; may be given several times.",
    ),
    click.option(
        "--task",
        type=click.Choice(["choice", "generate", "classify"]),
        help="choice: the answer is one of a few strings, by the next token. generate: per-token likelihood "
        "of the reference answer. classify: a sequence-classification head. Default: found from the data.",
    ),
    click.option(
        "--choices",
        metavar="A,B,…",
        callback=lambda ctx, param, value: value.split(",") if value else None,
        help="The strings to choose from. Default: the answers in the data.",
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Use the first LIMIT examples of each file."),
    click.option(
        "--samples", "-n", type=click.IntRange(min=1), default=10, show_default=True, help="Draws to average."
    ),
    seed_option("Seed of the draws: those of `sample --seed`."),
    model_options,
    batch_option("Prompts in a batch; halved when the memory runs out."),
    click.option(
        "--draws-per-pass",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Draws that run in one batch over the shared base model; pays where a batch leaves the hardware idle.",
    ),
    json_option,
    quiet_option,
)


def target(adapters: Sequence[str], output: str | None, what: str, overwrite: bool) -> Path:
    """Return the folder to write, beside the first input (for a Hub id: here) unless one is named; refused early."""
    from axolotl_ivon.storage.atomic import check_target

    sources = [Path(adapter) for adapter in adapters]
    if output:
        path = Path(output)
    elif sources[0].is_dir():
        named = sources[0] if sources[0].name not in ("", "..") else sources[0].resolve()
        path = named.parent / f"{named.name}-{what}"
    else:
        path = Path(f"{sources[0].name}-{what}")
    check_target(path, overwrite, filter(Path.is_dir, sources))
    return path
