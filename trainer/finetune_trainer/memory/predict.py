"""How many bytes a training takes at its peak, term by term.

A pass of T tokens keeps, for the backward pass, what autograd saves of every layer: `kept_by_layer`
counts it exactly (tests/unit/trainer/test_memory_activations.py compares it with autograd). With
gradient checkpointing only each layer's input is kept, and one layer at a time is computed again.
The terms' peaks are summed although they do not all coincide, so the sum errs on the safe side.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from finetune_trainer.contract import Lora, Training
from finetune_trainer.model.shape import Shape

NF4 = 0.516  # bytes a weight: 4 bits, and 0.127 bits of doubly quantized scales (QLoRA, section 3)
NF4_SCALES = NF4 - 0.5
FLOAT32 = 4  # bytes
GPU_OVERHEAD = 600_000_000  # CUDA context, cuBLAS workspace, fragments; fitted on published tables
CPU_OVERHEAD = 600_000_000  # Python, torch, transformers and TRL; benchmarks/memory.py
FULL_LOGITS = 15  # bytes per token and word of the vocabulary; fitted on published tables
CPU_LOGITS = 12.5  # logits, their logarithms and both gradients, in float32; measured
CPU_HEAP = 1.4  # what the C allocator holds for what is in use; benchmarks/memory.py
MASKED_TOKENS = 4096  # in a packed pass whose rows are kept apart by a mask, on a GPU, at most
ROUTING = 40  # bytes for each pair of token and expert: three places, its rank, weights, a mask
TILE_TOKENS, TILE_WORDS = 4096, 32_768  # TRL computes the loss in tiles of this size


class Head(StrEnum):
    """How logits and loss are computed."""

    FULL = "full"
    """All logits at once, as transformers does."""

    TILED = "tiled"
    """Tile by tile, in the forward and again in the backward pass, as TRL does on a GPU."""

    LABELS = "labels"
    """All at once, in float32, but only where there is a label: this trainer on a CPU."""


class Kept(StrEnum):
    """What the forward pass keeps of a layer for the backward pass."""

    ALL = "all"
    INPUTS = "inputs"
    """Gradient checkpointing."""

    NOTHING = "nothing"
    """Gradient checkpointing whose inputs go to the host's memory."""


@dataclass(frozen=True)
class Recipe:
    """What decides on the memory, apart from model and batch. Sizes are bytes an element."""

    lora: Lora
    full: bool = False
    """Whether the model itself is trained, in float32, computing in `compute` under autocast."""

    quantized: bool = False
    compute: int = 2
    """Of 16-bit or 32-bit weights, and of activations."""

    adapter: int = 4
    """Of the adapter's weights, gradients and both of AdamW's moments."""

    embedding: int = 2
    mask: int = 1
    """Of dropout's mask."""

    kept: Kept = Kept.INPUTS
    recompute_every: int = 1
    """With gradient checkpointing: one of so many layers keeps its input alone."""

    head: Head = Head.TILED
    overhead: int = GPU_OVERHEAD
    shards: int = 1
    """Devices that the weights are spread over (FSDP)."""

    buckets: bool = False
    """Whether gradients are copied to be exchanged, as DDP does."""

    rows: int = 1
    """In a pass."""

    packed: bool = False
    """Whether several rows lie end to end, kept apart by a mask of tokens x tokens (on a CPU they
    are attended to one by one; with FlashAttention 2 on a GPU there is no mask either)."""

    heap: float = 1.0
    """Bytes that the allocator holds for each byte of activations."""

    casts: bool = True
    """Whether each adapter copies its input to its own type, as PEFT does by itself."""

    redraws: bool = False
    """Whether dropout is drawn again in the backward pass, and neither mask nor values are kept."""

    @classmethod
    def on_gpu(
        cls,
        training: Training,
        *,
        checkpointing: bool,
        recompute_every: int = 1,
        shards: int = 1,
        buckets: bool = False,
        half: bool = True,
    ) -> Self:
        """This trainer's on a GPU: 16 bits where it computes in them (`half`), else float32."""
        quantized = training.method == "qlora"
        compute = 2 if half else 4
        return cls(
            lora=training.lora,
            full=training.method == "full",
            quantized=quantized,
            compute=compute,
            embedding=compute,
            kept=Kept.INPUTS if checkpointing else Kept.ALL,
            recompute_every=recompute_every,
            shards=shards,
            buckets=buckets,
            casts=False,
            # Unsloth has its own way, and DoRA is no plain adapter.
            redraws=half and not training.lora.use_dora and training.engine != "unsloth",
        )

    @classmethod
    def on_cpu(
        cls,
        training: Training,
        *,
        checkpointing: bool,
        recompute_every: int = 1,
        half: bool = False,
    ) -> Self:
        """This trainer's on a CPU: float32, or bfloat16 where it has the instructions."""
        quantized = training.method == "qlora"
        compute = 2 if half else 4
        return cls(
            lora=training.lora,
            full=training.method == "full",
            quantized=quantized,
            compute=compute,
            embedding=compute,
            mask=compute,  # on a CPU the mask has the type of what it masks
            kept=Kept.INPUTS if checkpointing else Kept.ALL,
            recompute_every=recompute_every,
            head=Head.LABELS,
            overhead=CPU_OVERHEAD,
            heap=CPU_HEAP,
            casts=False,
        )


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak, on each device."""

    weights: int
    adapter: int
    """The adapter with its gradients and the optimizer's state. With full fine-tuning it is the
    gradients and the optimizer's state of the weights."""

    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.logits + self.overhead


