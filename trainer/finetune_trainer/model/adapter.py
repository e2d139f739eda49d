"""The adapter: which layers of a model get one, and what its file holds.

Only the model itself knows its modules. `outline_adapter` builds it from its configuration, without
weights, and lets PEFT put the adapter on it, in a process of its own, this module as a program: an
OutlineRequest comes as JSON on standard input, and an AdapterOutline goes to standard output.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, cast

from finetune_trainer.contract import (
    ALL_LINEAR,
    Base,
    Lora,
    Reason,
    StageError,
    TargetModule,
)
from finetune_trainer.model import ModelFolder, converter
from finetune_trainer.model.shape import NO_TEXT, modules_for, of_text
from finetune_trainer.runtime import child

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

WORKER = "finetune_trainer.model.adapter"  # this module as a program
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in the latter
FIELD = "spec.training.lora.targetModules"
PARAMETERS_FIELD = "spec.training.lora.targetParameters"
INNER = ".base_layer"  # of a module that PEFT wraps once for each of its parameters
EXPERT_DIMENSIONS = 3  # of a parameter: experts, outputs and inputs

_OTHER_RESULT = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Fields of PEFT 0.21's LoraConfig that change what an adapter stands for."""

_PLAIN_START = (True, False, None, "gaussian")
"""Values of init_lora_weights that leave the base model's weights as they are."""

log = logging.getLogger(__name__)


def other_kind(config: dict[str, Any]) -> str | None:
    """What an adapter_config.json sets that plain LoRA, rsLoRA and DoRA don't; None if nothing."""
    if (kind := config.get("peft_type")) != "LORA":
        return f"peft_type {kind}"
    if found := [name for name in _OTHER_RESULT if config.get(name)]:
        return ", ".join(found)
    if config.get("bias") not in ("none", None):
        return f"bias {config['bias']}"
    if (start := config.get("init_lora_weights")) not in _PLAIN_START:
        return f"init_lora_weights {start}"
    return None


class Layers(Base):
    """The modules of a model that text passes through, by their names in it."""

    linear: dict[str, tuple[int, int]]
    """Output and input width of the linear layers, but for the output layer."""

    experts: tuple[str, ...] = ()
    """Parameters that hold a layer of all experts at once, e.g. layers.0.mlp.experts.down_proj."""

    embedding: str | None = None
    """The input embedding."""

    output: str | None = None
    """The output layer."""

    tied: bool = False
    """Whether both have the same weights."""

    @classmethod
    def of(cls, model: torch.nn.Module) -> Layers:
        """Those of a model as transformers builds it; its weights may be in 4 bits, or missing."""
        import torch  # noqa: PLC0415 - `prepare` does without it

        modules = dict(model.named_modules())
        names = {module: name for name, module in modules.items()}
        whole: Any = model
        embedding, output = whole.get_input_embeddings(), whole.get_output_embeddings()
        texts = set(of_text(modules))
        linear = {
            name: (module.out_features, module.in_features)
            for name, module in modules.items()
            if isinstance(module, torch.nn.Linear) and module is not output and name in texts
        }
        experts = [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() == EXPERT_DIMENSIONS and name.rpartition(".")[0] in texts
        ]
        return cls(
            linear=linear,
            experts=tuple(experts),
            embedding=names.get(embedding),
            output=names.get(output),
            tied=output is not None and embedding is not None and output.weight is embedding.weight,
        )

    @classmethod
    def of_tensors(cls, names: Iterable[str]) -> Layers:
        """What the names of a model's files say: without widths, and norms among the layers."""
        suffix = ".weight"
        found = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
        return cls(linear=dict.fromkeys(of_text(found), (0, 0)))


def told_by_files(lora: Lora, tensors: Iterable[str]) -> bool:
    """Whether the names of its tensors tell all that has to be known of a model's layers.

    They don't tell linear layers from others, nor how transformers holds experts.
    """
    usual = set(lora.target_modules) <= set(TargetModule)
    usual = usual and not lora.modules_to_save and not lora.target_parameters
    return usual and not any(".experts." in name for name in tensors)


