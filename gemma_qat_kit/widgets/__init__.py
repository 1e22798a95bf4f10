"""What a person sees and presses: one file per widget, for ipywidgets 7 and 8.

All but BitExplorer and ChatPanel are plain ipywidgets; those bring a front end of their own, through anywidget.
"""

import importlib

_MODULES = {
    "BitExplorer": "bit_explorer",
    "ChatPanel": "chat_panel",
    "CompareChat": "compare_chat",
    "FinetunePanel": "finetune_panel",
    "MemoryChart": "memory_chart",
    "MemoryPanel": "memory_panel",
    "OutOfMemoryPanel": "out_of_memory_panel",
    "Picker": "picker",
    "QuantizePanel": "quantize_panel",
    "TrainingPanel": "training_panel",
    "TrainingReplay": "training_replay",
}
__all__ = [*_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return __all__
