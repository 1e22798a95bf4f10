"""The models of a chat by name, and what each holds."""

from gemma_qat_kit.errors import BadSettingError, KitError


def named_models(models) -> dict[str, object]:
    """Return one model or several by the names to show them under; two of one name are numbered.

    Raises:
        BadSettingError: There is none.
    """
    if isinstance(models, dict):
        named = dict(models)
    else:
        named = {}
        for model in models if isinstance(models, (list, tuple)) else [models] if models is not None else []:
            again = sum(name.split(" #")[0] == model.name for name in named)
            named[f"{model.name} #{again + 1}" if again else model.name] = model
    if not named:
        raise BadSettingError("There is no model.", "One or more are needed.", 'Pass gqk.load("smollm2-135m").')
    return named


def held_bytes(model) -> int | None:
    """Return the bytes that a model holds, None where it is a server's, or closed."""
    try:
        held = model.memory()
    except (KitError, OSError):
        return None
    return sum(held.in_place(place) for place in ("gpu", "ram", "mapped")) or None
