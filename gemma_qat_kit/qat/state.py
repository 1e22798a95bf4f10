"""What a training run needs to go on exactly where it was, in one safetensors file that is whole or not there."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from gemma_qat_kit.errors import BadSettingError, BrokenCheckpointError, NotEnoughDiskError
from gemma_qat_kit.qat.fake_quantizer import masters
from gemma_qat_kit.units import readable_bytes

_NAME = "qat_checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model as it is now, small: codes of a byte and scales, from which `restore` makes it again."""
    kept = {}
    for name, (master, quantizer) in masters(module).items():
        kept[f"{name}.codes"] = quantizer.grid.codes(master.detach(), quantizer.scale.detach()).cpu()
        kept[f"{name}.scale"] = quantizer.scale.detach().cpu().clone()
    ranges = {name: p for name, p in trained(module).items() if name.endswith("_range.scale")}
    return kept | {name: p.detach().cpu().clone() for name, p in ranges.items()}


@torch.no_grad()
def restore(module: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    """Put a snapshot back in place: masters lie on their grid then, so the model's values are those of the snapshot."""
    for name, (master, quantizer) in masters(module).items():
        quantizer.scale.copy_(kept[f"{name}.scale"])
        codes = kept[f"{name}.codes"].to(master.device).float()
        step = quantizer.grid.stored_scale(quantizer.scale)[..., None]
        master.copy_((codes.unflatten(-1, (quantizer.scale.shape[-1], -1)) * step).flatten(-2))
        quantizer.has_moved = True
    for name, parameter in trained(module).items():
        if name.endswith("_range.scale"):
            parameter.copy_(kept[name])


def fingerprint(module: nn.Module) -> str:
    """Return what tells this model, on these grids and before training, from every other."""
    digest = hashlib.sha256()
    for name, (master, quantizer) in masters(module).items():
        before = master.detach() if quantizer.reference is None else quantizer.reference
        sample = before.flatten()[:: max(1, before.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(master.shape)} {quantizer.grid}".encode() + sample.numpy().tobytes())
    digest.update(" ".join(trained(module)).encode())
    return digest.hexdigest()[:16]


class Checkpoints:
    """The checkpoint of one run in a folder.

    Args:
        folder: Where it lies; made if it does not exist.
        module: A prepared model.
        mark: Its fingerprint before training.
        settings: Of the run: all of `TrainSettings`, and "text" and "teacher".
    """

    def __init__(self, folder: Path, module: nn.Module, mark: str, settings: dict):
        self.path, self._module = Path(folder).expanduser() / _NAME, module
        self._facts = {"model": mark, "settings": json.loads(json.dumps(settings))}

    def check_room(self) -> None:
        """Refuse a disk that has no room for two checkpoints, since the old one stays until the new one is whole.

        Raises:
            NotEnoughDiskError: With what is needed and what is free.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
        except OSError as err:
            raise self._no_room(str(err.strerror or err)) from err
        values = sum(p.numel() for p in trained(self._module).values())
        needed = 14 * values * (1 if self.path.exists() else 2)  # master, two moments, and the best codes
        if free < needed:
            raise self._no_room(f"{readable_bytes(free)} free, {readable_bytes(needed)} needed")

    def save(self, step: int, optimizer: torch.optim.Optimizer, best: dict, history: dict) -> None:
        """Write everything; an earlier checkpoint is replaced when the new one is whole.

        Raises:
            NotEnoughDiskError: The disk does not take it; the earlier one is still there.
        """
        names = trained(self._module)
        tensors = {f"now.{name}": p.detach().cpu().contiguous() for name, p in names.items()}
        for name, parameter in names.items():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": state[key].cpu().contiguous() for key in _MOMENTS if key in state}
        tensors |= {f"best.{name}": value.contiguous() for name, value in best.items()}
        facts = self._facts | {"step": step, "history": history}
        draft = self.path.with_name(f"{_NAME}.part")
        try:
            save_file(tensors, draft, metadata={"qat": json.dumps(facts)})
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(self.path)
        except (OSError, SafetensorError) as err:
            draft.unlink(missing_ok=True)
            raise self._no_room(_reason(err)) from err

    def dtype(self) -> str | None:
        """Return the name of the dtype that the checkpoint's run computed in; None where there is none to read."""
        try:
            with safe_open(self.path, "pt") as file:
                return json.loads(file.metadata()["qat"])["history"]["dtype"].removeprefix("torch.")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None  # `load` says what is wrong with it

    def load(self, optimizer: torch.optim.Optimizer) -> tuple[int, dict, dict] | None:
        """Put the model and its optimizer where a checkpoint left them.

        Returns:
            Updates made, the best snapshot and the history; None where there is no checkpoint.

        Raises:
            BadSettingError: It belongs to another model or other settings.
            BrokenCheckpointError: It cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()["qat"])
                self._check(facts)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
            return self._put_back(facts, tensors, optimizer)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as err:
            if isinstance(err, BadSettingError):
                raise
            raise BrokenCheckpointError(
                f"{self.path} cannot be read: {_reason(err)}.",
                "A checkpoint of train_qat is one whole safetensors file.",
                "Delete it to begin anew, or name another folder.",
            ) from err

    @torch.no_grad()
    def _put_back(self, facts: dict, tensors: dict, optimizer: torch.optim.Optimizer) -> tuple[int, dict, dict]:
        names = trained(self._module)
        for name, parameter in names.items():
            parameter.copy_(tensors[f"now.{name}"])
            state = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in tensors}
            if state:
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
        best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        for name, (_, quantizer) in masters(self._module).items():
            if not quantizer.scale.requires_grad:
                quantizer.scale.copy_(best[f"{name}.scale"])  # the plain rule's, if the run began there
        return facts["step"], best, facts["history"]

    def _check(self, facts: dict) -> None:
        if facts["model"] != self._facts["model"]:
            raise BadSettingError(
                f"{self.path} is a checkpoint of another model, or of one that was prepared otherwise.",
                "A run goes on with the same weights on the same grids.",
                "Name another folder, or prepare the model as it was.",
            )
        differing = _differing(facts["settings"], self._facts["settings"])
        if differing:
            raise BadSettingError(
                f"{self.path} was made with other settings: {', '.join(differing)}.",
                "A run goes on with the settings that it began with.",
                "Use those, or name another folder to begin anew.",
            )

    def _no_room(self, why: str) -> NotEnoughDiskError:
        return NotEnoughDiskError(
            f"A checkpoint cannot be written to {self.path.parent}: {why}.",
            "The disk must hold the masters, two moments of each and the best codes, about 14 bytes a weight, twice.",
            "Free some space or name another folder; an earlier checkpoint there is still whole.",
        )


def _differing(theirs: dict, ours: dict) -> Iterable[str]:
    free = ("checkpoint_every",)
    names = [name for name in ours if name not in free and theirs.get(name) != ours[name]]
    return ["another text" if name == "text" else f"{name}={theirs.get(name)!r}" for name in names]


def _reason(err: Exception) -> str:
    if getattr(err, "errno", None) == errno.ENOSPC:
        return "the disk is full"
    return str(getattr(err, "strerror", None) or err)[:200]
