"""What each supported transformers release gets wrong with Gemma 4, and what is done about it, in one place.

| release | trap | answer |
|---|---|---|
| every | the `-q4_0-unquantized` config.json has a quantization_config without a method | it is taken out |
| every | `dtype="auto"` turns a mobile checkpoint into float32 | a dtype is always passed |
| every | image processors need torchvision, and a mismatched one breaks the import | text-only loads take the
tokenizer alone |
| every | a mobile forward unpacks whole matrices, and the embeddings for one row | `transformers_mobile` does not |
| 5.18, 5.19 | `generate(assistant_model=…)` raises a TypeError | drafters ask for another release |
| 5.23 on | a per-layer embedding scale of several columns is refused (mobile) | the parameter is given its real shape |
| 5.23 on | a drafter, whose layers all share, cannot be built | all its layers "reuse" |
| 5.23 on | a target without shared layers stores nothing for its drafter | the last layer of each kind "stores" |
| 5.24 on | gradient checkpointing is called activation checkpointing | the name that is there is used |
| 5.24 on | peft asks a model by the old name, which warns | the warning is not shown |
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from gemma_qat_kit.errors import MissingLibraryError

OLDEST = "5.15"
WITHOUT_DRAFTERS = ("5.18", "5.20")  # from the first on, and before the second


def check_release(*, drafter: bool = False) -> None:
    """Refuse a transformers release that cannot do what is asked.

    Raises:
        MissingLibraryError: Too old, or one of those that cannot draft.
    """
    import transformers
    from packaging.version import Version

    found = Version(transformers.__version__)
    if found < Version(OLDEST):
        raise MissingLibraryError(
            f"transformers {found} is too old for Gemma 4 QAT.",
            f"At least {OLDEST} is needed; 5.22.2 is what the kit is tested with.",
            "Run: pip install transformers==5.22.2",
        )
    first, fixed = map(Version, WITHOUT_DRAFTERS)
    if drafter and first <= found < fixed:
        raise MissingLibraryError(
            f"transformers {found} cannot generate with MTP drafters.",
            f"Before {first} and from {fixed} on it can; 5.22.2 is what the kit is tested with.",
            "Run: pip install transformers==5.22.2, or go on without the drafter.",
        )


def clean_config(config: dict) -> dict:
    """Return a config.json's content without a quantization_config that names no method."""
    quantization = config.get("quantization_config")
    if quantization is not None and not quantization.get("quant_method"):
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return config


def set_checkpointing(module, is_on: bool) -> None:
    """Have a model compute its layers a second time in the backward pass instead of keeping their activations."""
    kind = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
    if is_on:
        kept = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(module, f"{kind}_checkpointing_enable")(**kept)
    else:
        getattr(module, f"{kind}_checkpointing_disable")()


@contextmanager
def peft_unwarned() -> Iterator[None]:
    """Let peft ask a model for its checkpointing by the old name without a warning that nobody can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated")
        yield


@contextmanager
def repaired() -> Iterator[None]:
    """Repair the installed release while a model is built and loaded; other users of the library see no change."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version("5.23"):
        yield
        return
    with _per_layer_scales(), _sharing_modes():
        yield


@contextmanager
def _per_layer_scales() -> Iterator[None]:
    """Give the per-layer embedding one scale per layer before its weights are compared with the file's."""
    import torch
    from transformers.quantizers.quantizer_gemma import GemmaQuantizer

    original = GemmaQuantizer._process_model_before_weight_loading

    @functools.wraps(original)
    def process(self, model, **kwargs):
        result = original(self, model, **kwargs)
        text = model.config.get_text_config()
        for name, module in model.named_modules():
            if name.endswith("embed_tokens_per_layer") and hasattr(module, "embedding_scale"):
                shape, device = (module.num_embeddings, text.num_hidden_layers), module.embedding_scale.device
                scale = torch.ones(shape, dtype=torch.float32, device=device)  # the default dtype is the model's here
                module.embedding_scale = torch.nn.Parameter(scale, requires_grad=False)
        return result

    GemmaQuantizer._process_model_before_weight_loading = process
    try:
        yield
    finally:
        GemmaQuantizer._process_model_before_weight_loading = original


def _modes(config) -> list[str | None]:
    """Say for each layer whether it stores its keys and values for others, reuses another's, or neither (None)."""
    num_own = config.num_hidden_layers - config.num_kv_shared_layers
    if num_own == 0:
        return ["reuse"] * config.num_hidden_layers
    modes = [None] * num_own + ["reuse"] * config.num_kv_shared_layers
    own = config.layer_types[:num_own]
    for kind in set(own):
        modes[num_own - 1 - own[::-1].index(kind)] = "store"
    return modes


@contextmanager
def _sharing_modes() -> Iterator[None]:
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig

    classes = [cls for cls in (Gemma4TextConfig, Gemma4UnifiedTextConfig) if "kv_sharing_modes" in vars(cls)]
    originals = [vars(cls)["kv_sharing_modes"] for cls in classes]
    for cls in classes:
        cls.kv_sharing_modes = property(_modes)
    try:
        yield
    finally:
        for cls, original in zip(classes, originals, strict=True):
            cls.kv_sharing_modes = original
