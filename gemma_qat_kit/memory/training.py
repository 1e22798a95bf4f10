"""What training takes beside the weights: gradients, optimizer, adapters, and what the backward pass needs kept.

The counts are those of transformers' layers under torch's autograd: a linear keeps its input where its weight or an
adapter beside it is trained, a norm its input in float32, attention its queries, keys, values and output.
"""

from gemma_qat_kit.memory.network import Layer, Network, find_network
from gemma_qat_kit.memory.parts import (
    ACTIVATIONS,
    ADAPTERS,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    TEACHER,
    TEXT_LAYERS,
    Part,
    merged,
)
from gemma_qat_kit.memory.settings import OPTIMIZERS, SMALL_WEIGHTS, MemorySettings

_LOSS_BYTES = 12  # per logit: in float32 itself, its log-probability and its gradient
FLOAT32 = 4
ADAPTED_CHUNK = 2**22  # weights of a matrix in Q4_0 blocks that are adapted at once
_ADAPTED_BYTES = 16  # of each of them: blocks as float32, with the adapter, on the grid, and rounded


def training_parts(settings: MemorySettings) -> list[Part]:
    """Return adapters, gradients, optimizer, activations and logits at the peak of a training step.

    A CPU with room to spare keeps what a step has freed for the next one (`engines.allocator`): with QAT of SmolLM2 and
    72 steps of 512 tokens that was 1.4 GiB, as much as activations and logits take.
    """
    place, network = settings.place, find_network(settings)
    num_tokens = settings.batch_size * settings.sequence_length
    trained, adapters = num_trained(settings), settings.task == "finetune"
    chunk = min(num_tokens, settings.logits_chunk_length or num_tokens)
    parts = {
        ADAPTERS: FLOAT32 * trained if adapters else 0,
        OPTIMIZER: OPTIMIZERS[settings.optimizer] * trained,
        GRADIENTS: FLOAT32 * trained,
        ACTIVATIONS: kept_bytes(network, settings),
        LOGITS: _LOSS_BYTES * network.vocab * chunk,
    }
    if settings.is_packed:
        parts[ACTIVATIONS] += unpacked_bytes(network, settings)
    if settings.gradient_accumulation == 1:
        _leave_out_what_never_meets(parts, network, settings)
    if place == "ram":  # a CPU's kernels pack the head's matrix anew; one float32 of each logit is there at that time
        others = parts[LOGITS] * (_LOSS_BYTES - FLOAT32) // _LOSS_BYTES
        parts[ACTIVATIONS] += max(0, compute_bytes(settings) * network.vocab * network.hidden - others)
    if _is_small(network, settings):  # an evaluation holds the values of all blocks
        parts[ACTIVATIONS] = max(parts[ACTIVATIONS], compute_bytes(settings) * _num_in_linears(network))
    found = [Part(name, nbytes, place) for name, nbytes in parts.items()] + _teacher_parts(settings, trained)
    if place == "ram":
        found.append(Part(ACTIVATIONS, parts[ACTIVATIONS] + parts[LOGITS], place, is_spare=True))
    return found


def _teacher_parts(settings: MemorySettings, trained: int) -> list[Part]:
    """Return the weights before quantization, in the dtype of the file, and the best codes, a byte each in RAM."""
    if settings.task != "qat":
        return []
    kept = (FLOAT32 if settings.format == "float32" else 2) * trained if settings.teacher == "memory" else 0
    return list(merged([Part(TEACHER, kept, settings.place), Part(TEACHER, trained, "ram")]))


def _leave_out_what_never_meets(parts: dict[str, int], network: Network, settings: MemorySettings) -> None:
    """Keep the larger of two moments: the end of the forward pass, before there are gradients, or of the backward
    pass, when all are there and the activations of one layer."""
    one_layer = max(layer_bytes(network, layer, settings) for layer in network.layers)
    if parts[ACTIVATIONS] + parts[LOGITS] > parts[GRADIENTS] + one_layer:
        parts[GRADIENTS] = 0
    else:
        parts[ACTIVATIONS], parts[LOGITS] = one_layer, 0


def num_trained(settings: MemorySettings) -> int:
    """Return how many values are trained: those of the adapters, or attention's and the MLPs' matrices."""
    network = find_network(settings)
    shapes = [
        shape
        for layer in network.layers
        for name, shape in linears(network, layer).items()
        if settings.task == "qat" or name in settings.lora_targets
    ]
    if settings.task == "qat":
        return sum(out * into for out, into in shapes)
    return sum(settings.lora_rank * (out + into) for out, into in shapes)


