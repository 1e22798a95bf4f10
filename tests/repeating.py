"""A tiny model that says its last word again and again, and a drafter that knows it will: all drafts are accepted."""

import json

import torch
from safetensors.torch import load_file, save_file

from gemma_qat_kit.testing import write_tiny_checkpoint, write_tiny_drafter

_ADDING = ("o_proj.weight", "down_proj.weight", "experts.down_proj", "per_layer_projection.weight")


def write_repeating(folder, size):
    """Write the bf16 checkpoint and its folder `drafter`; return the checkpoint's folder.

    No layer adds anything, so what comes out is the embedding that went in, and the word most like it is itself. The
    drafter sees the same embeddings in fewer dimensions.
    """
    write_tiny_checkpoint(folder, size, "bf16")
    state = _silenced(folder)
    drafter = write_tiny_drafter(folder / "drafter", size)
    known, embeddings = _silenced(drafter), state["model.language_model.embed_tokens.weight"].float()
    seen = torch.randn(
        embeddings.shape[1], known["model.norm.weight"].numel(), generator=torch.Generator().manual_seed(0)
    )
    known["model.embed_tokens.weight"] = (embeddings @ seen).bfloat16()
    known["pre_projection.weight"] = torch.cat([seen.T, torch.zeros_like(seen.T)], 1).bfloat16().contiguous()
    save_file(known, drafter / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((drafter / "config.json").read_text())
    config["centroid_intermediate_top_k"] = config["num_centroids"]  # look at every word
    (drafter / "config.json").write_text(json.dumps(config))
    return folder


def _silenced(folder):
    """Let the layers of a checkpoint add nothing, and return its tensors."""
    state = load_file(folder / "model.safetensors")
    for name in state:
        if name.endswith(_ADDING):
            state[name] = torch.zeros_like(state[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state
