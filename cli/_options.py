"""Options and arguments that several commands have, and the values that they become."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click
from click.core import ParameterSource

from axolotl_ivon.errors import IVONError, printable
from axolotl_ivon.storage.format import DTYPES

from ._progress import Progress, held, hold
from ._stdout import only_results, results
from ._tables import emit

if TYPE_CHECKING:
    from axolotl_ivon.decisions.recommendation import Recommended
    from axolotl_ivon.decisions.rule import DecisionRule
    from axolotl_ivon.evaluation.evaluate import EvaluationData as EvaluationData
    from axolotl_ivon.evaluation.evaluate import Sampling as Sampling
    from axolotl_ivon.evaluation.served import ServedModel
    from axolotl_ivon.models.session import Loading as Loading

Command = TypeVar("Command", bound=Callable[..., Any])


OTHER_CONFIDENCE = (
    "the threshold was found for label probabilities, so it promises nothing for the agreement of outputs; find one "
    "with `ivon-post mbr --risk`"
)

# Sections of `--help`, and the parameters in them. The other options of a command come first, as "Options".
_SECTIONS = {
    "Posterior": {"tau", "taus", "ratio", "ratios", "recommended", "samples", "members", "seed", "sample_seed"},
    "Data": {"data", "prompts", "task", "choices", "by_length", "limit", "ood", "calibrate", "on", "validation"},
    "Model": {"endpoints", "base_model", "load_in", "device", "chat_template_kwargs"},
    "Output": {"output", "overwrite", "as_json", "quiet", "--help"},
}


class Sectioned(click.Command):
    """A command whose `--help` lists its options by section: its own `sections`, then those of all commands."""

    def __init__(self, *args: Any, sections: Mapping[str, set[str]] = MappingProxyType({}), **options: Any) -> None:
        super().__init__(*args, **options)
        self._sections = {**sections, **_SECTIONS}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and refuse an option that says more of another one which is not there."""
        rest = super().parse_args(ctx, args)
        for param in self.get_params(ctx):
            if isinstance(param, Detail):
                param.check(ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list for each section that has options."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *self._sections)}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                title = next((t for t, names in self._sections.items() if {param.name, *param.opts} & names), "Options")
                sections[title].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def numbers(value: str) -> tuple[float, ...]:
    """Return the numbers that a text has with commas between."""
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a number, or numbers with commas between") from error


class Renamed(click.Option):
    """An option that still answers to its former names, which no help shows."""

    def __init__(self, *args: Any, formerly: Sequence[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._formerly = formerly

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Add the option to the parser under all its names."""
        shown = self.opts
        self.opts = [*shown, *self._formerly]
        super().add_to_parser(parser, ctx)
        self.opts = shown


class Detail(click.Option):
    """An option that says more of another one, the parameter `of`, and nothing without it."""

    def __init__(self, *args: Any, of: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._of = of

    def check(self, ctx: click.Context) -> None:
        """Raise UsageError if this one is on the command line and the other has no value."""
        given = ctx.get_parameter_source(self.name or "") is ParameterSource.COMMANDLINE
        if given and ctx.params.get(self._of) is None:
            raise click.UsageError(f"{self.opts[0]} goes with --{self._of}; give both, or leave it out", ctx)


class RecommendedOption(Renamed):
    """The path of a recommended.json, and its twin --no-recommended, whose value is False."""

    def __init__(self, *args: Any, formerly: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, formerly=formerly, type=click.UNPROCESSED, metavar="FILE", **options)
        self.secondary_opts = ["--no-recommended"]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Add both to the parser."""
        super().add_to_parser(parser, ctx)
        parser.add_option(self, self.secondary_opts, dest=self.name, action="store_const", const=False)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return both and what they do; the twin has no value."""
        record = super().get_help_record(ctx)
        return record and (record[0].removesuffix(" FILE"), record[1])


@dataclass(frozen=True)
class Terminal:
    """How a command reports to its user: what --json and --quiet say."""

    as_json: bool
    quiet: bool

    def progress(self) -> Progress:
        """Return the progress on stderr, a context manager."""
        return Progress(self.quiet)

    def finish(self, document: dict[str, Any], *lines: object, then: Sequence[object] = ()) -> None:
        """Print the result, as JSON with --json and as lines without, and suggest the command to run `then`."""
        for note in held():
            click.echo(printable(note), err=True)
        if self.as_json:
            emit(document)
            return
        for line in lines:
            click.echo(line, file=results())
        self.suggest(*then)

    def note(self, line: str) -> None:
        """Print on stderr what a user should know about the result, once the command has begun to work."""
        if not self.quiet:
            hold(line)

    def suggest(self, *words: object) -> None:
        """Suggest the next command on stderr, unless a program reads the result."""
        if words and not (self.as_json or self.quiet):
            click.echo(f"next: {printable(shlex.join(map(str, words)))}", err=True)


@dataclass(frozen=True)
class OutputOptions(Terminal):
    """Where a command writes, and how it reports: what --output, --overwrite, --json and --quiet say."""

    output: str | None
    overwrite: bool

    def target(self, adapters: Sequence[str], what: str) -> Path:
        """Return the folder to write, as `path` does, if it may be written: a mistake shows before the work."""
        from axolotl_ivon.storage.atomic import check_target

        path = self.path(adapters[0], what)
        check_target(path, self.overwrite, filter(Path.is_dir, map(Path, adapters)))
        return path

    def given_path(self, adapter: str, **inputs: str | Sequence[str] | None) -> Path | None:
        """Return the path that the user named, None without one.

        `inputs` are files that are read, by their options, so that none of them is written over.
        """
        from axolotl_ivon.storage.atomic import check_outside

        if self.output is None:
            return None
        if self.output in ("", "-"):
            raise IVONError(f"--output {self.output!r} is not a file name; to print results on stdout use --json")
        path = Path(self.output)
        check_outside(path, filter(Path.is_dir, [Path(adapter)]))
        for name, given in inputs.items():
            for file in [given] if isinstance(given, str) else given or []:
                if path.exists() and Path(file).exists() and path.samefile(file):
                    raise IVONError(f"--output {path} is --{name} itself; choose another name")
        return path

    def path(self, adapter: str, what: str, **inputs: str | Sequence[str] | None) -> Path:
        """Return the path that the user named, else one beside `adapter` (for a Hub id, in this folder)."""
        if path := self.given_path(adapter, **inputs):
            return path
        source = Path(adapter)
        if not source.is_dir():
            return Path(f"{source.name}-{what}")
        folder = source if source.name not in ("", "..") else source.resolve()
        return folder.parent / f"{folder.name}-{what}"


class Setting(NamedTuple):
    """What to predict with, once options, recommendation and defaults are weighed."""

    tau: float
    ratio: float
    rule: DecisionRule
    recommended: Recommended | None  # what it is from, if a recommendation was taken
    is_mean: bool  # whether that recommends the mean and nothing else was asked for


@dataclass(frozen=True)
class PosteriorOptions:
    """Temperature and pruning ratio where the user gave them, and a file that recommends both.

    `recommended` is False with --no-recommended; None stands for the recommended.json in the adapter's own folder,
    which a value of the user's own overrides.
    """

    recommended: str | bool | None = None
    tau: float | None = None
    ratio: float | None = None

    @property
    def file(self) -> str | None:
        """The file that the user gave."""
        return self.recommended if isinstance(self.recommended, str) else None

    def taken(self, adapter: str, terminal: Terminal, wants: str = "", served: bool = False) -> Recommended | None:
        """Return the recommendation that holds, and say so where it is the adapter's own.

        Who `wants` "draws" gets the best ones, and who wants the "mean" nothing that is for draws. For members that are
        `served` it is of the draws that they are.
        """
        own = (self.recommended, self.tau, self.ratio) == (None, None, None) and not served
        if not own and self.file is None:
            return None
        from axolotl_ivon.decisions.recommendation import recommended_for, recommended_for_members

        taken = recommended_for_members(self.file) if served and self.file else recommended_for(adapter, self.file)
        if taken and wants == "draws":
            if taken.is_mean and taken.draws is None and self.tau is None:
                terminal.note(f"{taken.path} has no τ for draws; τ is 1")
                return taken.for_draws()
            taken = taken.for_draws()
        if taken and own:
            if wants == "mean" and not taken.is_mean:
                terminal.note(f"the adapter's {taken.path.name} is for {taken.describe()}; this is the mean")
                return None
            what = f"taken from the adapter's {taken.path.name}: {taken.describe()}"
            terminal.note(f"{what}; --no-recommended leaves it out")
        return taken

    def settings(
        self, adapter: str, terminal: Terminal, wants: str = "", default_ratio: float = 0.0, served: bool = False
    ) -> Setting:
        """Return what holds: the options, else the recommendation (see `taken`), else the defaults."""
        from axolotl_ivon.decisions.rule import DecisionRule
        from axolotl_ivon.posterior.posterior import check_tau
        from axolotl_ivon.posterior.prune import Pruning

        taken = self.taken(adapter, terminal, wants, served)
        tau, ratio, rule = (taken.tau, taken.ratio, taken.rule) if taken else (1.0, default_ratio, DecisionRule())
        tau, ratio = tau if self.tau is None else self.tau, ratio if self.ratio is None else self.ratio
        check_tau(tau)
        Pruning(ratio)
        if taken and (tau, ratio) != (taken.tau, taken.ratio):
            plain = DecisionRule(by_length=rule.by_length)
            if rule != replace(plain, mean_confidence=rule.mean_confidence):
                terminal.note(f"{taken.path.name} is for {taken.describe()}: T, threshold and sets are left out")
            rule = plain
        return Setting(tau, ratio, rule, taken, taken is not None and taken.is_mean and self.tau is None)


def add_all(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Add several options, in the order in which the help lists them."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def as_one(name: str, make: Callable[..., Any], *parameters: str) -> Callable[[Command], Command]:
    """Give the command one argument, `name`, in place of those `parameters` that it has: `make` builds it from them."""

    def change(command: Command) -> Command:
        @functools.wraps(command)
        def changed(**given: Any) -> Any:
            value = make(**{parameter: given.pop(parameter) for parameter in parameters if parameter in given})
            # With --json only the document reaches stdout.
            reserved = isinstance(value, Terminal) and value.as_json
            with only_results() if reserved else contextlib.nullcontext():
                return command(**{name: value}, **given)

        return changed  # type: ignore[return-value]

    return change


option = functools.partial(click.option, show_default=True)  # for an option whose default is to be shown
_QUANTIZED = ("8bit", "4bit")
adapter_argument = click.argument("adapter", metavar="ADAPTER")
json_and_quiet = add_all(
    click.option("--json", "as_json", is_flag=True, help="Print only one JSON document on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="Print no progress on stderr."),
)
terminal_options = add_all(json_and_quiet, as_one("terminal", Terminal, "as_json", "quiet"))
base_model_option = click.option(
    "--base-model", metavar="MODEL", help="Folder or Hub id of the base model.  [default: from the adapter's config]"
)


def choice_option(name: str, values: Sequence[str], text: str) -> Callable[[Command], Command]:
    """Add an option that takes one of `values`, the first by default."""
    return option(name, type=click.Choice(values), default=values[0], help=text)


def _loading(base_model: str | None, load_in: Sequence[str], device: str, **chat_template_kwargs: Any) -> Loading:
    """Return how the base model is loaded; of several precisions of a kind the last counts."""
    from axolotl_ivon.models.session import Loading

    quantized = [value for value in load_in if value in _QUANTIZED]
    dtypes = [value for value in load_in if value not in _QUANTIZED]
    return Loading(base_model, [None, *quantized][-1], device, ["auto", *dtypes][-1], **chat_template_kwargs)


# They become the command's argument `loading`.
model_options = add_all(
    base_model_option,
    click.option(
        "--load-in",
        cls=Renamed,
        formerly=["--dtype"],
        multiple=True,
        type=click.Choice([*_QUANTIZED, *DTYPES, "auto"]),
        metavar="PRECISION",
        help=f"Precision of the base model: {', '.join([*_QUANTIZED, *DTYPES])}; the first two quantize it "
        "(bitsandbytes).  [default: float32 on a CPU, elsewhere the checkpoint's dtype]",
    ),
    option("--device", default="auto", help="Device to run on: auto, cpu, cuda, cuda:1, mps."),
    as_one("loading", _loading, "base_model", "load_in", "device", "chat_template_kwargs"),
)


def _json_object(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Return the JSON object that an option has; None without it."""
    if value is None:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(given := json.loads(value), dict):
            return given
    raise click.BadParameter(f"{value!r} is not a JSON object; say '{{\"enable_thinking\": false}}'")


# With `model_options`, it becomes a part of the command's argument `loading`.
chat_template_option = click.option(
    "--chat-template-kwargs",
    metavar="JSON",
    callback=_json_object,
    help="Arguments of the chat template; answers then begin with its own generation prompt.  "
    "[default: as in training]",
)


def output_options(
    default: str | None,
    text: str = "Where to write.",
    overwrite: str = "Replace the target if it exists.",
    metavar: str = "DIR",
) -> Callable[[Command], Command]:
    """Add --output, whose help names the `default`, --overwrite, --json and --quiet, as the argument `output`."""
    return add_all(
        click.option("--output", "-o", metavar=metavar, help=f"{text}  [default: {default}]" if default else text),
        click.option("--overwrite", is_flag=True, help=overwrite),
        json_and_quiet,
        as_one("output", OutputOptions, "output", "overwrite", "as_json", "quiet"),
    )


def seed_option(text: str) -> Callable[[Command], Command]:
    """Add --seed."""
    return option("--seed", type=int, default=0, help=text)


def recommended_option(what: str) -> Callable[[Command], Command]:
    """Add --recommended to a command that takes the file only where it is given."""
    return click.option(
        "--recommended", metavar="FILE", help=f"Take {what} from the recommended.json of `ivon-post sweep`."
    )


def point_options(
    tau: str = "Temperature of the posterior; relative to the adapter's own τ, see `temper`.  [default: 1]",
    ratio: str = "Share of weights to prune first; see `prune`.  [default: 0]",
) -> Callable[[Command], Command]:
    """Add --tau and --ratio with these texts, and --recommended with its twin, as the argument `posterior_options`."""
    return add_all(
        click.option("--tau", type=float, help=tau),
        click.option("--ratio", type=float, help=ratio, cls=Renamed, formerly=["--prune-ratio"]),
        click.option(
            "--recommended",
            cls=RecommendedOption,
            help="Which recommended.json to use (of training, `sweep` or `mbr`), or none.  "
            "[default: the adapter's own, unless --tau or --ratio is given]",
        ),
        as_one("posterior_options", PosteriorOptions, "recommended", "tau", "ratio"),
    )


def risk_options(where: str) -> Callable[[Command], Command]:
    """Add --risk, whose help ends with the sentence `where` about its data, and --confidence."""
    return add_all(
        click.option(
            "--risk",
            type=float,
            help=f"Find a confidence threshold above which at most this share of answers is wrong. {where}",
        ),
        option(
            "--confidence",
            cls=Detail,
            of="risk",
            type=float,
            default=0.9,
            help="Confidence level of the promise that --risk gives.",
        ),
    )


endpoints_option = click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="URL",
    help="URL of an OpenAI-compatible server that serves the members of the ensemble ADAPTER. Repeatable.",
)


@dataclass(frozen=True)
class Servers:
    """The servers that hold the members of an ensemble, in place of a model here: what --endpoint says."""

    endpoints: Sequence[str]
    concurrency: int

    @property
    def words(self) -> list[str]:
        """The words that name them on a command line."""
        return [word for url in self.endpoints for word in ("--endpoint", url)]

    def model(self, adapter: str, loading: Loading) -> ServedModel | None:
        """Return the members there, None without servers; options about draws, or about a model here, are refused."""
        if not self.endpoints:
            return None
        from axolotl_ivon.evaluation.served import ServedModel
        from axolotl_ivon.generation.scoring import ServedMembers

        ctx = click.get_current_context()
        # The seed of a sweep also splits the data.
        refuse_drawn("tau", "taus", "ratio", "ratios", *(["seed"] if ctx.info_name != "sweep" else []))
        for option in given_options("load_in", "device"):
            raise IVONError(f"--endpoint: the model is not loaded here; give {option} to the server")
        samples = ctx.params["samples"] if given_options("samples") else None
        return ServedModel(ServedMembers(adapter, self.endpoints, loading, samples, self.concurrency))


def given_options(*names: str) -> list[str]:
    """Return those options on the command line that give one of these parameters."""
    ctx = click.get_current_context()
    given = [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [param.opts[0] for param in ctx.command.params if param.name in given]


def refuse_drawn(*names: str) -> None:
    """Refuse options about draws for members that servers hold."""
    for option in given_options(*names):
        raise IVONError(f"--endpoint: the members are drawn already; give {option} to `ivon-post sample`")


# They become the command's argument `servers`.
server_options = add_all(
    endpoints_option,
    click.option("--concurrency", type=click.IntRange(1), default=32, hidden=True),
    as_one("servers", Servers, "endpoints", "concurrency"),
)


answer_option = click.option(
    "--answer-regex",
    "-a",
    metavar="REGEX",
    help="How to find the answer in a text: gsm8k (#### 7), boxed (\\boxed{7}), choice (a single capital letter), or "
    "a regular expression with the answer as its first group. The last match counts.  [default: the whole text]",
)


data_option = click.option(
    "--data",
    "-d",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Chat JSONL as for training, one conversation a line. Repeatable.",
)
task_option = click.option(
    "--task",
    type=click.Choice(["choice", "generate", "classify"]),
    help="How answers are scored. choice: one of a few strings, by its likelihood. generate: per-token likelihood of "
    "the reference answer. classify: a sequence-classification head.  [default: by the data]",
)


def split_choices(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """Return the labels that an option has, with commas between."""
    return [label.strip() for label in value.split(",")] if value else None


choices_option = click.option(
    "--choices",
    metavar="A,B,…",
    callback=split_choices,
    help="Answers to choose from, with commas between.  [default: those of training, else those in the data]",
)
by_length_option = click.option(
    "--by-length",
    is_flag=True,
    help="Score choices by the mean log-probability of their tokens, not the sum. recommended.json remembers this.",
)
limit_option = click.option("--limit", type=click.IntRange(min=1), help="Use the first LIMIT examples of each file.")
samples_option = option("--samples", "-n", type=click.IntRange(min=1), default=10, help="Number of draws to average.")


def evaluation_data(data: Sequence[str], **values: Any) -> EvaluationData:
    """Return the data that --data and its kin name."""
    from axolotl_ivon.evaluation.evaluate import EvaluationData

    return EvaluationData(data, **values)


def _sampling(**values: Any) -> Sampling:
    from axolotl_ivon.evaluation.evaluate import Sampling

    return Sampling(**values)


# The data of an evaluation, and how it runs: the command's argument `sampling`.
data_options = add_all(
    data_option,
    task_option,
    choices_option,
    by_length_option,
    limit_option,
    samples_option,
    seed_option("Seed of the draws, the same as for `sample --seed`."),
    model_options,
    as_one("sampling", _sampling, "samples", "seed"),
)