def predict(shape: Shape, recipe: Recipe, tokens: int, labels: int | None = None) -> Prediction:
    """The peak of a pass over `tokens` tokens, `labels` of which are learnt (None: all of them)."""
    return Prediction(
        weights=round(weights(shape, recipe)),
        adapter=round(adapter(shape, recipe)),
        activations=round(
            recipe.heap
            * (tokens * activations_per_token(shape, recipe) + scores(shape, recipe, tokens))
            + mask(recipe, tokens)
            + adapted_experts(shape, recipe)
        ),
        logits=round(logits(shape, recipe, tokens if labels is None else labels)),
        overhead=recipe.overhead,
    )


def weights(shape: Shape, recipe: Recipe) -> float:
    """The frozen model; QLoRA holds the linear layers in 4 bits, embeddings and norms in full.

    Experts are no linear layers to bitsandbytes, and stay as they are.
    """
    if recipe.full:
        return _trained_weights(shape, recipe)
    rest = (shape.embedding + shape.other) * recipe.embedding
    linear, alone = float(shape.linear * recipe.compute), 0.0
    if recipe.quantized:
        # Each layer's weights are unpacked for its matrix product, the largest one at a time.
        # Scales belong to no parameter, so that FSDP leaves all of them on each device.
        widest = shape.query if shape.experts else max(shape.mlp, shape.query)
        unpacked = shape.hidden * widest * recipe.compute
        small = shape.linear - shape.all_experts
        linear = 0.5 * small + recipe.compute * shape.all_experts
        alone = NF4_SCALES * small + unpacked
    if recipe.shards == 1:
        return linear + alone + rest
    # FSDP gathers the layer at work and the one after it; embeddings stay gathered in a pass.
    return (linear + rest) / recipe.shards + 2 * linear / shape.layers + rest + alone


def model_on_host(shape: Shape, recipe: Recipe) -> int:
    """Bytes of the pod's memory that a model takes on its way to GPUs that share it (FSDP).

    The first process reads the weights for all. In 4 bits each process reads them for itself.
    """
    if not recipe.quantized:
        return recipe.compute * shape.parameters
    rest = (shape.embedding + shape.other) * recipe.embedding
    rest += recipe.compute * shape.all_experts
    return round(recipe.shards * (NF4 * (shape.linear - shape.all_experts) + rest))


def _trained_weights(shape: Shape, recipe: Recipe) -> float:
    """Float32, and what autocast makes of it for the compute type, which stays for a whole pass.

    FSDP gathers in the compute type: the layer at work, the one after it, and the embeddings.
    """
    head = shape.vocabulary * shape.hidden
    if recipe.shards > 1:
        gathered = 2 * shape.linear / shape.layers + shape.embedding
        return FLOAT32 * shape.parameters / recipe.shards + recipe.compute * gathered
    # Experts are computed in float32: autocast doesn't know their products.
    cast = shape.linear - shape.all_experts + head
    copy = recipe.compute * cast if recipe.compute != FLOAT32 else 0
    return FLOAT32 * shape.parameters + copy


