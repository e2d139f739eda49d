"""How a model attends to packed rows, proven on the model itself before it trains."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils.import_utils import is_flash_attn_2_available

from finetune_trainer.memory.predict import MASKED_TOKENS
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe.data import PackingCollator, PassLimits
from finetune_trainer.train.recipe.processes import is_first, world_size

# As models' attn_implementation: by blocks, on a CPU, and by PyTorch's kernel, on a GPU.
ATTENTION_NAME, KERNEL_NAME = "packed_rows", "packed_rows_varlen"
WITHOUT_MASK = {ATTENTION_NAME, KERNEL_NAME, "flash_attention_2"}
KERNEL_CAPABILITY = (8, 0)  # FlashAttention 2, which PyTorch has built in, needs Ampere
KERNEL_TYPES = {torch.float16, torch.bfloat16}
BLOCK = 128  # queries at once; 64 to 128 measured fastest, their scores stay in the L2 cache
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}

Bounds = list[tuple[int, int]]


def _find_kernel() -> Callable[..., torch.Tensor] | None:
    """PyTorch's kernel for rows of different length; None where this PyTorch has none.

    Before 2.13 it lacks windows or shared keys, or can't be imported.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn as found  # noqa: PLC0415 - may fail
    except (ImportError, AttributeError, RuntimeError) as error:
        log.debug("No kernel for packed rows: %s", error)
        return None
    wanted = {"scale", "window_size", "enable_gqa"}
    return found if wanted <= inspect.signature(found).parameters.keys() else None  # type: ignore[return-value] # a tensor where no more is asked for


log = logging.getLogger(__name__)

varlen_attn = _find_kernel()


def register_attention() -> None:
    """Register both with transformers, which then neither builds nor passes a mask."""
    for name, function in ((ATTENTION_NAME, packed_attention), (KERNEL_NAME, kernel_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)


def supports_attention_of(config: Any) -> bool:
    """Whether a model's layers attend in a way that can be computed here."""
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or SUPPORTED_LAYER_TYPES)
    special = ("attn_logit_softcapping", "attention_dropout", "attention_chunk_size")
    if any(getattr(text, name, None) for name in special):
        return False
    return layer_types <= SUPPORTED_LAYER_TYPES


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, time, size]
    key: torch.Tensor,  # [1, key heads, time, size]
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers; returns [1, time, heads, size].

    `cu_seq_lens_q` are the rows' bounds. Without them there is one row. NotImplementedError for
    what some model wants beyond that.
    """
    _refuse_special(module, query, others)
    ends = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Of a model in float32 under autocast, the positions make query and key float32 again.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        query[0], key[0], value[0], scale, sliding_window, list(pairwise(ends))
    )
    return out.transpose(0, 1)[None], None


def kernel_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, time, size]
    key: torch.Tensor,  # [1, key heads, time, size]
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The same by PyTorch's kernel for rows of different length, in 16 bits on a GPU."""
    _refuse_special(module, query, others)
    if varlen_attn is None:
        raise NotImplementedError("this PyTorch has no such kernel")
    time = query.shape[2]
    bounds, longest = cu_seq_lens_q, max_length_q or time
    if bounds is None:
        bounds, longest = torch.tensor([0, time], dtype=torch.int32, device=query.device), time
    causal = -1 if sliding_window is None or sliding_window >= longest else sliding_window - 1
    device, dtype = query.device.type, query.dtype
    if dtype is torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    out = varlen_attn(
        query[0].transpose(0, 1).to(dtype),
        key[0].transpose(0, 1).to(dtype),
        value[0].transpose(0, 1).to(dtype),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(causal, 0),  # keys before and behind a query, beside its own
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


def _refuse_special(module: torch.nn.Module, query: torch.Tensor, others: dict[str, Any]) -> None:
    special = ("softcap", "s_aux", "position_bias")
    wanted = [name for name in special if others.get(name) is not None]
    if others.get("dropout"):
        wanted.append("dropout")
    if query.shape[0] != 1 or wanted or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"packed attention of {query.shape[0]} sequences with {wanted}")


def _no_mask(*_: Any, **__: Any) -> None:
    return None


