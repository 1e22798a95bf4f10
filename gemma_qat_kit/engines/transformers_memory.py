"""What a model in transformers holds, tensor by tensor: on the GPU, in RAM, or as pages of its file."""

from collections.abc import Iterator

import torch

from gemma_qat_kit.engines.resident import FilePages, file_pages
from gemma_qat_kit.memory.measure_process import ProcessMemory, process_memory
from gemma_qat_kit.memory.parts import ACTIVATIONS, DRAFTER, ENGINE, TABLE, Part, merged
from gemma_qat_kit.memory.weights import part_of


def measured_parts(model: torch.nn.Module, drafter: torch.nn.Module | None, device: torch.device) -> tuple[Part, ...]:
    """Return the weights by component, and all else that this process holds as the engine.

    A tensor that lies in its file counts as far as the file's pages are in RAM; that of the per-layer table also as
    left on disk. On a GPU, what torch's allocator holds beside the weights are the activations.
    """
    weights = list(_weights(model, drafter, file_pages()))
    held = process_memory(children=False) or ProcessMemory(0, 0)
    rest = [Part(ENGINE, max(0, nbytes - _in_place(weights, place)), place)
            for place, nbytes in (("ram", held.ram), ("mapped", held.mapped))]  # fmt: skip
    if device.type == "cuda":
        allocated = torch.cuda.memory_reserved(device)
        rest.append(Part(ACTIVATIONS, max(0, allocated - _in_place(weights, "gpu")), "gpu"))
    return merged([*weights, *rest])


def _in_place(parts: list[Part], place: str) -> int:
    return sum(part.nbytes for part in parts if part.place == place)


def _weights(model: torch.nn.Module, drafter: torch.nn.Module | None, pages: FilePages) -> Iterator[Part]:
    """Yield a part per tensor; tensors that share their memory count once."""
    seen, mapped = set(), []
    for name, tensor in _tensors(model, drafter):
        if tensor.is_meta or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if tensor.device.type != "cpu":
            yield Part(name, tensor.nbytes, "gpu")
        elif pages.at(tensor.data_ptr()) is None:
            yield Part(name, tensor.nbytes, "ram")
        else:
            mapped.append((name, tensor))
            if name == TABLE:
                yield Part(name, tensor.nbytes, "disk")
    resident = pages.resident_bytes((tensor.data_ptr(), tensor.nbytes) for _, tensor in mapped)
    for (name, _), nbytes in zip(mapped, resident, strict=True):
        yield Part(name, nbytes, "mapped", is_spare=name == TABLE)


def _tensors(model: torch.nn.Module, drafter: torch.nn.Module | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor with the part that it belongs to."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield part_of(name), tensor
    if drafter is not None:
        yield from ((DRAFTER, tensor) for tensor in (*drafter.parameters(), *drafter.buffers()))
