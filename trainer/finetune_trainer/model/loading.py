"""The model in memory, and the machine that it is in.

transformers' models are imported late: they are slow, and the export's own process loads none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.utils._pytree import tree_map
from transformers.utils.logging import disable_progress_bar

from finetune_trainer.model import ModelFolder
from finetune_trainer.model.shape import number_type, overflows_in_float16
from finetune_trainer.model.tokenizer import unsupported
from finetune_trainer.runtime import child

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    model: ModelFolder,
    dtype: torch.dtype | Literal["auto"],
    device: str,
    *,
    quantize: bool = False,
    sharded: bool = False,
) -> PreTrainedModel:
    """Load the model for causal language modelling; "auto" keeps the type that it is stored in.

    With `quantize` its linear layers are held in 4 bits (NF4), and `dtype` is what they compute in.
    With `sharded` as well, FSDP can spread them over processes.
    A model that comes with trusted code runs it here: the process has to be a child of the stage.
    Raises StageError(ModelUnsupported) when transformers can't load it.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    if model.trust_remote_code:
        child.deny_secrets()
    disable_progress_bar()  # type: ignore[no-untyped-call] # it moves per tensor
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantize:
        options["quantization_config"] = _nf4(dtype, dtype if sharded else torch.uint8)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model.path,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        # What transformers raises for a model that it does not know depends on where it broke.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the model
        raise unsupported("model", error, model) from error
    if quantize:
        _keep_weights_in_place(loaded)
    if getattr(loaded.config.get_text_config(), "attn_logit_softcapping", None):
        # PyTorch's own attention can't cap the scores and would leave it out (Gemma 2).
        loaded.set_attn_implementation("eager")
    return loaded


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware computes in it; else float16 on a GPU that has it, or float32."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        return cast("torch.dtype", getattr(torch, number_type(min(capabilities), None)))
    native = bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})
    return torch.bfloat16 if native else torch.float32


def compute_dtype_of(model: ModelFolder) -> torch.dtype:
    """The same, but float32 for a model that overflows in float16."""
    dtype = compute_dtype()
    kind = json.loads((model.path / "config.json").read_bytes()).get("model_type")
    return torch.float32 if dtype is torch.float16 and overflows_in_float16(kind) else dtype


def device_name() -> str:
    """The device that trains and its memory, for people."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_number("memory.max")
    memory = min(memory, limit) if limit else memory
    return f"CPU, {torch.get_num_threads()} threads, {memory / 2**30:.1f} GiB"


def idle_cpus(loadavg: Path = Path("/proc/loadavg")) -> int:
    """CPUs of the machine on which nothing runs at this moment; 0 where it isn't told."""
    try:
        running = int(loadavg.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, (os.cpu_count() or 1) - (running - 1))  # without the thread that asks


def use_available_cpus() -> None:
    """Run as many threads as the container may use CPUs; more of them only wait for each other."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(available_cpus())


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, cut by the cgroup's limit."""
    allowed = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return max(1, min(allowed, round(quota))) if quota else allowed


def _cgroup_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _cgroup_number(name: str) -> int | None:
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):
        return None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _nf4(dtype: torch.dtype | Literal["auto"], storage: torch.dtype | Literal["auto"]) -> Any:
    """Values of 4 bits, several of which lie in one of the type `storage`.

    FSDP shards floating types alone. It must be the type that it computes in, or FSDP would convert
    the packed values as if they were numbers.
    """
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def _keep_weights_in_place(model: PreTrainedModel) -> None:
    """Switch off the CPU path of bitsandbytes that breaks training.

    With AVX512-BF16 a forward pass in evaluation mode repacks the 4-bit weights in place, and a
    backward pass after it computes with weights that it misreads.
    """
    from bitsandbytes.nn.modules import Linear4bit  # noqa: PLC0415 - only where 4 bits are used

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


# --- Weights that stay in their files -----------------------------------------------------------

BLOCK_VALUES = 1 << 24
"""Values of a weight that are float32 at a time: 64 MiB."""


class MappedWeight(torch.Tensor):
    """A float32 tensor that converts its values from another one, of any floating type, when read.

    Linear layers and embeddings read it by blocks, and an index what it names. Every other
    operation gets all of it in float32. It can't be trained.
    """

    source: torch.Tensor

    @staticmethod
    def __new__(cls, source: torch.Tensor, device: torch.device | None = None) -> MappedWeight:
        """Wrap `source`, which is read and never written; values come to `device`."""
        made: MappedWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            source.shape,
            dtype=torch.float32,
            device=device or source.device,
            requires_grad=False,
        )
        made.source = source
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        """In float32, to be written to: PEFT's copy of a module that was trained as a whole."""
        made = torch.nn.Parameter(_whole(self), requires_grad=False)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        blockwise = _BLOCKWISE.get(func)
        if blockwise is not None:
            return blockwise(*args, **(kwargs or {}))
        del types
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is an ordinary tensor
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch calls it with the class and function
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func is torch.ops.aten.detach.default:
            return MappedWeight(args[0].source, args[0].device)
        args, kwargs = tree_map(_whole, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _whole(value: Any) -> Any:
    if not isinstance(value, MappedWeight):
        return value
    return value.source.to(value.device).float()


def _linear(
    x: torch.Tensor, weight: MappedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x·Wᵀ + b, where W (out, in) is converted by blocks of rows."""
    source = weight.source
    out = x.new_empty((*x.shape[:-1], source.shape[0]))
    rows = max(1, BLOCK_VALUES // source.shape[1])
    for start in range(0, source.shape[0], rows):
        block = source[start : start + rows].to(x.device).float()
        out[..., start : start + rows] = torch.nn.functional.linear(x, block)
    return out if bias is None else out.add_(bias)


def _embedding(ids: torch.Tensor, weight: MappedWeight, *_: Any, **__: Any) -> torch.Tensor:
    """The rows of the tokens. The other arguments of torch's embedding matter in training only."""
    return weight.source[ids.to(weight.source.device)].to(ids.device).float()


def _some(weight: MappedWeight, index: Any) -> torch.Tensor:
    """One expert of a stack, or some rows."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.source[index].to(weight.device).float()


_BLOCKWISE: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    torch.Tensor.__getitem__: _some,
    torch.nn.functional.linear: _linear,
    torch.nn.functional.embedding: _embedding,
}


@torch.no_grad()
def compute_in_float32(model: PreTrainedModel, device: torch.device) -> None:
    """Let a loaded model compute in float32 on a device, while its weights stay where they are.

    Experts are computed one by one, so that one of them is in float32 at a time.
    """
    if any(".experts." in name and each.dim() > 2 for name, each in model.named_parameters()):
        model.set_experts_implementation("eager")
    seen: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in seen:
                seen[id(parameter)] = _in_float32(parameter, device)
            module._parameters[name] = seen[id(parameter)]
    _compute_buffers_anew(model)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    model.config.dtype = torch.float32


def _in_float32(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    # Small ones (norms, biases) are converted once: operations read all of them, again and again.
    data = parameter.data
    value = MappedWeight(data, device) if data.dim() > 1 else data.float().to(device)
    return torch.nn.Parameter(value, requires_grad=False)


def _compute_buffers_anew(model: PreTrainedModel) -> None:
    """Let the model compute its constants in float32, such as Gemma 3's scale of embeddings.

    In a 16-bit model they are rounded to its type. Parameters are marked as loaded, so that the
    initialisation leaves them alone.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        rounded = [
            name
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16)
        ]
        for name in rounded:
            module._buffers[name] = cast("torch.Tensor", module._buffers[name]).float()
        if rounded:
            cast("Any", model)._init_weights(module)
