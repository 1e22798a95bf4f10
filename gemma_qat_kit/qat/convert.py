"""`convert_qat`: from fake quantization to codes and scales; the model computes exactly what it did in training."""

from torch import nn
from torch.nn.utils import parametrize

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.qat.fake_quantizer import quantizers
from gemma_qat_kit.quality.post_training import module_of


def convert_qat(model) -> None:
    """Turn a prepared model in place into a plain one whose weights lie on their grids, codes and scales beside them.

    Its logits are those of the prepared model, bit for bit. `export_gguf` and `export_mobile` write the codes as they
    are; `layer.quantized["weight"]` shows them.

    Args:
        model: As in `prepare_qat`.

    Raises:
        BadSettingError: The model is not prepared.
    """
    module = module_of(model)
    found = quantizers(module)
    if not found:
        raise BadSettingError(
            "This model is not prepared.",
            "convert_qat ends what prepare_qat began.",
            'Call prepare_qat(model, "q4_0") first; a converted model needs no second call.',
        )
    made: dict[int, tuple[nn.Parameter, object]] = {}  # tied weights stay tied
    for part, name, quantizer in found.values():
        if id(quantizer) not in made:
            stored = quantizer.store(part.parametrizations[name].original)
            made[id(quantizer)] = nn.Parameter(getattr(part, name).detach().clone(), requires_grad=False), stored
    for part, name, quantizer in found.values():
        values, stored = made[id(quantizer)]
        parametrize.remove_parametrizations(part, name, leave_parametrized=False)
        setattr(part, name, values)
        part.quantized = {**getattr(part, "quantized", {}), name: stored}
    module.requires_grad_(False)
