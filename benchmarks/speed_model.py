"""What a training step should cost on a GPU: FLOPs, bytes and launches, and the time they take.

    python -m benchmarks.speed_model

writes the tables of docs/performance.md; `hack.gpu_table` takes its tokens a second from here as
well. Nothing here is measured. The model is there so that a measurement can contradict it: where it
is off, one of its three sums is.

    arithmetic  matrix products at a share of the peak that grows with the model's width
    bytes       what kernels between them read and write, at a share of the memory's rate
    launches    each kernel takes the CPU a few microseconds, while the GPU may have nothing to do

A pass takes arithmetic + bytes, or its launches if they take longer, or with FSDP the weights'
way between GPUs, which goes on beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from finetune_trainer.contract import Hardware, StageError, Training, TrainingPlan
from finetune_trainer.memory.plan import Lengths, plan
from finetune_trainer.memory.predict import NF4
from finetune_trainer.model.shape import Shape, number_type

ROW = 2048  # tokens of each row
LABELS = 0.5  # share of them that are learnt
LAUNCH_SECONDS = 6e-6  # of one operation in PyTorch's eager mode, with its autograd
BYTES_SHARE = 0.8  # of the memory's peak rate that plain kernels reach
LINK_SHARE = 0.7  # of the links between GPUs


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet, without sparsity."""

    name: str
    mebibytes: int
    """As its driver reports it, and with it the nodes' label nvidia.com/gpu.memory."""

    capability: tuple[int, int]
    flops: float
    """In 16 bits with float32 sums, a second."""

    single: float
    """The same in float32."""

    bandwidth: float
    """Bytes a second."""

    link: float
    """Bytes a second to the other GPUs of its machine."""

    attention: float
    """Share of the peak that FlashAttention 2 reaches, or what there is in its place."""

    def hardware(self, count: int = 1) -> Hardware:
        """So many of them in a pod."""
        return Hardware(gpus=count, gpu_memory_bytes=self.mebibytes << 20)

    def computes_in_16_bits(self, shape: Shape) -> bool:
        """Whether the trainer computes in 16 bits there, or in float32."""
        return number_type(self.capability, shape.model_type) != "float32"


H100 = Device("H100 SXM 80 GB", 81_559, (9, 0), 989e12, 67e12, 3.35e12, 450e9, 0.4)
L4 = Device("L4 24 GB", 23_034, (8, 9), 121e12, 30.3e12, 0.3e12, 32e9, 0.5)
DEVICES = (
    H100,
    Device("A100 SXM 80 GB", 81_920, (8, 0), 312e12, 19.5e12, 2.04e12, 300e9, 0.6),
    L4,
)
MODELS = {
    "1B": Shape("llama", 16, 2048, 2048, 512, 8192, 128_256, tied=True, head=64),
    "8B": Shape("llama", 32, 4096, 4096, 1024, 14_336, 128_256, tied=False, head=128),
    "70B": Shape("llama", 80, 8192, 8192, 1024, 28_672, 128_256, tied=False, head=128),
}
"""Of Llama 3.1 and 3.2."""