def resolve_targets(lora: Lora, layers: Layers) -> list[str]:
    """The names of the layers that get an adapter, as PEFT takes them, in order.

    Each is the last part of a layer's name, or several parts. Where the model fuses layers, the
    fused one stands for those that were named. Raises StageError(InvalidConfig) for a name that no
    linear layer has.
    """
    if ALL_LINEAR in lora.target_modules:
        if not layers.linear:
            raise _missing([ALL_LINEAR], layers)
        return sorted({_short(name) for name in layers.linear})
    found = modules_for(lora.target_modules, set(_all_suffixes(layers.linear)))
    if missing := [name for name, own in found.items() if own is None]:
        raise _missing(missing, layers)
    if fused := [f"{own} for {name}" for name, own in found.items() if name != own]:
        log.info("The model fuses layers: the adapter goes to %s", ", ".join(fused))
    return sorted({own for own in found.values() if own})


def resolve_whole(lora: Lora, layers: Layers) -> list[str]:
    """The modules that are trained as a whole, as PEFT takes them.

    Where input embedding and output layer are one, either name stands for it. Raises
    StageError(InvalidConfig) for any other module.
    """
    own = {"embedding": layers.embedding, "output": layers.output}
    found = {
        kind: name
        for kind, module in own.items()
        for name in lora.modules_to_save
        if module and is_meant(module, [name])
    }
    if missing := sorted(set(lora.modules_to_save) - set(found.values())):
        names = " and ".join(_short(each) for each in own.values() if each) or "none"
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.training.lora.modulesToSave: {', '.join(missing)} is neither the base model's "
            f"input embedding nor its output layer, which are {names}.",
        )
    if found and layers.tied and layers.embedding:
        return [_short(layers.embedding)]
    return [*found.values()]


def resolve_parameters(lora: Lora, layers: Layers) -> list[str]:
    """The parameters with experts that get an adapter, as PEFT takes them, in order.

    Raises StageError(InvalidConfig) for a name that no such parameter has.
    """
    missing = sorted(set(lora.target_parameters) - set(_all_suffixes(layers.experts)))
    if not missing:
        return sorted(lora.target_parameters)
    has = ", ".join(sorted({".".join(name.split(".")[-3:]) for name in layers.experts})) or "none"
    raise StageError(
        Reason.INVALID_CONFIG,
        f"{PARAMETERS_FIELD}: the base model has no parameter {', '.join(missing)} that holds all "
        f"experts of a layer. Those that it has are {has:.300}: set it to some of them, or leave "
        "it out.",
    )


def is_meant(name: str, targets: Collection[str]) -> bool:
    """Whether PEFT adapts the module of this name, given these targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


class OutlineRequest(Base):
    model: ModelFolder
    """With its configuration; weights are not needed."""

    lora: Lora


class AdapterOutline(Base):
    """An adapter as it will be."""

    tensors: dict[str, tuple[int, ...]]
    """What adapter_model.safetensors holds: shapes by name."""


def outline_adapter(model: ModelFolder, lora: Lora) -> AdapterOutline:
    """Put an adapter on the model without its weights.

    Raises StageError: InvalidConfig where the model has no layers of these names or PEFT can't
    adapt them, ModelUnsupported where transformers can't build the model.
    """
    request = OutlineRequest(model=model, lora=lora).model_dump_json()
    done = child.run([sys.executable, "-m", WORKER], request)
    if done.status == 0:
        return AdapterOutline.model_validate_json(done.output.splitlines()[-1])
    if refused := converter.refusal_in(done.output):
        raise refused
    log.error("The model can't be built:\n%s", done.errors[-4000:])
    raise StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model's layers can't be listed: {done.last_line():.300}. Choose a model that "
        "this version of transformers supports.",
    )


def lora_config(lora: Lora, model: torch.nn.Module) -> LoraConfig:
    """The adapter: W x + s B A x in each target module, with B = 0 at the start.

    The scale s is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732). Raises StageError
    where the model lacks a target module.
    """
    import torch  # noqa: PLC0415 - see above
    from peft import LoraConfig  # noqa: PLC0415

    linear = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = Layers.of(model)
    whole = resolve_whole(lora, layers)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=resolve_targets(lora, layers),
        target_parameters=resolve_parameters(lora, layers) or None,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(whole) and layers.tied,
        exclude_modules=None if of_text(linear) == linear else NO_TEXT,
        bias="none",
    )


def check_stored(model: torch.nn.Module, parameters: Collection[str]) -> None:
    """Raise StageError(InvalidConfig) where files hold experts in a way that a merge can't undo.

    Known are the parameter as it is, and a matrix for each expert, or two that lie one after the
    other in it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import (  # noqa: PLC0415
        Concatenate,
        MergeModulelist,
        WeightConverter,
    )

    for transform in get_model_conversion_mapping(cast("Any", model)):
        if not isinstance(transform, WeightConverter):
            continue
        meant = [name for name in parameters for t in transform.target_patterns if _ends(name, t)]
        merge, *rest = transform.operations
        stacked = isinstance(merge, MergeModulelist) and merge.dim == 0
        joined = not rest or (isinstance(rest[0], Concatenate) and rest[0].dim == 1)
        if meant and not (stacked and joined and len(rest) < 2):
            raise StageError(
                Reason.INVALID_CONFIG,
                f"{PARAMETERS_FIELD}: the base model's files hold {meant[0]} in a way that an "
                "adapter can't be merged into. Leave it out.",
            )


