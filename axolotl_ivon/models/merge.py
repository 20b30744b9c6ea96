"""An adapter merged into its base model, by PEFT."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ..errors import IVONError, one_line, param_ref
from ..posterior.adapter import Adapter
from ..posterior.posterior import Posterior
from ..posterior.tensors import Tensors
from ..reporter import SILENT, Reporter
from ..storage.atomic import new_folder
from ..storage.format import DTYPES, TOKENIZER_FILES, copy_companions, find_base_model
from .session import Loading, has_head, load_model, load_tokenizer

_SHARD = "5GB"  # the most that one file holds
# Kinds of adapters that change the prompt, so that no weight of the base model can hold them.
PROMPT_KINDS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")


def merge(
    adapter: Adapter,
    tensors: Tensors,
    folder: str | os.PathLike[str],
    loading: Loading = Loading(),
    *,
    temperature: float = 1.0,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> None:
    """Write the base model with `tensors` (the mean, a pruned mean, a draw) of `adapter` merged into it.

    Writes safetensors shards, the configuration and the tokenizer: the one beside the adapter, else the base model's,
    if it has one. No code from a model repository is run.

    Args:
        loading: `base_model`, and the `dtype` of the merged model, by default that of the base model. Merging is done
            on the CPU.
        temperature: softmax temperature T that the merged model's logits are divided by; see
            `models.temperature.build_in_temperature`.

    Raises:
        IVONError: a base model that cannot be loaded or does not fit, that is stored quantized or that T cannot be
            built into, weights that are NaN after merging, or a folder that exists or cannot be written.
    """
    from safetensors import SafetensorError

    base = check_merge(adapter, loading)
    with new_folder(Path(folder), overwrite, [adapter.folder, *filter(Path.is_dir, [Path(base)])]) as new:
        reporter.advance("loading the base model", 0, 0)
        from transformers import AutoConfig
        from transformers.utils import GENERATION_CONFIG_NAME

        from .draws import AdapterSlots

        dtype = loading.dtype
        if dtype == "auto":  # the one that the base model was saved in, if a merged model can have it
            with contextlib.suppress(Exception):  # load_model raises with the reason
                own = str(AutoConfig.from_pretrained(base, trust_remote_code=False).dtype).removeprefix("torch.")
                dtype = own if own in DTYPES else dtype
        model = load_model(adapter.folder, Loading(base, device="cpu", dtype=dtype), classify=has_head(adapter))
        if getattr(model.get_base_model(), "is_quantized", False):
            raise IVONError(
                f"the base model {base} is stored quantized, and merged weights cannot be; "
                f"name the one that it was made from with {param_ref('base_model')}"
            )
        reporter.advance("merging", 0, 0)
        slots = AdapterSlots(model)
        slots.check(tensors)
        slots.write(tensors)
        if adapter.config.get("layer_replication"):
            _own_weights(model.get_base_model())
        _untie(model.get_base_model())
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError) as error:  # NaN in a merged weight, or a kind of layer that cannot be merged
            raise IVONError(f"{adapter.folder} cannot be merged ({one_line(error)})") from error
        if temperature != 1:
            from .temperature import build_in_temperature

            build_in_temperature(merged, temperature)
        reporter.advance("writing", 0, 0)
        # Many public models have a temperature without do_sample, which transformers reads but refuses to write.
        generation = merged.generation_config if merged.can_generate() else None
        if generation is not None:
            merged.generation_config = type(generation)()
        try:
            merged.save_pretrained(new, max_shard_size=_SHARD)
        except SafetensorError as error:  # its writer does not raise OSError when the disk is full
            raise IVONError(f"{folder} cannot be written ({one_line(error)})") from error
        if generation is not None:
            generation.to_json_file(new / GENERATION_CONFIG_NAME)
        if (adapter.folder / "tokenizer_config.json").exists():
            copy_companions(adapter.folder, new, TOKENIZER_FILES)
        else:
            with contextlib.suppress(IVONError):  # a model without a tokenizer is a model
                load_tokenizer(adapter.folder, base).save_pretrained(new)


def _own_weights(model: Any) -> None:
    """Give every layer weights of its own: PEFT's replicated layers share those that an update is added to."""
    from torch import nn

    seen = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    tied = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen and id(module) not in tied:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def _untie(model: Any) -> None:
    """Give the head weights of its own, where it shares those of the embeddings and an update is added to either."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    # PEFT holds the rows of trainable tokens in a layer within another; it may give the head those of the embeddings.
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    layers: list[Any] = [getattr(module, "token_adapter", module) for module in modules]
    adapted = [isinstance(layer, BaseTunerLayer) for layer in layers]
    embeddings, head = (layer.get_base_layer() if has else layer for layer, has in zip(layers, adapted, strict=True))
    same_rows = getattr(layers[1], "tied_adapter", None) is not None
    if not any(adapted) or head is None or head.weight is not embeddings.weight or same_rows:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def check_merge(adapter: Adapter, loading: Loading = Loading()) -> str:
    """Return the base model that `merge` loads; its arguments are checked without torch, before anything is loaded.

    Raises:
        IVONError: an unknown kind of model or adapter, or a base model that is not there.
    """
    if adapter.config.get("peft_type") in PROMPT_KINDS:
        raise IVONError(
            f"{adapter.folder} is of peft_type {adapter.config['peft_type']}, which changes the prompt and no weight, "
            "and cannot be merged; use it with PEFT as it is"
        )
    kind = adapter.config.get("task_type") or "CAUSAL_LM"
    if kind not in ("CAUSAL_LM", "SEQ_CLS"):
        raise IVONError(f"{adapter.folder} has task_type {kind}; merge knows CAUSAL_LM and SEQ_CLS")
    return find_base_model(adapter.config, adapter.folder, loading.base_model)


def choose_weights(
    adapter: Adapter,
    ratio: float | None = None,
    sample_seed: int | None = None,
    tau: float = 1.0,
    reporter: Reporter = SILENT,
) -> Tensors:
    """Return what `merge` may be given: the mean, or member 0 of the draws with a seed at τ, pruned first if asked.

    The unpruned mean needs no σ, and is checked alone.

    Raises:
        IVONError: the adapter is damaged, has no σ and needs one, or the ratio is outside [0, 1].
    """
    if ratio is None and sample_seed is None:
        adapter.digests(reporter)
        return adapter.mean
    posterior = Posterior.from_pretrained(adapter.folder, reporter)
    posterior = posterior.prune(ratio or 0, reporter=reporter)
    return posterior.mean if sample_seed is None else posterior.temper(tau).draw(sample_seed)
