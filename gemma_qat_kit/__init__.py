"""Load, measure, train, export and chat with Google's Gemma 4 QAT checkpoints, in a notebook.

Nothing here imports torch or transformers: a name is imported when it is first used.
"""

import importlib
import sys
import types

__version__ = "0.1.0"
_MODULE_OF = {
    "Comparison": "chat.comparison",
    "Conversation": "chat.conversation",
    "FinetuneSettings": "finetune.settings",
    "Model": "model",
    "Reply": "generation",
    "adapted_model": "finetune.adapted",
    "bundle": "classroom.bundle",
    "catalog": "catalog",
    "check": "classroom.check",
    "collect_importance": "quality.post_training",
    "compare_answers": "chat.comparison",
    "compare": "quality.comparison",
    "compare_formats": "quality.format_table",
    "convert_qat": "qat.convert",
    "environment": "environment",
    "export_adapter": "export.adapter",
    "export_gguf": "export.gguf",
    "export_mobile": "export.mobile",
    "fake_quantize": "formats.quantized",
    "finetune": "finetune.train",
    "grid_report": "grid_report",
    "hand_in": "classroom.hand_in",
    "load": "load",
    "load_adapter": "finetune.adapted",
    "measure_memory": "memory.measure",
    "measured_receipts": "memory.measured",
    "merge_adapters": "finetune.adapted",
    "perplexity": "quality.comparison",
    "plan_memory": "memory.plan",
    "pool": "classroom.pool",
    "published_memory": "memory.published_table",
    "prepare_qat": "qat.prepare",
    "quantize": "formats.quantized",
    "receipts": "memory.receipts",
    "save_adapter": "finetune.adapted",
    "serve": "serve",
    "speed_limit": "speed",
    "sqnr_db": "quality.comparison",
    "TrainSettings": "qat.settings",
    "train_qat": "qat.train",
    "write_modelfile": "export.adapter",
}
__all__ = [*_MODULE_OF, "testing", "widgets"]


class _Package(types.ModuleType):
    """This package. Where a function has its module's name (`load.load`), the name here is the function."""

    def __getattr__(self, name: str):
        if name in ("testing", "widgets"):
            return importlib.import_module(f"gemma_qat_kit.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"gemma_qat_kit has no {name!r}; it has {', '.join(__all__)}")
        value = getattr(importlib.import_module(f"gemma_qat_kit.{_MODULE_OF[name]}"), name)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        is_module_import = isinstance(value, types.ModuleType) and name in _MODULE_OF
        if not is_module_import:  # the import system binds each submodule it loads
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