def _ends(name: str, pattern: str) -> bool:
    """Whether a parameter's name and a pattern for its end say the same."""
    ours, theirs = name.split("."), pattern.replace("\\", "").strip("^$.").split(".")
    length = min(len(ours), len(theirs))
    return ours[-length:] == theirs[-length:]


def outline_here(request: OutlineRequest) -> AdapterOutline:
    """What the process does."""
    from peft import get_peft_model, get_peft_model_state_dict  # noqa: PLC0415 - see above

    model: Any = build_empty(request.model)
    layers = Layers.of(model)
    targets = resolve_targets(request.lora, layers)
    meant = {name for name in layers.linear if is_meant(name, targets)}
    parameters = resolve_parameters(request.lora, layers)
    check_stored(model, parameters)
    meant |= {name.rpartition(".")[0] for name in layers.experts if is_meant(name, parameters)}
    try:
        tuned = get_peft_model(model, lora_config(request.lora, model))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _not_adapted(str(error)) from error
    state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    outline = AdapterOutline(tensors={name: tuple(each.shape) for name, each in state.items()})
    adapted = {name.replace(INNER, "") for name in adapted_modules(outline.tensors)}
    if other := sorted(adapted - meant):
        # It takes some names of layers for those of experts (Qwen 2 MoE, DeepSeek).
        raise _not_adapted(f"it would adapt {other[0]} as well")
    return outline


def adapted_modules(tensors: Iterable[str]) -> set[str]:
    """The modules that have low-rank matrices in an adapter's file."""
    found = (name.partition(".lora_A")[0] for name in tensors if ".lora_A" in name)
    return {name.removeprefix(PREFIX) for name in found}


def build_empty(model: ModelFolder) -> torch.nn.Module:
    """The model without weights, on PyTorch's meta device."""
    import torch  # noqa: PLC0415 - see above
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    trusted = model.trust_remote_code
    if trusted:
        child.deny_secrets()
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=trusted)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        built: torch.nn.Module = auto.from_config(config, trust_remote_code=trusted)
    whole: Any = built
    whole.tie_weights()
    return built


def _short(name: str) -> str:
    """The last part of a module's name; with the one before where it is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def _all_suffixes(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[start:]) for start in range(len(parts)))


def _missing(missing: list[str], layers: Layers) -> StageError:
    has = ", ".join(sorted({_short(name) for name in layers.linear})) or "none"
    whole = [each for each in (layers.embedding, layers.output) if each]
    named = ", ".join(missing)
    if set(missing) <= set(_all_suffixes(layers.experts)):
        cause = f"{named} holds all experts of a layer at once: name it in targetParameters"
    elif set(missing) <= set(_all_suffixes(whole)):
        cause = f"{named} is the input embedding or the output layer, and gets no adapter"
    else:
        cause = f"the base model has no linear layer {named}"
    return StageError(
        Reason.INVALID_CONFIG,
        f"{FIELD}: {cause}. Its linear layers are {has:.300}: set it to some of them, or to "
        f"{ALL_LINEAR} alone.",
    )


def _not_adapted(cause: str) -> StageError:
    return StageError(
        Reason.INVALID_CONFIG,
        f"{FIELD}: PEFT can't adapt these layers: {cause.rstrip('.'):.300}. Name others, e.g. "
        "those of attention (the default).",
    )


def main() -> None:
    """Outline the adapter that is asked for."""
    request = OutlineRequest.model_validate_json(sys.stdin.read())
    try:
        with redirect_stdout(sys.stderr):
            outline = outline_here(request)
    except StageError as error:
        converter.end_with(error)
    sys.stdout.write(outline.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
