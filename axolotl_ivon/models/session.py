"""A base model, an adapter over it, and its tokenizer, loaded once from folders or the Hub. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.chats import Example
from ..data.encode import ChatFormat, EncodedExample, encode, encode_turns, writes_as_trained
from ..errors import IVONError, param_ref
from ..posterior.tensors import head_size
from ..reporter import SILENT, Reporter
from ..storage.format import CONFIG_FILE, MEAN_FILE, check_dtype, find_base_model, read_json
from ..storage.tensorfile import TensorFile

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from ..posterior.adapter import Adapter
    from ..posterior.posterior import Posterior


@dataclass(frozen=True)
class Loading:
    """How a base model is found, and how it is held in memory.

    Attributes:
        base_model: folder or Hub id; None for the one that the adapter's configuration names.
        load_in: "8bit" or "4bit" (nf4) quantizes the base model with bitsandbytes.
        device: "auto" for the machine's accelerator if it has one, else the CPU; or a name that torch knows.
        dtype: of the base model, one of DTYPES; "auto" is float32 on a CPU and what the checkpoint has elsewhere.
        chat_template_kwargs: arguments of the chat template, over those of training; None for training's alone.

    Raises:
        IVONError: an unknown dtype, or arguments that are none of a chat template.
    """

    base_model: str | None = None
    load_in: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype, "auto")
        ChatFormat.of({}, self.chat_template_kwargs)


class ChatReader:
    """Turns chats into the tokens that a model reads.

    Args:
        embeddings: the number of tokens that the model has; None if it refuses others by itself.
        label2id: the labels of a sequence-classification head, and their classes.

    Attributes:
        tokenizer: the one that training saved beside the adapter, else the base model's.
        chat_format: how training read chats, or as the user wants them.
        max_length: the most tokens that the model takes; None if it does not say.
        labels: the labels of the head, in the order of its classes; empty without a head.
        classify: whether there is a head.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat,
        max_length: int | None,
        embeddings: int | None = None,
        label2id: Mapping[str, int] | None = None,
    ) -> None:
        self.tokenizer, self.chat_format, self.max_length = tokenizer, chat_format, max_length
        self._embeddings, self._label2id, self.classify = embeddings, dict(label2id or {}), label2id is not None
        self.labels = tuple(sorted(self._label2id, key=self._label2id.__getitem__))

    def encode(
        self, examples: Sequence[Example], task: str, choices: Sequence[str] = (), by_length: bool = False
    ) -> list[EncodedExample]:
        """Tokenise examples for a task ("choice", "generate" or "classify"), as `data.encode.encode` does.

        Texts without a chat are asked after the system prompt of the training data, where there was one. `by_length`
        scores choices by the mean over their tokens.

        Raises:
            IVONError: as `data.encode.encode`, or a token is new to the model.
        """
        items = encode(
            self.tokenizer,
            self._asked(examples),
            task,
            choices=choices,
            label2id=self._label2id,
            max_length=self.max_length,
            chat_format=self.chat_format,
        )
        items = self._checked(items, examples)
        return [replace(item, by_length=True) for item in items] if by_length else items

    def encode_for_training(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Tokenise examples as training reads them: all turns of the assistant, or the label of a classifier.

        Raises:
            IVONError: as `encode`.
        """
        if self.classify:
            return self.encode(examples, "classify")
        asked = self._asked(examples)
        return self._checked(encode_turns(self.tokenizer, asked, self.max_length, self.chat_format), examples)

    def with_answers(self, items: Sequence[EncodedExample], named: str, reporter: Reporter) -> list[EncodedExample]:
        """Return the examples of which the model reaches an answer, and report how many others there are.

        Raises:
            IVONError: the model reaches none; the message begins with `named`.
        """
        answered = [item for item in items if item.positions]
        if lost := len(items) - len(answered):
            text = f"{lost} of {len(items)} examples have no answer within {self.max_length} tokens"
            if not answered:
                raise IVONError(f"{named}: {text}; give shorter conversations")
            reporter.notify(f"{text} and are left out")
        return answered

    def _asked(self, examples: Sequence[Example]) -> Sequence[Example]:
        return examples if self.classify else [*map(self.chat_format.after_system, examples)]

    def _checked(self, items: list[EncodedExample], examples: Sequence[Example]) -> list[EncodedExample]:
        for item, example in zip(items, examples, strict=True):
            self.check_tokens(item.ids, example.source)
        return items

    def check_tokens(self, ids: Sequence[int], source: str) -> None:
        """Raise IVONError if one of `ids` is new to the model; `source` says where they come from."""
        if (known := self._embeddings) is not None and max(ids) >= known:
            raise IVONError(
                f"{source}: token {max(ids)} is new to the base model, which has {known}, and not in the adapter; "
                "train with lora_modules_to_save: [embed_tokens, lm_head]"
            )


class Session(ChatReader):
    """An adapter over its base model in memory, with the tokenizer: loaded once, used by all that follows.

    `adapter` is an `Adapter`, or a `Posterior` that was read from a folder.

    Attributes:
        model: the adapter over its base model, in evaluation mode.
        device: the device of the base model.
        slots: the adapter's tensors inside the model (`draws.AdapterSlots`); they fit the adapter.
        base_model: the name of the base model.
        classes: the number of classes of a prediction: labels of the head, or tokens.

    Raises:
        IVONError: the model does not fit the adapter, or there is no tokenizer.
    """

    def __init__(
        self,
        model: PeftModel,
        adapter: Adapter | Posterior,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from .draws import AdapterSlots

        assert adapter.folder is not None
        self.model, self.device = model, model.device
        self.slots = AdapterSlots(model)
        self.slots.check(adapter.mean)
        config: Any = model.get_base_model().config
        self.base_model = str(config._name_or_path)
        super().__init__(
            load_tokenizer(adapter.folder, self.base_model),
            ChatFormat.of(adapter.metadata, chat_template_kwargs),
            getattr(config, "max_position_embeddings", None),
            model.get_input_embeddings().weight.shape[0],
            config.label2id if has_head(adapter) else None,
        )
        self.classes: int = config.num_labels if self.classify else config.get_text_config().vocab_size
        if self.classify and config.pad_token_id is None:  # decoders find the end of a text by it
            pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
            config.pad_token_id = end if pad is None else pad

    @classmethod
    def open(cls, adapter: Adapter | Posterior, loading: Loading = Loading(), reporter: Reporter = SILENT) -> Session:
        """Load the base model of an adapter, and the adapter over it.

        Raises:
            IVONError: as `load_model` and `load_tokenizer`, or the base model does not fit the adapter.
        """
        assert adapter.folder is not None, "it was read from a folder"
        base_model = find_base_model(adapter.config, adapter.folder, loading.base_model)
        reporter.begin("loading the base model")
        loading = replace(loading, base_model=base_model)
        model = load_model(adapter.folder, loading, classify=has_head(adapter))
        session = cls(model, adapter, loading.chat_template_kwargs)
        if not session.classify and not writes_as_trained(session.tokenizer, session.chat_format):
            trained = session.chat_format.generation_prompt
            reporter.notify(
                f"training wrote {trained!r} before an answer, and the chat template does not: the model is asked in "
                "another way than it was trained; put the template of training beside the adapter"
            )
        return session


def has_head(adapter: Adapter | Posterior) -> bool:
    """Say whether an adapter has a sequence-classification head."""
    return bool(adapter.config.get("task_type") == "SEQ_CLS")


def check_writes(adapter: Adapter | Posterior) -> None:
    """Raise IVONError if an adapter cannot write text: it has a classification head."""
    if has_head(adapter):
        raise IVONError(
            f"{adapter.folder} has a classification head and writes no text; `ivon-post predict` labels texts with it"
        )


def pick_device(device: str = "auto") -> torch.device:
    """Return the named device, or for "auto" the machine's accelerator if it has one, else the CPU."""
    import torch

    if device != "auto":
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise IVONError(f"{param_ref('device')} {device}: not usable here ({reason}); use auto or cpu") from None
        return chosen
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_model(adapter: str | Path, loading: Loading = Loading(), *, classify: bool = False) -> PeftModel:
    """Load an adapter folder over its base model, in evaluation mode; `classify`: with a classification head.

    Raises:
        IVONError: an unknown device, or a base model that is not named, cannot be loaded or does not fit.
    """
    name = find_base_model(read_json(Path(adapter) / CONFIG_FILE), Path(adapter), loading.base_model)
    import torch

    _import_bitsandbytes()
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # a wrong value in the configuration can make PEFT raise anything
        raise IVONError(f"{adapter}: PEFT cannot read adapter_config.json ({_reason(error)})") from None
    specs = TensorFile(Path(adapter) / MEAN_FILE).specs
    shapes = {key: shape for key, (_, shape) in specs.items()}
    # PEFT would fill the memory before it compares a rank that no tensor of the adapter has.
    longest = max((size for shape in shapes.values() for size in shape), default=0)
    for rank in (getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()):
        if not isinstance(rank, int) or rank > longest:
            raise IVONError(f"{adapter}: adapter_config.json has rank {rank!r}; no tensor in {MEAN_FILE} has")
    place, dtype = pick_device(loading.device), loading.dtype
    # Without trust_remote_code=False transformers asks on the terminal whether to run a model's own code.
    options: dict[str, Any] = {"device_map": {"": place}, "trust_remote_code": False}
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    if loading.load_in == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif loading.load_in == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    auto = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    try:
        if classify and (labels := head_size(specs)):  # else as many as the base says
            options["num_labels"] = labels
        base = auto.from_pretrained(name, **options)
    except Exception as error:  # as many kinds as there are models
        raise IVONError(
            f"the base model {name} cannot be loaded ({_reason(error)}); name another with {param_ref('base_model')}"
        ) from None
    # Training may have given the base model more tokens: where the adapter has the embeddings, as many as there.
    embeddings: Any = base.get_input_embeddings()
    embedding = next((key for key, module in base.named_modules() if module is embeddings), None)
    kinds = ("", "base_layer.", "token_adapter.base_layer.")  # saved, with LoRA on them, with trainable tokens
    saved = (shapes.get(f"base_model.model.{embedding}.{kind}weight") for kind in kinds)
    tokens, *_ = next(filter(None, saved), embeddings.weight.shape)
    if tokens != embeddings.weight.shape[0]:
        base.resize_token_embeddings(tokens, mean_resizing=False)
    try:
        with warnings.catch_warnings():
            # PEFT only warns of keys that it misses; `AdapterSlots.check`, which callers run, refuses them.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # `merge` unties them.
            warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings=True`")
            model = PeftModel.from_pretrained(base, str(adapter), torch_device=str(place))
    except Exception as error:  # a wrong value in the configuration can make PEFT raise anything
        raise IVONError(
            f"the base model {name} does not fit the adapter {adapter} ({_reason(error)}); "
            f"name the one that it was trained on with {param_ref('base_model')}"
        ) from None
    return model.eval()


def _import_bitsandbytes() -> None:
    """Import it before PEFT does: where it finds `kernels`, it fetches compiled code from the Hub, unasked."""
    if "bitsandbytes" in sys.modules:
        return
    kernels = {name: sys.modules.pop(name) for name in ["kernels"] if name in sys.modules}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # which makes importing it fail
    try:
        with contextlib.suppress(Exception):  # it may be missing, or not work here
            importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        sys.modules.update(kernels)


def load_tokenizer(folder: str | Path, base_model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that training saved in the adapter's `folder`, else that of the base model.

    Raises:
        IVONError: neither has one.
    """
    from transformers import AutoTokenizer

    source = str(folder) if (Path(folder) / "tokenizer_config.json").exists() else base_model
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises nothing more special
        raise IVONError(
            f"no tokenizer in {source} ({_reason(error)}); save the tokenizer of training beside the adapter"
        ) from None


def _reason(error: BaseException) -> str:
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        return f"{type(error).__name__}: {' '.join(str(error).split())}"  # the message alone is too short
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A size mismatch comes as a headline and one line per tensor; the first tensor's line is clearer.
    line = next((line for line in lines if line.startswith("size mismatch")), lines[0] if lines else "no message")
    return line.rstrip(".")
