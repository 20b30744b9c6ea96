"""A PEFT model in memory, and draws from its posterior written into it in place.

A draw costs one copy of the adapter, not a reload: `loaded` puts a set of adapter tensors into the model and
puts back what was there. `stacked` runs several draws in one batch over the shared base weights.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import IVONError
from .files import MEAN_FILE, TensorFile

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """Return the named device, or for "auto" the machine's accelerator if it has one, else the CPU."""
    if device != "auto":
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise IVONError(f"--device {device}: not usable here ({reason}); use auto or cpu") from None
        return chosen
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_model(
    adapter: str | Path,
    *,
    base_model: str | None = None,
    classify: bool = False,
    load_in: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> PeftModel:
    """Load an adapter folder over its base model, in evaluation mode.

    Args:
        adapter: a PEFT folder with safetensors.
        base_model: folder or Hub id; the one that the adapter's config names by default.
        classify: load a sequence-classification head instead of a language-model head.
        load_in: "8bit" or "4bit" (nf4) quantizes the base model with bitsandbytes.
        dtype: of the base model; "auto" is float32 on a CPU and what the checkpoint has elsewhere.

    Raises:
        IVONError: no base model is named, it cannot be loaded, or it does not fit the adapter.
    """
    _import_bitsandbytes()
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # a wrong value in the configuration can make PEFT raise anything
        raise IVONError(f"{adapter}: PEFT cannot read adapter_config.json ({_reason(error)})") from None
    _check_ranks(Path(adapter), config)
    name = base_model or config.base_model_name_or_path
    if not name:
        raise IVONError(f"{adapter}: adapter_config.json names no base model; name it with --base-model")
    place = pick_device(device)
    # Said outright, or transformers asks on the terminal whether to run a model's own code.
    options: dict[str, Any] = {"device_map": {"": place}, "trust_remote_code": False}
    if dtype == "auto":
        options["dtype"] = torch.float32 if place.type == "cpu" else "auto"
    else:
        options["dtype"] = _DTYPES[dtype]
    if load_in == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif load_in == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    auto = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    try:
        if classify:
            options["num_labels"] = _head_size(Path(adapter), str(name))
        base = auto.from_pretrained(name, **options)
    except Exception as error:  # as many kinds as there are models
        raise IVONError(
            f"the base model {name} cannot be loaded ({_reason(error)}); name another with --base-model"
        ) from None
    _resize_embeddings(base, Path(adapter))
    try:
        with warnings.catch_warnings():
            # PEFT only warns of keys that it misses; AdapterSlots.check below refuses them.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, str(adapter), torch_device=str(place))
    except Exception as error:  # a wrong value in the configuration can make PEFT raise anything
        raise IVONError(
            f"the base model {name} does not fit the adapter {adapter} ({_reason(error)}); "
            "name the one that it was trained on with --base-model"
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


def _check_ranks(adapter: Path, config: PeftConfig) -> None:
    """Refuse a rank that no tensor of the adapter has: PEFT would fill the memory before it compares them."""
    shapes = [entry.shape for entry in TensorFile(adapter / MEAN_FILE).entries.values()]
    longest = max((size for shape in shapes for size in shape), default=0)
    for rank in (getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()):
        if not isinstance(rank, int) or rank > longest:
            raise IVONError(f"{adapter}: adapter_config.json has rank {rank!r}; no tensor in {MEAN_FILE} has")


def load_tokenizer(adapter: str | Path, model: PeftModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer that training saved beside the adapter, else that of the base model."""
    from transformers import AutoTokenizer

    beside = (Path(adapter) / "tokenizer_config.json").exists()
    base: Any = model.get_base_model()
    source = str(adapter) if beside else base.config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises nothing more special
        raise IVONError(
            f"no tokenizer in {source} ({_reason(error)}); save the tokenizer of training beside the adapter"
        ) from None


def _head_size(adapter: Path, base_model: str) -> int:
    """Return how many labels the classification head has: as the adapter saved it, else as the base does."""
    from safetensors import safe_open
    from transformers import AutoConfig

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        # A head may have hidden layers (classifier.dense) before the one that gives the labels: the
        # narrowest.
        widths = [
            file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118 - a safetensors handle is no mapping
            if key.endswith(".weight") and "lora_" not in key and {"score", "classifier"} & {*key.split(".")}
        ]
    return min(widths) if widths else AutoConfig.from_pretrained(base_model, trust_remote_code=False).num_labels


def _resize_embeddings(base: PreTrainedModel, adapter: Path) -> None:
    """Give the base model as many tokens as training gave it, where the adapter has the embeddings."""
    from safetensors import safe_open

    embeddings: Any = base.get_input_embeddings()
    name = next((name for name, module in base.named_modules() if module is embeddings), None)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            if key == f"base_model.model.{name}.weight":
                rows = file.get_slice(key).get_shape()[0]
                if rows != embeddings.weight.shape[0]:
                    base.resize_token_embeddings(rows, mean_resizing=False)


def _reason(error: BaseException) -> str:
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        return f"{type(error).__name__}: {' '.join(str(error).split())}"  # the message alone says little
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A size mismatch comes as a headline and one line per tensor: the first tensor says more.
    line = next((line for line in lines if line.startswith("size mismatch")), lines[0] if lines else "no message")
    return line.rstrip(".")


class AdapterSlots:
    """The tensors of one adapter inside a PEFT model, under the keys by which PEFT saves them.

    Attributes:
        places: the live parameters (and buffers of `modules_to_save`), by PEFT's key.
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default") -> None:
        from peft import get_peft_model_state_dict

        # Not state_dict(): quantized layers pack and copy there, and these must be the parameters themselves.
        live: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        live |= dict(model.named_buffers(remove_duplicate=False))
        self.places = get_peft_model_state_dict(model, live, adapter_name, save_embedding_layers=False)
        self._all = dict(self.places)
        if hasattr(model, "get_input_embeddings"):
            # PEFT saves the embeddings too when they are targeted or were resized: an adapter may have them.
            self._all |= get_peft_model_state_dict(model, live, adapter_name, save_embedding_layers=True)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise IVONError unless `tensors` are the adapter's: every key, no other key, the same shapes."""
        fix = "name the base model that the adapter was trained on with --base-model"
        for key, tensor in tensors.items():
            if key not in self._all:
                raise IVONError(f"the base model does not fit the adapter: it has no place for {key}; {fix}")
            if self._all[key].shape != tensor.shape:
                raise IVONError(
                    f"the base model does not fit the adapter: {key} is {list(tensor.shape)} in the adapter and "
                    f"{list(self._all[key].shape)} in the model; {fix}"
                )
        for key in self.places:
            if key not in tensors:
                raise IVONError(f"the base model does not fit the adapter: the adapter has no {key}; {fix}")

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into the model, each cast to its parameter's dtype."""
        for key, tensor in tensors.items():
            self._all[key].copy_(tensor)

    @contextlib.contextmanager
    def loaded(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold `tensors` in the model inside the block; afterwards, whatever happened, what was there."""
        before = {key: self._all[key].detach().clone() for key in tensors}
        try:
            self.write(tensors)
            yield
        finally:
            self.write(before)


@contextlib.contextmanager
def loaded(model: PeftModel, tensors: Mapping[str, Tensor], adapter_name: str = "default") -> Iterator[None]:
    """Hold one set of adapter tensors, a draw say, in `model` inside the block; nothing is reloaded.

    Args:
        tensors: by PEFT's saved keys, as `Posterior.sample` returns them.

    Raises:
        IVONError: a key or shape that the model does not have, or a missing key.
    """
    slots = AdapterSlots(model, adapter_name)
    slots.check(tensors)
    with slots.loaded(tensors):
        yield


@contextlib.contextmanager
def stacked(model: PeftModel, draws: Sequence[Mapping[str, Tensor]], adapter_name: str = "default") -> Iterator[None]:
    """Run k draws at once inside the block: of k·b input rows, rows i·b to (i+1)·b see draw i.

    The base layers see all rows as one batch; each LoRA layer multiplies the rows by their own A and B, two
    batched products whatever k is.

    Raises:
        IVONError: the adapter is more than plain LoRA on linear layers (DoRA, embeddings, saved modules,
            biases).
    """
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[Any, Tensor, Tensor]] = []
    used: set[str] = set()
    for name, module in model.named_modules():
        keys = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
        if isinstance(module, LoraLayer) and keys[0] in draws[0] and adapter_name not in module.lora_variant:
            weight: Any = module.lora_A[adapter_name].weight
            a, b = (torch.stack([draw[key] for draw in draws]).to(weight) for key in keys)
            if a.dim() == 3:  # LoRA on a convolution has more
                layers.append((module, a, b))
                used.update(keys)
    if left := draws[0].keys() - used:
        raise IVONError(
            f"--draws-per-pass {len(draws)}: {sorted(left)[0]} is not plain LoRA on a linear layer; "
            "use --draws-per-pass 1"
        )
    with contextlib.ExitStack() as stack:
        for module, a, b in layers:
            stack.enter_context(_replaced_forward(module, _stacked_forward(module, a, b, adapter_name)))
        yield


def _stacked_forward(module: Any, a: Tensor, b: Tensor, adapter_name: str) -> Any:
    scaling = module.scaling[adapter_name]
    a, b = a.transpose(1, 2), b.transpose(1, 2) * scaling

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = module.base_layer(x, *args, **kwargs)
        rows = x.to(a.dtype).reshape(len(a), -1, x.shape[-1])
        return result + (rows @ a @ b).reshape(result.shape).to(result.dtype)

    return forward


@contextlib.contextmanager
def _replaced_forward(module: Any, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate's hooks put one on the instance
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without gradients inside the block, and back as it was afterwards.

    Back module by module, and with the parameters' `requires_grad`, which PEFT's `disable_adapter` changes.
    """
    training = [module for module in model.modules() if module.training]
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a module caches meanwhile must serve training later
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, wanted in gradients.items():
            parameter.requires_grad_(wanted)
