"""float16 for Gemma on a GPU without bfloat16: the sums that do not fit it are kept in float32.

float16 ends at 65,504, and the sums of the MLPs' `down_proj` in Gemma's early layers are larger. A GPU adds them up in
float32 and loses them when it rounds the result; so `down_proj` gets its inputs 64 times smaller, its result is
multiplied in float32, and the norm behind it, which computes in float32 anyway, brings it back to float16. The experts
of a mixture are one module: what comes out of their activation function is smaller, and so is all that follows.
"""

import torch
from torch import nn

_SMALLER = 64  # a power of two: no digit changes
_NORMS = ("post_feedforward_layernorm_1", "post_feedforward_layernorm")  # of a mixture, and of all others
_EXPERTS_NORM = "post_feedforward_layernorm_2"
_HANDLES = "_gqk_half"


def keep_sums_in_float32(module: nn.Module) -> None:
    """Do so in a model in place, and once more where linears have been replaced; other networks stay as they are."""
    for part in module.modules():
        for handle in part.__dict__.pop(_HANDLES, ()):
            handle.remove()
    for layer in list(module.modules()):
        norms = [getattr(layer, name) for name in _NORMS if hasattr(layer, name)]
        if norms and hasattr(layer, "mlp"):
            down = layer.mlp.down_proj
            _hook(down, down.register_forward_pre_hook(_smaller), down.register_forward_hook(_larger))
            _hook(norms[0], norms[0].register_forward_hook(_as_before))
        if norms and hasattr(layer, "experts"):
            activation, experts, norm = layer.experts.act_fn, layer.experts, getattr(layer, _EXPERTS_NORM)
            _hook(activation, activation.register_forward_hook(_smaller_after))
            _hook(experts, experts.register_forward_hook(_larger))
            _hook(norm, norm.register_forward_hook(_as_before))


def _hook(part: nn.Module, *handles) -> None:
    part.__dict__[_HANDLES] = handles


def _smaller(part: nn.Module, inputs: tuple) -> tuple:
    return (inputs[0] / _SMALLER, *inputs[1:])


def _smaller_after(part: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output / _SMALLER


def _larger(part: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.float() * _SMALLER


def _as_before(norm: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.to(norm.weight.dtype)
