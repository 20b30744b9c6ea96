"""The page, as HTML and in a real Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from measurements import HOSTILE

from axolotl_ivon.records.evaluation import EvaluationRecord, ExampleRecord
from axolotl_ivon.records.influence import InfluenceRecord
from axolotl_ivon.records.recommendation import Recommendation
from axolotl_ivon.report.findings import Findings
from axolotl_ivon.report.page import main_variant, page

# The contrast, as WCAG 2 defines it, of every piece of text to what lies behind it.
CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = color => {
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgba(color).slice(0, 3).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (rgba(color)[3]) return color;
    }
    return 'white';
  };
  const found = {};
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ['TITLE', 'STYLE', 'title', 'style'].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(e.closest('svg') ? style.fill : style.color), light(behind(e))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found[e.tagName + ' ' + e.textContent.trim().slice(0, 40)] = contrast;
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (.ci/run installs Debian's)")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tiny_adapter: Path, known: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(str(tiny_adapter), known), encoding="utf-8")
    return path


def test_a_real_browser_shows_it(report: Path, browser: Browser) -> None:
    for width in (1400, 400):
        for dark in (False, True):
            browser.open(report.as_uri(), width, dark=dark)
            assert browser.complaints == []
            assert browser.requests == [report.as_uri()]
            assert browser.run("document.title") == "adapter: report"
            assert browser.run("document.scripts.length + document.images.length") == 0
            # The hostile example is there, as text: as question, answer and prediction.
            assert str(browser.run("document.querySelector('article pre').parentElement.innerText")).strip()
            shown = browser.run("[...document.querySelectorAll('article')].map(e => e.innerText).join()")
            assert str(shown).count(HOSTILE) >= 3
            sizes = browser.run(
                "[...document.querySelectorAll('svg')].map(e => [e.getBoundingClientRect().width,"
                " e.getBoundingClientRect().height])"
            )
            assert len(sizes) == 4 + 4 + 2 + 3 + 1 + 2  # reliability, both files; curves; histograms; sweep; maps
            assert all(w > 100 and h > 80 for w, h in sizes)
            # Nothing but what has a box of its own scrolls sideways.
            assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
            columns = browser.run(
                "getComputedStyle(document.querySelector('.page')).gridTemplateColumns.split(' ').length"
            )
            assert columns == (2 if width == 1400 else 1)
            assert browser.run(CONTRAST) == {}, (width, dark)


def test_no_table_is_cut_off_in_a_window_of_a_small_laptop(report: Path, browser: Browser) -> None:
    browser.open(report.as_uri(), 1020)
    boxes = "[...document.querySelectorAll('.scroll')].filter(e => e.querySelector('table'))"
    assert browser.run(f"{boxes}.length") >= 2
    assert browser.run(f"{boxes}.every(e => e.scrollWidth <= e.clientWidth)")


def test_it_prints_light(report: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(report.as_uri(), 794, dark=True, media="print")
    assert browser.run("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    inside = "[...document.querySelectorAll('table, svg')].every(e => e.getBoundingClientRect().right <= innerWidth)"
    assert browser.run(inside)
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_the_page_holds_nothing_that_loads_or_runs(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "default-src 'none'" in text
    names = re.findall(r"https?://[^\"'<\s]+", re.sub(r"&lt;.*?&gt;", "", text))
    assert {name for name in names if "w3.org" not in name and "example.org" not in name} == set()
    assert "/some/where" not in text


def test_it_tells_what_was_measured(report: Path, known: Findings) -> None:
    text = re.sub(r"<svg.*?</svg>", "", report.read_text(encoding="utf-8"), flags=re.S)
    for told in ("1,000", "empirical", "896 in 4 modules", "test.jsonl (40)", "± 3.0", "0.625", "10 draws are better"):
        assert told in text
    right = known.values("/some/where/test.jsonl", "posterior", "correct")
    confidence = known.values("/some/where/test.jsonl", "posterior", "confidence")
    kept = confidence >= 0.6
    assert f"answers {100 * kept.mean():.1f} % of these examples" in text
    assert f"and {100 * (1 - right[kept].mean()):.1f} % of those are wrong" in text
    assert "at most 20.0 % of the answers are wrong" in text
    assert "10 draws at τ 2" in text
    # The surest that are right, the one that is sure and wrong, and the least sure.
    order = re.findall(r"confidence ([\d.]+) %; disagreement", text.replace("\n", " "))
    assert float(order[0]) == 100.0
    assert float(order[5]) == 99.9
    every = sorted(line.rows["posterior"].confidence for line in known.examples if line.data != "other.jsonl")
    assert float(order[10]) == pytest.approx(100 * every[0], abs=0.06)
    assert "long long" in text
    assert "long " * 200 not in text


def test_no_example_is_shown_twice(tiny_adapter: Path) -> None:
    """Of twelve, the wrong ones are unsure, and would be under "Least sure" as well."""
    row = {"name": "mean", "data": "a.jsonl", "examples": 12, "accuracy": 0.75}
    lines = [
        {"data": "a.jsonl", "line": i, "rows": {"mean": {"right": i > 3, "confidence": 0.5 + i / 100}}}
        for i in range(1, 13)
    ]
    evaluation = EvaluationRecord.parse({"rows": [row]}, "made up")
    text = page(str(tiny_adapter), Findings(evaluation, [ExampleRecord.parse(line, "made up") for line in lines]))
    parts = [part.partition("</h3>") for part in text.split("<h3>")[1:]]
    shown = {head: re.findall(r"a.jsonl, line (\d+)", part) for head, _, part in parts}
    assert shown == {
        "Right, surest first": ["12", "11", "10", "9", "8"],
        "Wrong, surest first": ["3", "2", "1"],
        "Least sure": ["4", "5", "6", "7"],
    }


def test_examples_of_files_of_one_name_are_told_apart(tiny_adapter: Path) -> None:
    paths = ("/some/where/a/test.jsonl", "/some/where/b/test.jsonl")
    evaluation = EvaluationRecord.parse(
        {"rows": [{"name": "mean", "data": path, "examples": 1, "accuracy": 1.0} for path in paths]}, "made up"
    )
    predicted = {"mean": {"right": True, "confidence": 0.9}}
    lines = [ExampleRecord.parse({"data": path, "line": 1, "rows": predicted}, "made up") for path in paths]
    text = page(str(tiny_adapter), Findings(evaluation, lines))
    assert re.findall(r">(\S*test.jsonl, line 1)", text) == ["a/test.jsonl, line 1", "b/test.jsonl, line 1"]
    assert "/some/where" not in text


def test_without_examples_it_says_how_to_get_them(tiny_adapter: Path, plain_adapter: Path, known: Findings) -> None:
    text = page(str(tiny_adapter), replace(known, examples=()))
    assert "test.jsonl (40)" in text
    assert "-o examples.jsonl" in text
    assert text.count("<svg") == 3
    nothing = page(str(tiny_adapter), Findings())
    assert "Nothing was evaluated" in nothing
    assert nothing.count("<svg") == 2
    assert "<svg" not in page(str(plain_adapter), Findings()), "without σ there is no map"


def test_generated_text_has_a_share_of_right_tokens(tiny_adapter: Path) -> None:
    row = {"name": "mean", "data": "test.jsonl", "examples": 40, "accuracy": 0.75, "perplexity": 2.0}
    lines = [
        {"data": "test.jsonl", "rows": {"mean": {"tokens": 4, "accuracy": 0.75, "confidence": 0.5 + i / 200}}}
        for i in range(40)
    ]
    evaluation = EvaluationRecord.parse({"rows": [row], "task": "generate"}, "made up")
    text = page(str(tiny_adapter), Findings(evaluation, [ExampleRecord.parse(line, "made up") for line in lines]))
    assert "75 % of its tokens right" in text
    assert "perplexity" in text


@pytest.mark.parametrize(
    ("recommended", "names", "variant"),
    [
        ({}, ["base", "mean", "posterior"], "posterior"),
        ({}, ["base", "mean"], "mean"),
        ({}, [], None),
        ({"tau": 2.0}, ["mean", "posterior", "posterior-pruned"], "posterior"),
        ({"tau": 2.0, "temperature": 1.5}, ["posterior", "posterior+temperature"], "posterior+temperature"),
        ({"tau": 3.0, "temperature": 1.5}, ["posterior", "posterior+temperature"], "posterior"),
        ({"tau": "inf"}, ["mean", "posterior"], "mean"),
        ({"tau": 3.0}, ["posterior", "recommended"], "recommended"),
        ({"tau": 2.0, "temperature": 1.0}, ["posterior"], "posterior"),
        ({"tau": 2.0, "ratio": 0.1}, ["posterior", "posterior-pruned"], "posterior"),
        ({"tau": 2.0, "prune_ratio": 0.1, "ratio": 0.1}, ["posterior", "posterior-pruned"], "posterior-pruned"),
        ({"tau": "inf", "prune_ratio": 0.1, "ratio": 0.1}, ["mean", "mean-pruned", "posterior"], "mean-pruned"),
    ],
)
def test_the_recommended_variant_is_the_one_to_trust(recommended: dict, names: list[str], variant: str | None) -> None:
    rows = [{"name": "mean", "data": "x", "examples": 1}]
    pruned = recommended.pop("prune_ratio", 0.0)
    tau = "inf" if pruned and recommended["tau"] == "inf" else 2.0
    evaluation = EvaluationRecord.parse({"rows": rows, "tau": tau, "prune_ratio": pruned}, "made up")
    sweep = Recommendation.parse({"ratio": 0.0, **recommended}, "made up") if recommended else None
    assert main_variant(Findings(evaluation, sweep=sweep), names) == variant


def test_training_rows_that_stand_out(plain_adapter: Path, report: Path) -> None:
    """Those by their sensitivity, in order, twenty at most, or that there is none; what they hold is text."""
    rows = [
        {"index": i, "loss": 0.1 * i, "leverage": 2.0, "sensitivity": (i >= 80) * 500 + i / 7, "on": None,
         "line": i + 1, "question": f"question {i}", "answer": HOSTILE if i == 109 else "A"}
        for i in range(110)
    ]  # fmt: skip
    rows[108]["sensitivity"] = None
    records = [InfluenceRecord.parse(row, "made up") for row in rows]

    def page_of(rows: list[InfluenceRecord]) -> str:
        return page(str(plain_adapter), Findings(influence=rows))

    text = page_of(records)
    assert "Which training rows" not in report.read_text(encoding="utf-8")
    assert "<script" not in text
    assert re.findall(r"<tr><td>(\d+)</td>", text) == [str(i) for i in (110, *range(108, 89, -1))]
    assert "of the training rows against their leverage" in text
    assert "mathdefault" not in text
    assert "<th>on</th>" not in text
    assert "<td>516</td>" in text  # 500 + 109/7
    assert "<th>on</th>" in page_of([*records[:109], records[109].model_copy(update={"on": -0.5})])
    none = page_of(records[:80])
    assert "None of 80 by its sensitivity" in none
    assert "<th>sensitivity</th>" not in none
