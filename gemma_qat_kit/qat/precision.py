"""In which dtype to train: the fastest that this device really computes in, as long as this model's numbers fit it."""

import time
from contextlib import nullcontext

import torch
from torch import nn

_GAIN = 1.2  # a narrower dtype that is hardly faster is not worth its digits
_SIZE, _ROUNDS = {"cuda": 1024}, 3  # 512 elsewhere
_ENOUGH = 0.1  # seconds: a processor without bfloat16 takes 3 for a product of 1024


def choose_dtype(module: nn.Module, asked: str, window: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in; a model that was loaded in 16 bits keeps its own.

    Args:
        module: The model, whose masters are float32 whatever comes of this.
        asked: One of `settings.DTYPES`.
        window: Token ids (tokens,) that a narrow dtype has to answer with finite numbers.
    """
    own = own_dtype(module)
    if own != torch.float32:
        return own
    if asked != "auto":
        return getattr(torch, asked)
    device = module.device
    seconds = {dtype: _matmul_seconds(dtype, device) for dtype in _available(device)}
    for dtype in sorted(seconds, key=seconds.__getitem__):
        if dtype == torch.float32 or seconds[dtype] * _GAIN > seconds[torch.float32]:
            return torch.float32
        with torch.no_grad(), autocast(device, dtype):
            if torch.isfinite(module(window[None].to(device), use_cache=False).logits).all():
                return dtype
    return torch.float32


def own_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of what is not trained, in which a model was loaded."""
    frozen = (p.dtype for p in module.parameters() if not p.requires_grad)
    return next(frozen, torch.float32)


def autocast(device: torch.device, dtype: torch.dtype):
    """Return a context in which matrix products of float32 tensors are computed in a dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _available(device: torch.device) -> list[torch.dtype]:
    if device.type != "cuda":
        return [torch.float32, torch.bfloat16]
    has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8  # older ones only emulate it
    return [torch.float32, torch.bfloat16 if has_bfloat16 else torch.float16]


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Return the least of a few times that a product of two square matrices takes."""
    size = _SIZE.get(device.type, 512)
    a = torch.ones(size, size, dtype=dtype, device=device)
    times: list[float] = []
    while len(times) <= _ROUNDS and sum(times) < _ENOUGH:
        started = time.perf_counter()
        torch.matmul(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:] or times)  # the first one warms up