class _PackedAttention(torch.autograd.Function):
    """Causal attention within each row. Heads that share keys are one matrix product."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them so
        ctx: Any,
        query: torch.Tensor,  # [heads, time, size]
        key: torch.Tensor,  # [key heads, time, size]
        value: torch.Tensor,
        scale: float,
        window: int | None,
        rows: Bounds,
    ) -> torch.Tensor:
        groups = key.shape[0]
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for start, end, low in _blocks(rows, window):
            block = query[:, start:end].reshape(groups, -1, query.shape[-1])
            weights = _weights(block, key[:, low:end], scale, end - start, window)
            mixed = torch.bmm(weights.to(value.dtype), value[:, low:end])
            out[:, start:end] = mixed.view(-1, end - start, value.shape[-1])
        ctx.save_for_backward(query, key, value)
        ctx.options = scale, window, rows
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        query, key, value = ctx.saved_tensors
        scale, window, rows = ctx.options
        groups, dtype = key.shape[0], query.dtype
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for start, end, low in _blocks(rows, window):
            block = query[:, start:end].reshape(groups, -1, query.shape[-1])
            above = gradient[:, start:end].reshape(groups, -1, value.shape[-1])
            keys, values = key[:, low:end], value[:, low:end]
            weights = _weights(block, keys, scale, end - start, window)
            d_value[:, low:end] += torch.bmm(weights.to(dtype).transpose(1, 2), above)
            d_weights = torch.bmm(above, values.transpose(1, 2)).float()
            scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32)
            scores = scores.mul_(scale).to(dtype)
            d_query[:, start:end] = torch.bmm(scores, keys).view(-1, end - start, keys.shape[-1])
            d_key[:, low:end] += torch.bmm(scores.transpose(1, 2), block)
        return d_query, d_key, d_value, None, None, None


def _blocks(rows: Bounds, window: int | None) -> list[tuple[int, int, int]]:
    """Queries from `start` to `end`, and the first key that one of them sees."""
    found = []
    for first, last in rows:
        for start in range(first, last, BLOCK):
            low = first if window is None else max(first, start - window + 1)
            found.append((start, min(start + BLOCK, last), low))
    return found


def _weights(
    query: torch.Tensor, key: torch.Tensor, scale: float, count: int, window: int | None
) -> torch.Tensor:
    """Probabilities in float32 of `count` queries per head, whose last key is their own."""
    scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scale)
    keys = key.shape[1]
    by_head = scores.view(key.shape[0], -1, count, keys)
    by_head[..., keys - count :].add_(_later(count))
    if window is not None and keys > window:
        by_head.add_(_earlier(count, keys, window))
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=BLOCK)
def _later(count: int) -> torch.Tensor:
    """Minus infinity above the diagonal: keys behind the query."""
    return torch.full((count, count), -torch.inf).triu(1)


@lru_cache(maxsize=16)
def _earlier(count: int, keys: int, window: int) -> torch.Tensor:
    """Minus infinity for keys that have left the window."""
    queries = torch.arange(keys - count, keys)[:, None]
    return torch.zeros(count, keys).masked_fill_(torch.arange(keys) <= queries - window, -torch.inf)


FEW_WORDS = 256  # in the vocabulary of a model that is made for a proof alone
PROOF_LENGTHS = 7, 5  # tokens of the two rows that the proof is made with
# Mean deviations, as a share of the logits' spread.
LEAK = 1e-3  # from another row before it: mostly exactly 0, in every type
TOLERANCE, ROUGH_TOLERANCE = 1e-3, 0.1  # from the row alone, in float32 and in 16-bit types


def pass_limits(
    work: TrainingWork, model: PreTrainedModel, lengths: NDArray[np.int32], *, packed: bool
) -> PassLimits:
    """What a pass may hold by the plan, of examples of these lengths.

    On a GPU, a mask of tokens x tokens would cost more than larger passes gain.
    """
    rows, tokens = work.plan.batch_size, work.plan.pass_tokens or 0
    if packed and work.engine != "unsloth" and builds_mask(model):
        rows, tokens = 1, min(max(tokens, rows * int(lengths.max())), MASKED_TOKENS)
    return PassLimits(rows, tokens, world_size(), packed=packed)


def builds_mask(model: PreTrainedModel) -> bool:
    """Whether packed rows are kept apart by a mask, on a GPU."""
    attention = model.config._attn_implementation
    return torch.cuda.is_available() and attention not in WITHOUT_MASK


def prepare_packing(
    model: PreTrainedModel, *, unsloth: bool = False, compute: torch.dtype | None = None
) -> bool:
    """Let the model attend to packed rows in the fastest way that is right; False when none is.

    Of several processes the first one decides, since it alone may hold the weights. Unsloth's
    models have an attention of their own. `compute` is the type that it trains in, under autocast
    where its weights have another.
    """
    chosen = None
    if is_first():
        chosen = _fastest_right_attention(model, compute or model.dtype, unsloth=unsloth)
    if dist.is_initialized():
        dist.broadcast_object_list(box := [chosen])
        (chosen,) = box
    if chosen is None:
        log.warning(
            "Rows are padded, not packed: in this model, rows that lie end to end would see each "
            "other"
        )
        return False
    register_attention()  # in each process
    model.set_attn_implementation(chosen)
    log.info("Rows are packed (attention: %s)", chosen)
    return True


def _fastest_right_attention(
    model: PreTrainedModel, compute: torch.dtype, *, unsloth: bool
) -> str | None:
    before = model.config._attn_implementation
    register_attention()
    try:
        with _computing(model, compute):
            alone = _logits_alone(model)
            candidates = [before] if unsloth else _candidates(model, before, compute)
            found = next((n for n in candidates if _is_right(model, n, alone, compute)), None)
    finally:
        model.set_attn_implementation(before)
    spread = model.device.type == "cpu" and torch.cuda.is_available()
    if found and spread and kernel_fits(model, compute):
        # It will be spread over GPUs. There a few of its layers have to show what they do.
        found = _proven_on_gpu(model, compute) or found
    return found


def _computing(model: PreTrainedModel, compute: torch.dtype) -> AbstractContextManager[Any]:
    """As the training does: under autocast where the weights have another type (method full)."""
    if compute is model.dtype:
        return nullcontext()
    return torch.autocast(model.device.type, compute)


def _proven_on_gpu(model: PreTrainedModel, compute: torch.dtype) -> str | None:
    try:
        few = few_layers(model, "cuda")
        with _computing(few, compute):
            right = _is_right(few, KERNEL_NAME, _logits_alone(few), compute)
    except Exception as error:  # a model's own code; the attention that is proven stays
        log.debug("No proof on the GPU: %s", error)
        return None
    return KERNEL_NAME if right else None


def few_layers(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """A model like it with random weights: a layer of each kind, and few words."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"])
    count = max(kinds.index(kind) for kind in kinds) + 1
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = kinds[:count]
    text.vocab_size = FEW_WORDS
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    with torch.device(device):
        made: Any = cast("Any", type(model))._from_config(config, dtype=model.dtype)
    return cast("PreTrainedModel", made.to(device))