def _gradients_and_moments(shape: Shape, recipe: Recipe) -> float:
    """Three numbers a weight. The largest weight's gradient exists twice while it is added up."""
    whole = 3.0 * FLOAT32 * shape.parameters
    if recipe.shards > 1:
        # A layer's gradients, and those of the embeddings, are whole until they are shared out.
        layer = shape.linear / shape.layers + shape.embedding
        return whole / recipe.shards + (FLOAT32 + recipe.compute) * layer
    copies = shape.parameters if recipe.buckets else shape.vocabulary * shape.hidden
    return whole + FLOAT32 * copies


def adapter(shape: Shape, recipe: Recipe) -> float:
    """Weights, gradients and AdamW's two moments; autocast adds a copy in the compute type."""
    if recipe.full:
        return _gradients_and_moments(shape, recipe)
    copy = recipe.compute if recipe.adapter != recipe.compute else 0
    kept = shape.adapter(recipe.lora) * (4 * recipe.adapter / recipe.shards + copy)
    return kept + (_norms_of_dora(shape, recipe) if recipe.lora.use_dora else 0)


def _norms_of_dora(shape: Shape, recipe: Recipe) -> float:
    """PEFT multiplies the adapter with an identity, and adds it to the layer's weight, in float32.

    One layer at a time. Measured on a CPU with PEFT 0.21: the identity, and 3.0 weights where they
    are float32, 2.6 to 3.9 where they are bfloat16.
    """
    widths = shape.targets(recipe.lora).values()
    return max(4.0 * inputs * (inputs + 4 * outputs) for inputs, outputs in widths)


def activations_per_token(shape: Shape, recipe: Recipe) -> float:
    """What the forward pass keeps, and the backward pass of one layer on top of it."""
    layer, size = kept_by_layer(shape, recipe), recipe.compute
    # Gradients in flight: of gate, up and their product, and of the residual in float32.
    backward = 3 * size * shape.mlp + 2 * 4 * shape.hidden
    outside = (4 + 2 * size) * shape.hidden  # embedding and last norm
    again = recomputed_layers(shape, recipe)
    if not again:
        return outside + shape.layers * layer + backward
    stream = FLOAT32 if recipe.full else size  # under autocast the layers hand on float32
    inputs = again * stream * shape.hidden if recipe.kept is Kept.INPUTS else 0
    return outside + inputs + (shape.layers - again + 1) * layer + backward


