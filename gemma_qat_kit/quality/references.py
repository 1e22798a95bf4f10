"""Which model a quantized one may be measured against.

The QAT checkpoints were made from their own bf16 weights, `q4_0-unquantized`, which training has moved away from the
plain `bf16` ones. Against those a figure mixes what training changed with what rounding cost: other tools have reported
QAT models as damaged for it. Of the mobile weights no unquantized version is published.
"""

import warnings

from gemma_qat_kit.catalog import BUILT_IN_SIZE
from gemma_qat_kit.errors import BadSettingError

_QAT, _PLAIN = ("q4_0", "w4a16", "q4_0-unquantized"), ("bf16", "nf4", "int8")


class WrongReferenceWarning(UserWarning):
    """A quantized model is compared with weights that it was not made from."""


def check_reference(model, reference) -> None:
    """Refuse two sizes; warn where a model meets weights that it was not made from.

    Warns:
        WrongReferenceWarning: It does.

    Raises:
        BadSettingError: Two sizes.
    """
    size, other = getattr(model, "size", None), getattr(reference, "size", None)
    if size is None or other is None or size == other == BUILT_IN_SIZE:
        return
    if size != other:
        raise BadSettingError(
            f"{model.name} and {reference.name} are different models.",
            "What a format costs shows against the same model in another format.",
            f'Take gqk.load("{size}", …) as the reference.',
        )
    if {model.format, reference.format} == {"bf16", "q4_0-unquantized"}:
        return  # nothing is rounded here: it is asked what the training changed
    kinds = {_kind(model.format), _kind(reference.format)}
    if len(kinds) == 2 and "" not in kinds:
        warnings.warn(_wrong_reference(model, reference), WrongReferenceWarning, stacklevel=3)


def _kind(format: str) -> str:
    """Name the training that a format's weights went through; "" where it is not known."""
    return "qat" if format in _QAT else "plain" if format in _PLAIN else "mobile" if format == "mobile" else ""


def _wrong_reference(model, reference) -> str:
    text = (
        f"{model.name} was not made from {reference.name}: the two were trained differently, so the figures mix what "
        "training changed with what rounding cost. "
    )
    if "mobile" in (model.format, reference.format):
        return text + (
            "No unquantized weights of a mobile checkpoint are published, so there is no right reference; perplexity() "
            "of each tells which predicts a text better."
        )
    right = "q4_0-unquantized" if model.format in _QAT else "bf16"
    return text + f'The reference to take is gqk.load("{model.size}", "{right}").'