@dataclass(frozen=True)
class Setup:
    """What is trained, where, and how."""

    shape: Shape
    device: Device
    training: Training
    made: TrainingPlan
    tokens: int
    """Of one pass on one GPU, in rows of at most ROW."""

    gpus: int = 1
    liger: bool = False

    @property
    def recomputed(self) -> float:
        """Share of the layers whose forward pass is made a second time."""
        return 1 / self.made.recompute_every if self.made.gradient_checkpointing else 0

    @property
    def half(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.device.computes_in_16_bits(self.shape)

    @property
    def full(self) -> bool:
        """Whether all weights are trained, in float32, and computed with in `half`."""
        return self.training.method == "full"

    @property
    def adapter(self) -> int:
        """Parameters of the adapter."""
        return 0 if self.full else self.shape.adapter(self.training.lora)

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """Layers with an adapter, and their widths."""
        return {} if self.full else self.shape.targets(self.training.lora)


@dataclass(frozen=True)
class Cost:
    """Of one pass on one GPU."""

    seconds: float
    arithmetic: float
    """Seconds of it, as are the others."""

    bytes: float
    launches: float
    link: float
    tokens: int
    model_flops: float
    peak: float

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the device's peak that the model's own FLOPs are."""
        return self.model_flops / (self.seconds * self.peak)


def cost(setup: Setup) -> Cost:
    """The time of one pass, and what it is spent on."""
    device, shape = setup.device, setup.shape
    peak = device.flops if setup.half else device.single
    arithmetic = linear_flops(setup) / (peak * gemm_share(shape.hidden))
    arithmetic += attention_flops(setup) / (peak * device.attention)
    moved = (elementwise_bytes(setup) + weight_bytes(setup)) / (device.bandwidth * BYTES_SHARE)
    launches = count_launches(setup) * LAUNCH_SECONDS
    link = link_bytes(setup) / (device.link * LINK_SHARE)
    return Cost(
        seconds=max(arithmetic + moved, launches, link),
        arithmetic=arithmetic,
        bytes=moved,
        launches=launches,
        link=link,
        tokens=setup.tokens,
        model_flops=model_flops(setup),
        peak=peak,
    )


def gemm_share(hidden: int) -> float:
    """Share of the peak that cuBLAS reaches: 56% at a width of 2,048, 66% at 8,192."""
    return 0.7 * hidden / (hidden + 500)


def model_flops(setup: Setup) -> float:
    """What has to be computed once: 4 for a frozen weight and token (no gradient of its own), 6 for
    one that is trained, 6 x width for each pair of tokens that see each other, twice over."""
    shape, tokens = setup.shape, setup.tokens
    head, each = shape.vocabulary * shape.hidden, 6 if setup.full else 4
    attention = 6 * shape.layers * shape.query * min(ROW, tokens)
    weights = each * (shape.met + head * LABELS) + 6 * setup.adapter
    return float(tokens * (weights + attention))


def linear_flops(setup: Setup) -> float:
    """What is computed in matrix products: also again, for gradient checkpointing and the tiles of
    the output layer."""
    shape, tokens = setup.shape, setup.tokens
    head, each = shape.vocabulary * shape.hidden, 6 if setup.full else 4
    again = 2 * setup.recomputed * (shape.met + setup.adapter)
    weights = each * shape.met + (each + 2) * head * LABELS + 6 * setup.adapter
    return float(tokens * (weights + again))


def attention_flops(setup: Setup) -> float:
    """Two products forward, five backward, since the kernel keeps no scores; half is masked."""
    shape = setup.shape
    products = 7 + 2 * setup.recomputed
    row = min(ROW, setup.tokens)
    return float(products * shape.layers * shape.query * row * setup.tokens)


def elementwise_bytes(setup: Setup) -> float:
    """What norms, positions, the gate, sums and adapters read and write, twice that in float32.

    A norm of transformers is seven kernels, some in float32; Liger's is one. The same goes for
    rotary positions (ten, with the halves' swap) and the gate (two).
    """
    shape, liger = setup.shape, setup.liger
    norm_forward, norm_backward = (4, 6) if liger else (36, 72)
    turn_forward, turn_backward = (4, 4) if liger else (18, 24)
    gate_forward, gate_backward = (6, 10) if liger else (10, 16)
    turned = shape.query + shape.key_value
    forward = shape.norms * norm_forward * shape.hidden + turn_forward * turned
    forward += gate_forward * shape.mlp + 12 * shape.hidden
    backward = shape.norms * norm_backward * shape.hidden + turn_backward * turned
    backward += gate_backward * shape.mlp + 12 * shape.hidden
    dropout = 5 if setup.training.lora.dropout else 0
    for inputs, outputs in setup.targets.values():
        # A reads the input; B's output is written and added. Dropout is drawn again backward.
        forward += (2 + dropout) * inputs + 8 * outputs
        backward += (10 + 2 * dropout) * inputs + 4 * outputs
    layer = (1 + setup.recomputed) * forward + backward
    return float(setup.tokens * shape.layers * layer * (1 if setup.half else 2))


def weight_bytes(setup: Setup) -> float:
    """Each pass reads the weights twice; in 4 bits they are unpacked first, and written.

    Trained weights are cast once a pass, their gradients are added up in float32, and AdamW reads
    and writes three numbers each and the gradient once a step.
    """
    size, passes = 2 if setup.half else 4, 2 + setup.recomputed
    each = NF4 + 2 * size if setup.training.method == "qlora" else size
    moved = passes * each * setup.shape.linear
    if setup.full:
        cast = 4 + size if setup.half else 0
        step = 28 / setup.made.gradient_accumulation_steps
        moved += (cast + size + 8 + step) * setup.shape.parameters
    return moved


def count_launches(setup: Setup) -> float:
    """Kernels of a pass."""
    norm, turn, gate = (1, 1, 1) if setup.liger else (7, 10, 2)
    targets = len(setup.targets)
    # Seven products, attention, two sums; an adapter is a cast, dropout, two products and a sum.
    forward = setup.shape.norms * norm + turn + gate + 10 + 7 * targets
    if setup.training.method == "qlora":
        forward += 7
    return setup.shape.layers * forward * (3 + setup.recomputed)


def link_bytes(setup: Setup) -> float:
    """With FSDP each GPU gets the weights of the others, forward and backward."""
    if setup.made.parallelism != "fsdp":
        return 0
    passes = 2 + setup.recomputed
    size = 2 if setup.half else 4
    return passes * size * setup.shape.linear * (setup.gpus - 1) / setup.gpus


# --- The tables ----------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
CASES = (
    ("1B", "lora", 1),
    ("8B", "lora", 1),
    ("8B", "qlora", 1),
    ("70B", "qlora", 1),
    ("70B", "lora", 8),
)
SIZES = (256, 1024, 2048, 4096, 8192, 16_384)


def planned(shape: Shape, method: str, device: Device, gpus: int = 1) -> Setup | None:
    """What the planner makes of spec.training's defaults; None where nothing fits."""
    training = Training.model_validate({"method": method})
    hardware, half = device.hardware(gpus), device.computes_in_16_bits(shape)
    try:
        made = plan(training, shape, Lengths(ROW), hardware, half=half)
    except StageError:
        return None
    tokens = max(made.batch_size * ROW, made.pass_tokens or 0)
    return Setup(shape, device, training, made, tokens, gpus)


def devices_table() -> str:
    """One line for each model and GPU, in Markdown."""
    lines = [
        "| model | method | GPUs | tokens a pass | tokens/s each | MFU | with Liger | MFU | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for device in DEVICES:
        for model, method, gpus in CASES:
            begin = f"| {model} | {method} | {gpus} x {device.name} |"
            setup = planned(MODELS[model], method, device, gpus)
            if setup is None:
                lines.append(f"{begin} doesn't fit | | | | | |")
                continue
            plain, liger = cost(setup), cost(replace(setup, liger=True))
            again = f", {setup.recomputed:.0%} recomputed" if setup.recomputed else ""
            lines.append(
                f"{begin} {setup.tokens:,}{again} | {_speed(plain)} | {_speed(liger)} | "
                f"{_spent(liger)} |"
            )
    return "\n".join(lines)


def sizes_table() -> str:
    """How the size of a pass decides, for LoRA on one H100 that keeps all activations."""
    lines = [
        "| tokens a pass | 1B: tokens/s | MFU | with Liger | MFU | 8B: tokens/s | MFU | with Liger "
        "| MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    kept = TrainingPlan(batch_size=1, gradient_accumulation_steps=1, gradient_checkpointing=False)
    for tokens in SIZES:
        cells = [f"| {tokens:,}"]
        for model in ("1B", "8B"):
            setup = Setup(MODELS[model], H100, Training(), kept, tokens)
            cells += [_speed(cost(setup)), _speed(cost(replace(setup, liger=True)))]
        lines.append(" | ".join(cells) + " |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """The page with both tables as they are now."""
    for name, table in (("devices", devices_table()), ("sizes", sizes_table())):
        begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{table}{end}{rest.partition(end)[2]}"
    return page


def _speed(found: Cost) -> str:
    return f"{rounded(found.tokens_per_second)} | {found.mfu:.0%}"


def rounded(rate: float) -> str:
    """With two digits that say something."""
    return f"{float(f'{rate:.2g}'):,.0f}"


def _spent(found: Cost) -> str:
    """What the time goes for."""
    if found.seconds == found.link:
        return "GPUs' links"
    if found.seconds == found.launches:
        return "launches"
    return f"{found.bytes / found.seconds:.0%} bytes, rest arithmetic"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
