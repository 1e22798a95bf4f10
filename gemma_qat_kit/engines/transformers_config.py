"""A checkpoint's config.json as transformers' config object, read strictly and told of what nobody reads."""

import warnings
from pathlib import Path

from gemma_qat_kit.architectures import GEMMA_SIZES, MOBILE_SIZES, hf_config
from gemma_qat_kit.checkpoint import read_config
from gemma_qat_kit.engines import transformers_traps as traps
from gemma_qat_kit.errors import BrokenCheckpointError


class UnknownConfigKeyWarning(UserWarning):
    """A config.json has a key that neither the kit nor this transformers release knows."""


def load_config(folder: Path, text_only: bool):
    """Return transformers' config object of a folder, without towers where they stay unread.

    Warns:
        UnknownConfigKeyWarning: The file has keys that nothing reads.
    """
    content = traps.clean_config(read_config(folder))
    config = make_config(content, folder / "config.json")
    _warn_of_unknown_keys(folder, content, config)
    return without_towers(config) if text_only else config


def make_config(content: dict, path: Path):
    """Return transformers' config object for the content of a config.json, which says the file `path`.

    Raises:
        BrokenCheckpointError: A value cannot be used.
    """
    from transformers import AutoConfig

    kind, content = content["model_type"], {key: value for key, value in content.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(kind, **content)
    except Exception as err:  # each release validates in its own way
        raise BrokenCheckpointError(
            f"{path} does not describe a {kind} model: {err}.",
            "Its keys and values must be those of the published checkpoints.",
            "Download it again.",
        ) from err
    return config


def without_towers(config):
    """Return transformers' config object of the text model alone."""
    config.vision_config = config.audio_config = None
    return config


_OTHER_KEYS = {"_name_or_path", "expert_intermediate_size", "quantization_config", "transformers_version", "dtype",
               "torch_dtype", "model_type", "per_layer_config", "generation_config"}  # fmt: skip


def _warn_of_unknown_keys(folder: Path, content: dict, config) -> None:
    sections = {"": (content, config)} | {
        f"{name}.": (content[name], getattr(config, name))
        for name in ("text_config", "vision_config", "audio_config")
        if isinstance(content.get(name), dict)
    }
    unknown = []
    for prefix, (section, parsed) in sections.items():
        known = _OTHER_KEYS | set(type(parsed).__dataclass_fields__) | _published_keys(prefix.rstrip("."))
        unknown += [prefix + key for key in section if key not in known]
    if unknown:
        warnings.warn(
            f"{folder / 'config.json'} has keys that nothing here reads: {', '.join(sorted(unknown))}. "
            "The published checkpoints do not have them. Loading goes on without; a newer transformers may know them.",
            UnknownConfigKeyWarning,
            stacklevel=4,
        )


def _published_keys(section: str) -> set[str]:
    configs = [hf_config(size) for size in GEMMA_SIZES] + [hf_config(size, "mobile") for size in MOBILE_SIZES]
    return {key for config in configs for key in ((config[section] or {}) if section else config)}