def recomputed_layers(shape: Shape, recipe: Recipe) -> int:
    """Layers whose activations are computed again: the first one and each `recompute_every`-th."""
    return 0 if recipe.kept is Kept.ALL else -(-shape.layers // recipe.recompute_every)


def scores(shape: Shape, recipe: Recipe, tokens: int) -> int:
    """What attention keeps that computes all scores (Gemma 2, which caps them; gpt-oss's sinks).

    For each head and pair of tokens of a row, or of a packed pass: the capped score, the
    probability in float32, and once more in the compute type where that is another; with sinks the
    probability alone, in float32 where autocast is on. One layer has as much again while its
    gradient is computed.
    """
    if not (shape.capped or shape.sinks):
        return 0
    pairs = tokens * tokens if recipe.packed else tokens * tokens // recipe.rows
    size = recipe.compute
    each = 4 + size + (size if size < 4 else 0)
    if shape.sinks:
        each = size + (FLOAT32 if recipe.full and size < FLOAT32 else 0)
    again = recomputed_layers(shape, recipe)
    layers = shape.layers - again + (1 if again else 0)
    return (layers + 1) * each * (shape.query // shape.head) * pairs


def mask(recipe: Recipe, tokens: int) -> int:
    """A packed pass's mask: a byte for each pair of tokens, and once more as a number to add.

    Larger passes have none: they are made only for attention that needs no mask.
    """
    pairs = min(tokens, MASKED_TOKENS) ** 2
    return (1 + recipe.compute) * pairs if recipe.packed else 0


def kept_by_layer(shape: Shape, recipe: Recipe) -> float:
    """Bytes a token that autograd saves in one layer, with attention that keeps no matrix.

    A frozen linear layer saves nothing. A norm saves its input in float32; attention its query,
    key, value and output; the gated MLP gate, its activation, and up. A mixture's experts do so for
    each token that goes through them.
    """
    size = recipe.compute
    total = 4.0 * shape.norms * shape.hidden
    total += size * (2 * shape.query + 2 * shape.key_value)
    total += _kept_by_experts(shape, recipe) if shape.experts else 3 * size * shape.mlp
    if shape.sinks:
        # Key and value are repeated for every head.
        total += 2 * size * (shape.query - shape.key_value)
    if shape.qk_norm:
        total += 4 * (shape.query + shape.key_value)
    if shape.fused:
        # The value is a part of the fused layer's output, which is kept as a whole.
        total += size * (shape.query + shape.key_value)
    return total + (_kept_for_weights if recipe.full else _kept_by_adapters)(shape, recipe)


def _kept_by_experts(shape: Shape, recipe: Recipe) -> float:
    """Bytes a token in one layer: gate, its activation and up; the outputs, for the gradient of
    their weights; and these weights with the places of the tokens.

    gpt-oss limits gate and up, and so has three more. A gradient of an expert's matrix takes its
    input: of each pair of token and expert.
    """
    size = FLOAT32 if recipe.full else recipe.compute
    outputs = shape.active * shape.hidden
    values = (6 if shape.sinks else 3) * shape.mlp + outputs
    trained = {"gate_up_proj", "down_proj"} if recipe.full else shape.expert_targets(recipe.lora)
    values += outputs if "gate_up_proj" in trained else 0
    values += shape.mlp if "down_proj" in trained else 0
    return size * values + ROUTING * shape.active + FLOAT32 * shape.experts


def adapted_experts(shape: Shape, recipe: Recipe) -> int:
    """What adapters of experts keep whatever the pass: PEFT adds each to all of a layer's experts.

    The sums stay for the backward pass of the layer. One layer has a matrix's product and its
    gradient besides.
    """
    if recipe.full or not shape.expert_targets(recipe.lora):
        return 0
    third = recipe.compute * shape.all_experts // shape.layers // 3  # gate, up and down are alike
    parts = {"gate_up_proj": 2, "down_proj": 1}
    sums = [parts[name] * third for name in shape.expert_targets(recipe.lora)]
    again = recomputed_layers(shape, recipe)
    layers = shape.layers - again + (1 if again else 0)
    return layers * sum(sums) + 2 * max(sums)


def _kept_for_weights(shape: Shape, recipe: Recipe) -> float:
    """The gradient of a weight takes the layer's input; a norm's, what it has normalised.

    Autocast casts the input once for each layer that reads it. Attention's output, the input of
    o_proj, is saved already (not where query, key and value are parts of one layer's output).
    """
    size = recipe.compute
    total = 4.0 * shape.norms * shape.hidden
    total += 0 if shape.experts else size * shape.mlp
    if shape.qk_norm:
        # Gemma multiplies what it has normalised in float32, Qwen in the compute type.
        normalised = FLOAT32 if shape.model_type.startswith("gemma") else size
        total += normalised * (shape.query + shape.key_value)
    if shape.fused:
        total += size * shape.query
    # Of the hidden states: q, k, v; gate, up; or in their place what chooses the experts.
    readers = 2 if shape.fused or size == FLOAT32 else 4 if shape.experts else 5
    return total + size * readers * shape.hidden


def _kept_by_adapters(shape: Shape, recipe: Recipe) -> float:
    """Each adapter saves its input and its inner product of `r` elements.

    Inputs are shared between layers only where neither dropout nor a cast makes a copy of each;
    that of o_proj, attention's output, is then saved already (not where query, key and value are
    parts of one layer's output). For its magnitudes DoRA keeps the outputs of layer and adapter.
    """
    size, lora = recipe.compute, recipe.lora
    dropout = recipe.mask if lora.dropout > 0 and not recipe.redraws else 0
    copies = dropout or (recipe.casts and recipe.adapter != recipe.compute)
    total = 0.0
    seen = set() if shape.fused else {"o_proj"}
    for name, (width, outputs) in shape.targets(lora).items():
        total += lora.r * size
        total += 2 * outputs * size if lora.use_dora else 0
        shared = _INPUT.get(name, name)
        if copies or shared not in seen:
            total += width * (size + dropout)
        seen.add(shared)
    return total


_INPUT = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "qkv_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "gate_up_proj": "mlp",
}


def logits(shape: Shape, recipe: Recipe, labels: int) -> float:
    """The output layer and the loss."""
    if recipe.head is Head.FULL:
        return FULL_LOGITS * shape.vocabulary * labels
    if recipe.head is Head.LABELS:
        return CPU_LOGITS * shape.vocabulary * labels
    tile = min(labels, TILE_TOKENS) * min(shape.vocabulary, TILE_WORDS) * recipe.compute
    # The hidden states at the labels, and their gradient in float32 and in the compute type.
    return tile + labels * shape.hidden * (4 + 2 * recipe.compute)