def kernel_fits(model: PreTrainedModel, compute: torch.dtype) -> bool:
    """Whether PyTorch's kernel is there, and for this GPU, this type and the model's attention."""
    fits = (
        torch.cuda.get_device_capability() >= KERNEL_CAPABILITY
        and compute in KERNEL_TYPES
        and supports_attention_of(model.config)
    )
    if fits and varlen_attn is None:
        log.warning(
            "PyTorch %s has no kernel for packed rows that knows windows and shared keys (2.13 "
            "has): a mask keeps them apart, in passes of at most %d tokens",
            torch.__version__,
            MASKED_TOKENS,
        )
    return fits and varlen_attn is not None


def _is_right(model: PreTrainedModel, name: str, alone: torch.Tensor, compute: torch.dtype) -> bool:
    try:
        model.set_attn_implementation(name)
        packed, other = _logits_packed(model, 0), _logits_packed(model, 1)
    except Exception as error:  # whatever a model's code raises for what it can't do
        log.debug("Packing with the attention %s: %s", name, error)
        return False
    second = slice(PROOF_LENGTHS[0], None)
    leak, off = deviation(other[second], packed[second]), deviation(packed, alone)
    log.debug("Packing with the attention %s: leak %.1e, deviation %.1e", name, leak, off)
    allowed = TOLERANCE if compute is torch.float32 else ROUGH_TOLERANCE
    return leak < LEAK and off < allowed


def _candidates(model: PreTrainedModel, before: str, compute: torch.dtype) -> list[str]:
    """Ways to attend on the device that the model is on, the fastest one first."""
    names = [before]
    if model.device.type == "cpu":
        # A model that will be spread over GPUs is still on the CPU, and blocks are slow there.
        if not torch.cuda.is_available() and supports_attention_of(model.config):
            names.insert(0, ATTENTION_NAME)
        return names
    if is_flash_attn_2_available() and compute in KERNEL_TYPES:
        names.insert(0, "flash_attention_2")
    if kernel_fits(model, compute):
        names.insert(0, KERNEL_NAME)
    return names


def deviation(packed: torch.Tensor, alone: torch.Tensor) -> float:
    """Mean difference of two tensors of logits, as a share of their spread."""
    return float((packed - alone).abs().mean() / alone.std().clamp(min=1e-9))


def _random_rows(model: PreTrainedModel, first: int) -> list[list[int]]:
    """Two rows of random tokens; `first` chooses the first one."""
    tokens = model.config.get_text_config().vocab_size
    seeds = (first, len(PROOF_LENGTHS))
    return [
        torch.randint(tokens, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for length, seed in zip(PROOF_LENGTHS, seeds, strict=True)
    ]


def _logits_alone(model: PreTrainedModel) -> torch.Tensor:
    rows = [torch.tensor([row], device=model.device) for row in _random_rows(model, 0)]
    return torch.cat([_logits(model, input_ids=row) for row in rows])


def _logits_packed(model: PreTrainedModel, first: int) -> torch.Tensor:
    rows = [{"input_ids": row, "labels": row} for row in _random_rows(model, first)]
    batch = PackingCollator(pad=0)(rows)
    del batch["labels"]
    return _logits(model, **send_to_device(batch, model.device))


def _logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """[tokens, vocabulary]"""
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        model.train(training)
    return logits[0].float()
