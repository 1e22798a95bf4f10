"""What a person sees and presses: one file per widget, plain ipywidgets that work on versions 7 and 8."""

import importlib

_MODULES = {"ChatPanel": "chat_panel", "Picker": "picker"}
__all__ = ["ChatPanel", "Picker"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return __all__
