"""The widths of a model, its parameters, and what an adapter of its layers takes.

Widths are read from config.json.
Covered exactly: llama (and SmolLM), mistral, qwen2, qwen3, gemma, gemma2, gemma3 (text), phi3, and
the mixtures of experts mixtral, qwen3_moe and gpt_oss. Other dense decoders with a gated MLP are
taken by the standard keys. Other mixtures, those with dense layers in between, and models without
these keys are not covered: there is no shape, and so no prediction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from finetune_trainer.contract import ALL_LINEAR, Lora, TargetModule

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
_GEMMA3 = {
    # transformers' defaults, which the published config.json files leave out.
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
}
_TIED = {"gemma", "gemma2", "gemma3_text", "smollm3"}  # where config.json leaves the key out
_NORMS_PER_LAYER = {"gemma2": 4, "gemma3_text": 4}
_NORM_ON_QUERY_AND_KEY = {"qwen3", "qwen3_moe", "gemma3_text"}
_MIXTURES = {  # their keys for the number of experts and for the width of one, and the defaults of
    # transformers for the number that a token meets
    "mixtral": ("num_local_experts", "intermediate_size", 2),
    "qwen3_moe": ("num_experts", "moe_intermediate_size", 8),
    "gpt_oss": ("num_local_experts", "intermediate_size", 4),
}
_FUSED = {"phi3"}  # query, key and value are one layer, gate and up another

_FUSED_NAME: dict[str, str] = {
    TargetModule.Q.value: "qkv_proj",
    TargetModule.K.value: "qkv_proj",
    TargetModule.V.value: "qkv_proj",
    TargetModule.GATE.value: "gate_up_proj",
    TargetModule.UP.value: "gate_up_proj",
}
"""The layer that does the work of several, in models that have it (Phi-3, Phi-4)."""

BFLOAT16_SINCE, FLOAT16_SINCE = (8, 0), (7, 0)  # CUDA compute capability: Ampere, Volta
# Their activations pass 65,504, the largest number of float16 (Gemma 2 and later).
_TOO_LARGE_FOR_FLOAT16 = re.compile(r"gemma[2-9].*")

NumberType = Literal["bfloat16", "float16", "float32"]

NO_TEXT = r".*(vision|visual|audio|multi_modal)\w*\..*"
"""Parts of a multimodal model that no text passes through: an adapter there learns nothing."""


@dataclass(frozen=True)
class Shape:
    """Widths are in elements; counts are of parameters."""

    model_type: str
    layers: int
    hidden: int
    query: int
    """Attention heads times their width."""

    key_value: int
    """Key-value heads times their width."""

    mlp: int
    """Of a mixture: of all the experts that a token meets, together."""

    vocabulary: int
    tied: bool
    """Whether the input embedding is the output layer as well."""

    head: int = 0
    """Width of one attention head."""

    attention_bias: int = 0
    """Parameters of the attention layers' biases in one layer."""

    mlp_bias: int = 0
    norms: int = 2
    """Norms as wide as `hidden` in one layer."""

    qk_norm: bool = False
    """Whether queries and keys are normalised."""

    capped: bool = False
    """Whether attention caps its scores, for which it has to compute all of them (Gemma 2)."""

    fused: bool = False
    """Whether query, key and value (and gate and up) are one linear layer."""

    experts: int = 0
    """Of a mixture, in one layer. transformers holds them as two parameters, and as no linear
    layers, so that QLoRA leaves them in 16 bits."""

    active: int = 0
    """Experts that a token meets."""

    sinks: bool = False
    """Whether attention has a further score for each head, and computes all of them (gpt-oss)."""

    @classmethod
    def of_model(cls, folder: Path) -> Self | None:
        """Of the model in a folder; see `from_config`."""
        return cls.from_config(json.loads((folder / "config.json").read_bytes()))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self | None:
        """Read config.json; None where it is not of a covered architecture."""
        text = config.get("text_config")
        if isinstance(text, dict):
            config = {"tie_word_embeddings": config.get("tie_word_embeddings"), **text}
        kind = str(config.get("model_type", ""))
        if kind == "gemma3_text":
            config = {**_GEMMA3, **config}
        if any(config.get(key) for key in _EXPERTS) and not _is_plain_mixture(kind, config):
            return None
        try:
            return cls._read(kind, config)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None

    @classmethod
    def _read(cls, kind: str, config: dict[str, Any]) -> Self:
        hidden = int(config["hidden_size"])
        heads = int(config["num_attention_heads"])
        head = int(config.get("head_dim") or hidden // heads)
        key_value = int(config.get("num_key_value_heads") or heads) * head
        query, (experts, active, mlp) = heads * head, _experts(kind, config)
        bias = query + 2 * key_value if kind == "qwen2" else 0
        if config.get("attention_bias", kind == "gpt_oss") is True:
            bias = query + 2 * key_value + hidden
        tied = config.get("tie_word_embeddings")
        shape = cls(
            model_type=kind,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            query=query,
            key_value=key_value,
            mlp=mlp,
            vocabulary=int(config["vocab_size"]),
            tied=kind in _TIED if tied is None else bool(tied),
            head=head,
            attention_bias=bias,
            mlp_bias=_mlp_bias(kind, config, hidden),
            norms=_NORMS_PER_LAYER.get(kind, 2),
            qk_norm=kind in _NORM_ON_QUERY_AND_KEY,
            capped=bool(config.get("attn_logit_softcapping", kind == "gemma2")),
            fused=kind in _FUSED,
            experts=experts,
            active=active,
            sinks=kind == "gpt_oss",
        )
        if min(shape.layers, hidden, query, key_value, mlp, shape.vocabulary) <= 0:
            raise ValueError("a width is not positive")
        return shape

    @property
    def linear(self) -> int:
        """Parameters of the linear layers' weights, experts included."""
        return self._attention + (self.all_experts or self._mlps)

    @property
    def met(self) -> int:
        """Those of them that a token meets: of a mixture, of the experts that it goes through."""
        return self._attention + self._mlps

    @property
    def all_experts(self) -> int:
        """Parameters of the weights of all experts; 0 where there are none."""
        return self._mlps // self.active * self.experts if self.experts else 0

    @property
    def _attention(self) -> int:
        return self.layers * self.hidden * (2 * self.query + 2 * self.key_value)

    @property
    def _mlps(self) -> int:
        return self.layers * 3 * self.hidden * self.mlp

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding and, where it is another, the output layer."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def other(self) -> int:
        """Parameters of norms, biases, and what chooses the experts."""
        layer = self.norms * self.hidden + self.attention_bias + self.mlp_bias
        layer += 2 * self.head if self.qk_norm else 0
        layer += self.experts * self.hidden
        if self.sinks:
            layer += self.experts + self.query // self.head
        return self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters of the base model."""
        return self.linear + self.embedding + self.other

    def targets(self, lora: Lora) -> dict[str, tuple[int, int]]:
        """Input and output width of each kind of layer that gets an adapter."""
        widths = {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
            "qkv_proj": (self.hidden, self.query + 2 * self.key_value),
            "gate_up_proj": (self.hidden, 2 * self.mlp),
        }
        own = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
        there = own if self.fused else widths.keys() - {"qkv_proj", "gate_up_proj"}
        if self.experts:
            there = {"q_proj", "k_proj", "v_proj", "o_proj"}
        if ALL_LINEAR in lora.target_modules:
            return {name: widths[name] for name in widths if name in there}
        # With dots, a name means some of these layers; here all count.
        kinds = [name.rpartition(".")[2] for name in lora.target_modules]
        names = modules_for(kinds, there).values()
        return {name: widths[name] for name in names if name}

    def adapter(self, lora: Lora) -> int:
        """Trainable parameters: A is rank x input, B is output x rank, in every layer.

        Each expert has its own, where a parameter with all of them gets adapters. DoRA has a
        magnitude for each output as well. Embeddings that are trained as a whole count with all
        their weights.
        """
        whole = min(len(lora.modules_to_save), 1 if self.tied else 2)
        magnitudes = 1 if lora.use_dora else 0
        widths = self.targets(lora).values()
        matrices = self.layers * sum(lora.r * (i + o) + magnitudes * o for i, o in widths)
        matrices += self.layers * self.experts * lora.r * sum(self.expert_targets(lora).values())
        return matrices + whole * self.vocabulary * self.hidden

    def expert_targets(self, lora: Lora) -> dict[str, int]:
        """Input and output width, added up, of each kind of an expert's matrix with an adapter."""
        width = self.mlp // self.active if self.active else 0
        widths = {"gate_up_proj": self.hidden + 2 * width, "down_proj": width + self.hidden}
        named = {name.rpartition(".")[2] for name in lora.target_parameters if self.experts}
        return {name: widths[name] for name in widths if name in named}

    def scaled(self, factor: float) -> Shape:
        """A model of like proportions, `factor` times as wide and deep, of the same vocabulary."""

        def times(width: int) -> int:
            return max(1, round(width * factor))

        return replace(
            self,
            layers=times(self.layers),
            hidden=times(self.hidden),
            query=times(self.query),
            key_value=times(self.key_value),
            mlp=times(self.mlp),
            attention_bias=times(self.attention_bias) if self.attention_bias else 0,
            mlp_bias=times(self.mlp_bias) if self.mlp_bias else 0,
        )


def _is_plain_mixture(kind: str, config: dict[str, Any]) -> bool:
    """Whether it is a mixture that is covered: one with experts in every layer."""
    dense = config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    return kind in _MIXTURES and not dense


def _experts(kind: str, config: dict[str, Any]) -> tuple[int, int, int]:
    """Experts in a layer, those that a token meets, and their width together; of a dense model
    none, and the width of its MLP."""
    if kind not in _MIXTURES:
        return 0, 0, int(config["intermediate_size"])
    number, width, usual = _MIXTURES[kind]
    active = int(config.get("num_experts_per_tok") or usual)
    # transformers 5 writes the number of experts by the same name for all.
    experts = int(config[number] if number in config else config["num_local_experts"])
    return experts, active, active * int(config[width])


def _mlp_bias(kind: str, config: dict[str, Any], hidden: int) -> int:
    """Parameters of the biases beside the MLP's weights; gpt-oss has them in each expert."""
    width = int(config["intermediate_size"])
    if kind == "gpt_oss":
        return int(config["num_local_experts"]) * (2 * width + hidden)
    return 2 * width + hidden if config.get("mlp_bias") is True else 0


def context_length(model: Path) -> int | None:
    """Tokens that the model in a folder was made for; None where its config.json doesn't say."""
    return _number_of_text(model, "max_position_embeddings")


def vocabulary_size(model: Path) -> int | None:
    """Rows of the input embedding of the model in a folder; None as above."""
    return _number_of_text(model, "vocab_size")


def _number_of_text(model: Path, name: str) -> int | None:
    """A positive number in config.json; models with more than text have a part for that."""
    config = json.loads((model / "config.json").read_bytes())
    text = config.get("text_config")
    if isinstance(text, dict):
        config = text
    found = config.get(name)
    return found if isinstance(found, int) and found > 0 else None


def number_type(capability: tuple[int, int], model_type: str | None) -> NumberType:
    """What a model computes in on an NVIDIA GPU: 16 bits where the hardware does so natively."""
    if capability >= BFLOAT16_SINCE:
        return "bfloat16"
    if capability < FLOAT16_SINCE or overflows_in_float16(model_type):
        return "float32"
    return "float16"


def overflows_in_float16(model_type: str | None) -> bool:
    """Whether the model's activations are too large for it."""
    return bool(model_type and _TOO_LARGE_FOR_FLOAT16.fullmatch(model_type))


def modules_for(wanted: Sequence[str], present: Collection[str]) -> dict[str, str | None]:
    """What adapts each wanted name in a model with linear layers of the names `present`.

    The name itself, the fused layer in its place, or None where the model has neither.
    """
    return {
        name: next((each for each in (name, _FUSED_NAME.get(name)) if each in present), None)
        for name in wanted
    }


def of_text(names: Iterable[str]) -> list[str]:
    """The modules that text passes through."""
    return [name for name in names if not re.fullmatch(NO_TEXT, name)]
