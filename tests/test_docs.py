"""The documentation: it builds without a warning, its links lead somewhere, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    built = subprocess.run([*sphinx, str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    api = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    for name in ("attach", "IVONLoRA.sampled_params", "effective_sample_size", "Posterior.prune", "IVONError"):
        assert f'id="axolotl_ivon.{name}"' in api
    how = (tmp_path / "html" / "how-it-works.html").read_text(encoding="utf-8")
    assert 'class="math' in how


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_exists_and_a_line_of_prose_has_at_most_120_characters(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = [line for line in text.splitlines() if not line.startswith("| `ivon_")]  # a row of a table can't be broken
    assert page.name in ("CONTRIBUTING.md", "CHANGELOG.md") or max(map(len, prose)) <= 120
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_on_training_has_every_key_as_the_table_of_settings_has_it() -> None:
    from axolotl_ivon.settings.table import SETTINGS

    rows = [f"| `{setting.key}` | {setting.default} | {setting.help} |" for setting in SETTINGS]
    head = "## Every key\n\n| key | default | meaning |\n|---|---|---|\n"
    assert head + "\n".join(rows) + "\n\n" in (ROOT / "docs" / "train.md").read_text(encoding="utf-8")


def test_every_test_in_the_table_of_support_is_a_file() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "support.md").read_text(encoding="utf-8")))
    assert named
    assert named <= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


def test_help_and_page_have_the_rows_of_an_evaluation() -> None:
    from click import Context

    from axolotl_ivon.evaluation import ADDED_VARIANTS, PAPER_VARIANTS
    from ivon_post import cli

    every = {*PAPER_VARIANTS, *ADDED_VARIANTS}
    table = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8").split("| variant | how it predicts |")[1]
    heads = [line.split("|")[1] for line in table.split("\n\n")[0].splitlines()[2:]]
    assert {name for head in heads for name in re.findall(r"`(.+?)`", head)} == every
    command = cli.get_command(Context(cli), "eval")
    [rows] = (param.help for param in command.params if param.name == "rows")  # type: ignore[union-attr]
    assert every <= set(re.findall(r"[a-z+-]+", rows))


def test_every_command_has_its_transcript_and_its_options() -> None:
    from click import Context

    from ivon_post import cli

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in cli.list_commands(Context(cli)):
        transcript = (ROOT / "docs" / "transcripts" / f"{name}.txt").read_text(encoding="utf-8")
        assert transcript.startswith(f"$ ivon-post {name} ")
        assert f"transcripts/{name}.txt" in text
        assert text.count(f".. click:: ivon_post.{name}:command") == 1
        assert f"`ivon-post {name} " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_option_on_a_page_is_one_of_its_command() -> None:
    from click import Context

    from ivon_post import cli

    context = Context(cli)
    pages = [*PAGES, ROOT / "docs" / "transcripts.py", *(ROOT / "example_configs").rglob("*.md")]
    for page in pages:
        for name, words in re.findall(r"ivon-post ([a-z]+)([^`|\n\"]*)", page.read_text(encoding="utf-8")):
            if (command := cli.get_command(context, name)) is None:
                continue  # a word after the program's name
            known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
            unknown = set(re.findall(r"(?<= )--[a-z-]+", words)) - known
            assert not unknown, f"{page.name}: ivon-post {name} {unknown}"


def test_the_readme_has_the_sections_that_axolotl_knows_and_versions_agree() -> None:
    prose = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert re.findall(r"^# (.+)$", prose, re.M) == ["axolotl-ivon"]
    sections = ["Requirements", "Installation", "Usage", "Options", "Limitations", "Citation"]
    assert re.findall(r"^## (.+)$", prose, re.M) == sections
    assert {"make demo", "make test"} <= set(re.findall(r"^    (make \w+)", prose, re.M))
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]  # type: ignore[index]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]) == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
