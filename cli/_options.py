"""Options and arguments that several commands have, and what becomes of them."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from axolotl_ivon.models import DTYPES

from ._progress import Progress
from ._stdout import only_results, results
from ._tables import emit

if TYPE_CHECKING:
    from axolotl_ivon.decisions.sweep import Decision
    from axolotl_ivon.models.session import Loading

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


class Renamed(click.Option):
    """An option that is still known by its former names, which no help shows."""

    def __init__(self, *args: Any, formerly: Sequence[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._formerly = formerly

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser know all names."""
        shown = self.opts
        self.opts = [*shown, *self._formerly]
        super().add_to_parser(parser, ctx)
        self.opts = shown


@dataclass(frozen=True)
class Terminal:
    """How a command reports to its user, as --json and --quiet say."""

    as_json: bool
    quiet: bool

    def progress(self) -> Progress:
        """Return the progress on stderr, a context manager."""
        return Progress(self.quiet)

    def reserved(self) -> AbstractContextManager[None]:
        """Return the context that a command runs in: with --json nothing but the document gets to stdout."""
        return only_results() if self.as_json else contextlib.nullcontext()

    def finish(self, document: dict[str, Any], *lines: object, then: Sequence[object] = ()) -> None:
        """Print the result: as JSON if that was asked for, else as lines; and suggest what to do `then`."""
        if self.as_json:
            emit(document)
            return
        for line in lines:
            click.echo(line, file=results())
        self.suggest(*then)

    def suggest(self, *words: object) -> None:
        """Tell the next command to type, on stderr; a program that reads the result hears nothing of it."""
        from axolotl_ivon.errors import printable

        if words and not (self.as_json or self.quiet):
            click.echo(f"next: {printable(shlex.join(map(str, words)))}", err=True)


@dataclass(frozen=True)
class OutputOptions(Terminal):
    """Where a command writes, as -o and --overwrite say, and how it reports."""

    output: str | None
    overwrite: bool

    def target(self, adapters: Sequence[str], what: str) -> Path:
        """Return the folder to write, beside the first input (for a Hub id: here) unless one is named.

        Raises:
            IVONError: it may not be written; the user hears of it before the work.
        """
        from axolotl_ivon.storage.atomic import check_target

        path = self.path(adapters[0], what)
        check_target(path, self.overwrite, filter(Path.is_dir, map(Path, adapters)))
        return path

    def path(self, adapter: str, what: str) -> Path:
        """Return what the user named, else a path beside `adapter` (for a Hub id: here).

        Raises:
            IVONError: that is no name, or lies in the adapter, which is never modified.
        """
        from axolotl_ivon.errors import IVONError
        from axolotl_ivon.storage.atomic import check_outside

        if self.output in ("", "-"):
            raise IVONError(f"--output {self.output!r}: what is written has a name; stdout is for results, see --json")
        if self.output:
            check_outside(Path(self.output), filter(Path.is_dir, [Path(adapter)]))
            return Path(self.output)
        source = Path(adapter)
        if not source.is_dir():
            return Path(f"{source.name}-{what}")
        named = source if source.name not in ("", "..") else source.resolve()
        return named.parent / f"{named.name}-{what}"


@dataclass(frozen=True)
class PosteriorOptions:
    """Temperature and pruning ratio, as far as the user gave them, and a file that recommends both."""

    recommended: str | None
    tau: float | None = None
    ratio: float | None = None

    def settings(self, adapter: str, default_ratio: float = 0.0) -> tuple[float, float]:
        """Return τ and ratio for `adapter`: the options', else the recommendation's, else the defaults.

        Raises:
            IVONError: one is out of range, or the recommendation cannot be read or is for another adapter.
        """
        from axolotl_ivon.posterior.adapter import Adapter
        from axolotl_ivon.posterior.posterior import check_tau
        from axolotl_ivon.posterior.prune import Pruning

        tau, ratio = 1.0, default_ratio
        if self.recommended:
            from axolotl_ivon.decisions.sweep import read_recommended

            tau, ratio = read_recommended(self.recommended, Adapter(adapter).metadata or None)
        tau, ratio = tau if self.tau is None else self.tau, ratio if self.ratio is None else self.ratio
        check_tau(tau)
        Pruning(ratio)
        return tau, ratio


def decision(recommended: str | None) -> Decision:
    """Return the output temperature, and the threshold to abstain below, of a recommendation: without one, neither."""
    from axolotl_ivon.decisions.sweep import Decision, read_decision

    return read_decision(recommended) if recommended else Decision()


def add_all(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Add options that the help lists in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def as_one(name: str, make: Callable[..., Any], *parameters: str) -> Callable[[Command], Command]:
    """Give the command one argument, `name`, in place of `parameters`: what `make` returns for them."""

    def change(command: Command) -> Command:
        @functools.wraps(command)
        def changed(**given: Any) -> Any:
            one = make(**{parameter: given.pop(parameter) for parameter in parameters})
            with one.reserved() if isinstance(one, Terminal) else contextlib.nullcontext():
                return command(**{name: one}, **given)

        return changed  # type: ignore[return-value]

    return change


adapter_argument = click.argument("adapter", metavar="ADAPTER")
_json_and_quiet = add_all(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="No progress on stderr."),
)
# They turn the options into the commands' arguments `terminal` and `output`.
terminal_as_one = as_one("terminal", Terminal, "as_json", "quiet")
output_as_one = as_one("output", OutputOptions, "output", "overwrite", "as_json", "quiet")
terminal_options = add_all(_json_and_quiet, terminal_as_one)
base_model_option = click.option(
    "--base-model", metavar="MODEL", help="Folder or Hub id.  [default: what the adapter's config names]"
)