def linears(network: Network, layer: Layer) -> dict[str, tuple[int, int]]:
    """Return the (out, in) shapes of a layer's linears by name; experts and per-layer gates are not among them."""
    shapes = {"q_proj": (layer.query, network.hidden), "o_proj": (network.hidden, layer.query)}
    if not layer.is_shared:
        shapes["k_proj"] = (layer.key, network.hidden)
        if layer.has_values:
            shapes["v_proj"] = (layer.key, network.hidden)
    shapes |= dict.fromkeys(("gate_proj", "up_proj"), (layer.mlp, network.hidden))
    return shapes | {"down_proj": (network.hidden, layer.mlp)}


def kept_bytes(network: Network, settings: MemorySettings) -> int:
    """Return the bytes that the forward pass keeps for the backward pass."""
    num_tokens = settings.batch_size * settings.sequence_length
    value = compute_bytes(settings)
    per_layer = network.per_layer * len(network.layers) * (FLOAT32 + 2 * value) * num_tokens
    layers = [layer_bytes(network, layer, settings) for layer in network.layers]
    if settings.gradient_checkpointing:
        return per_layer + len(layers) * network.hidden * value * num_tokens + max(layers)
    return per_layer + sum(layers)


def layer_bytes(network: Network, layer: Layer, settings: MemorySettings) -> int:
    """Return the bytes that one layer keeps when all of it is computed."""
    value, length = compute_bytes(settings), settings.sequence_length
    num_norms = 5 if network.per_layer else 4 if network.is_gemma else 2
    norms = FLOAT32 * network.hidden * num_norms
    inputs = value * network.hidden * 2
    mlp = value * 4 * (layer.mlp + layer.experts) + value * 2 * layer.num_experts * network.hidden
    attention = value * (2 * layer.query + 2 * layer.key)
    if network.is_gemma:
        attention += FLOAT32 * (layer.query + 2 * layer.key)
    mask = value * length if network.is_gemma else 0
    copies = _adapter_inputs(network, layer, settings) if value < FLOAT32 else 0
    total = (norms + inputs + mlp + attention + mask + copies) * settings.batch_size * length
    keeps_values = settings.task == "qat" or _is_small(network, settings)
    return total + (_fake_quantized_bytes(network, layer) if keeps_values else 0)


def _is_small(network: Network, settings: MemorySettings) -> bool:
    """Tell whether the backward pass finds the values of a packed model's weights still there."""
    return settings.is_packed and _num_in_linears(network) <= SMALL_WEIGHTS


def _num_in_linears(network: Network) -> int:
    return sum(out * into for layer in network.layers for out, into in linears(network, layer).values())


def _adapter_inputs(network: Network, layer: Layer, settings: MemorySettings) -> int:
    """Return the bytes per token of what adapters in float32 keep: each a copy of its 16-bit input."""
    if settings.task != "finetune":
        return 0
    adapted = (into for name, (_, into) in linears(network, layer).items() if name in settings.lora_targets)
    return FLOAT32 * sum(adapted)


def _fake_quantized_bytes(network: Network, layer: Layer) -> int:
    """Return the bytes of a layer's weights as the grid has them, which the backward pass multiplies with."""
    return FLOAT32 * sum(out * into for out, into in linears(network, layer).values())


def unpacked_bytes(network: Network, settings: MemorySettings) -> int:
    """Return the bytes of the largest matrix of the layers out of its Q4_0 blocks, and of what is adapted at once."""
    largest = max(out * into for layer in network.layers for out, into in linears(network, layer).values())
    return compute_bytes(settings) * largest + _ADAPTED_BYTES * ADAPTED_CHUNK


def compute_bytes(settings: MemorySettings) -> int:
    """Return the bytes of a value in the computation: float32 where weights are trained in it, else 16 bits."""
    return FLOAT32 if settings.task == "qat" or settings.format == "float32" else 2


def trained_weights(settings: MemorySettings) -> list[Part]:
    """Return what the text layers' matrices take beyond their 16-bit file once they are trained in float32."""
    if settings.task != "qat" or settings.format == "float32":
        return []
    return [Part(TEXT_LAYERS, FLOAT32 * num_trained(settings), settings.place)]
