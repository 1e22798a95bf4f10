"""transformers' tokenizer from the keys of a Gemma 4 GGUF: the inverse of `metadata.Vocabulary`.

A GGUF keeps pieces, merges and kinds of pieces; how spaces and unknown characters are treated is the same in all of
Gemma's tokenizers, and llama.cpp has it in its code, as it is here.
"""

from pathlib import Path

from gemma_qat_kit.gguf.header import broken_file, read_keys
from gemma_qat_kit.gguf.metadata import ALWAYS_SHOWN, CONTROL, USER_DEFINED


def gemma_tokenizer(path: Path):
    """Return the tokenizer of a GGUF of the architecture gemma4, with its chat template.

    Raises:
        BrokenCheckpointError: A key is missing or damaged.
    """
    from transformers import PreTrainedTokenizerFast

    keys = {key.removeprefix("tokenizer."): value for key, (value, *_) in read_keys(path).items()}
    try:
        pieces = keys["ggml.tokens"]
        names = {f"{name}_token": pieces[keys[f"ggml.{short}_token_id"]] for name, short in _NAMES.items()}
        backend = _backend(pieces, keys["ggml.token_type"], keys["ggml.merges"], names)
    except (LookupError, TypeError, ValueError) as err:
        raise broken_file(path, f"its tokenizer is not Gemma's ({err!r})") from err
    except Exception as err:  # what the tokenizers library raises is a plain Exception
        raise broken_file(path, f"its tokenizer is not Gemma's ({err})") from err
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=keys.get("chat_template"),
        clean_up_tokenization_spaces=False,  # it would drop the spaces before punctuation
        **names,
    )


_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _backend(pieces: list[str], kinds: list[int], merges: list[str], names: dict[str, str]):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    model = models.BPE(vocabulary, pairs, unk_token=names["unk_token"], byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == CONTROL or piece in ALWAYS_SHOWN]
    others = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED} - {*special}
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in pieces if piece in others])
    bos = names["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return backend