def dtype_option(text: str) -> Callable[[Command], Command]:
    """Add --dtype, of what is written."""
    return click.option("--dtype", type=click.Choice(DTYPES), help=text)


def choice_option(name: str, values: Sequence[str], text: str) -> Callable[[Command], Command]:
    """Add an option that takes one of `values`, the first by default."""
    return click.option(name, type=click.Choice(values), default=values[0], show_default=True, help=text)


def _loading(**values: Any) -> Loading:
    """Return how the base model is loaded."""
    from axolotl_ivon.models.session import Loading

    return Loading(**values)


# They become the command's argument `loading`.
model_options = add_all(
    base_model_option,
    click.option("--load-in", type=click.Choice(["8bit", "4bit"]), help="Quantize the base model (bitsandbytes)."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, …"),
    choice_option(
        "--dtype", ["auto", *DTYPES], "Of the base model. auto: float32 on a CPU, the checkpoint's elsewhere."
    ),
    as_one("loading", _loading, "base_model", "load_in", "device", "dtype"),
)


def batch_option(text: str) -> Callable[[Command], Command]:
    """Add --batch-size."""
    return click.option("--batch-size", type=BatchSize(), default="auto", show_default=True, help=text)


def output_options(
    default: str,
    text: str = "Where to write.",
    overwrite: str = "Replace the target if it is there.",
    metavar: str = "DIR",
) -> Callable[[Command], Command]:
    """Add -o (with the name that is used without it in the help), --overwrite, --json and --quiet, as `output`."""
    return add_all(
        click.option("--output", "-o", metavar=metavar, help=f"{text}  [default: {default}]"),
        click.option("--overwrite", is_flag=True, help=overwrite),
        _json_and_quiet,
        output_as_one,
    )


def seed_option(text: str) -> Callable[[Command], Command]:
    """Add --seed."""
    return click.option("--seed", type=int, default=0, show_default=True, help=text)


def recommended_option(what: str) -> Callable[[Command], Command]:
    """Add --recommended."""
    return click.option(
        "--recommended", metavar="FILE", help=f"Take {what} from the recommended.json of `ivon-post sweep`."
    )


def point_options(tau: str, ratio: str) -> Callable[[Command], Command]:
    """Add --tau and --ratio with these texts, and --recommended, as `point`."""
    return add_all(
        click.option("--tau", type=float, help=tau),
        click.option("--ratio", type=float, help=ratio, cls=Renamed, formerly=["--prune-ratio"]),
        recommended_option("τ and the ratio"),
        as_one("point", PosteriorOptions, "recommended", "tau", "ratio"),
    )


def risk_options(where: str) -> Callable[[Command], Command]:
    """Add --risk, whose promise is found `where`, and --confidence."""
    return add_all(
        click.option(
            "--risk",
            type=float,
            help="Find the confidence below which to abstain, so that at most this share of the answers is wrong: "
            f"{where}.",
        ),
        click.option("--confidence", type=float, default=0.9, show_default=True, help="Of what --risk promises."),
    )


answer_option = click.option(
    "--answer-regex",
    "-a",
    metavar="REGEX",
    help="The answer in a text: gsm8k (#### 7), boxed (\\boxed{7}), choice (a capital letter alone), or a regular "
    "expression, whose first group it is; the last match counts.  [default: the whole text]",
)


def criterion_option(text: str) -> Callable[[Command], Command]:
    """Add --criterion."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        from axolotl_ivon.posterior.prune import criteria

        return [name for name in criteria() if name.startswith(incomplete)]

    return click.option("--criterion", default="snr", show_default=True, shell_complete=complete, help=text)


data_option = click.option(
    "--data",
    "-d",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Chat JSONL as axolotl trains on, one conversation a line; may be given several times.",
)
task_option = click.option(
    "--task",
    type=click.Choice(["choice", "generate", "classify"]),
    help="choice: the answer is one of a few strings, by the next token. generate: per-token likelihood "
    "of the reference answer. classify: a sequence-classification head. Default: found from the data.",
)
choices_option = click.option(
    "--choices",
    metavar="A,B,…",
    callback=lambda ctx, param, value: value.split(",") if value else None,
    help="The strings to choose from. Default: the answers in the data.",
)
limit_option = click.option("--limit", type=click.IntRange(min=1), help="Use the first LIMIT examples of each file.")
samples_option = click.option(
    "--samples", "-n", type=click.IntRange(min=1), default=10, show_default=True, help="Draws to average."
)
# What is evaluated on, and how. Of these, the command gets those of `evaluate` as the dictionary `run`.
data_options = add_all(
    data_option,
    task_option,
    choices_option,
    limit_option,
    samples_option,
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
    _json_and_quiet,
    as_one("run", dict, "samples", "seed", "batch_size", "draws_per_pass"),
)
# And what.
evaluation_options = add_all(adapter_argument, data_options)
