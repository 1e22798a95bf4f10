"""How the tiny checkpoints talk: a tokenizer of 512 pieces and a chat template that behave as Gemma 4's do."""

from collections.abc import Iterator

CHAT_TEMPLATE = """{{- bos_token -}}
{%- macro value(it) -%}
{%- if it is string -%}{{- '<|"|>' + it + '<|"|>' -}}
{%- elif it is boolean -%}{{- 'true' if it else 'false' -}}
{%- elif it is mapping -%}{{- '{' -}}{{- pairs(it) -}}{{- '}' -}}
{%- elif it is sequence -%}
{{- '[' -}}{%- for one in it -%}{{- value(one) -}}{{- ',' if not loop.last -}}{%- endfor -%}{{- ']' -}}
{%- else -%}{{- it -}}{%- endif -%}
{%- endmacro -%}
{%- macro pairs(them) -%}
{%- for key, it in them | dictsort -%}{{- key -}}:{{- value(it) -}}{{- ',' if not loop.last -}}{%- endfor -%}
{%- endmacro -%}
{%- macro spoken(text) -%}
{%- for part in text.split('<channel|>') %}{{ part.split('<|channel>')[0] }}{% endfor -%}
{%- endmacro -%}
{%- set ns = namespace(messages=messages, is_open=false) -%}
{%- if enable_thinking or tools or messages[0]['role'] == 'system' -%}
{{- '<|turn>system\\n' -}}
{%- if enable_thinking %}{{ '<|think|>\\n' }}{% endif -%}
{%- if messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] | trim -}}
{%- set ns.messages = messages[1:] -%}
{%- endif -%}
{%- for tool in tools or [] -%}
{{- '<|tool>declaration:' + tool['function']['name'] + '{' + pairs(tool['function']) + '}<tool|>' -}}
{%- endfor -%}
{{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in ns.messages -%}
{%- if message['role'] == 'tool' -%}
{{- '<|tool_response>response:' + message['name'] + '{value:' + value(message['content']) + '}<tool_response|>' -}}
{%- else -%}
{%- if not ns.is_open -%}
{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{%- endif -%}
{%- if message['content'] is string -%}{{- spoken(message['content']) -}}
{%- else -%}
{%- for part in message['content'] or [] -%}
{{- part['text'] if part['type'] == 'text' else '<|' + part['type'] + '|>' -}}
{%- endfor -%}
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{{- '<|tool_call>call:' + call['function']['name'] + '{' + pairs(call['function']['arguments']) + '}<tool_call|>' -}}
{%- endfor -%}
{%- set ns.is_open = message['tool_calls'] -%}
{%- if not ns.is_open %}{{ '<turn|>\\n' }}{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.is_open %}{{ '<|turn>model\\n' }}{% endif -%}"""

_SPECIAL = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 50: "<|tool_response>", 98: "<|think|>", 100: "<|channel>",
            101: "<channel|>", 105: "<|turn>", 106: "<turn|>", 500: "<|image|>", 501: "<|audio|>", 502: "<|image>",
            503: "<|audio>", 504: "<image|>", 505: "<audio|>", 506: "<|video|>", 494: "<|tool>", 495: "<tool|>",
            496: "<|tool_call>", 497: "<tool_call|>", 498: "<tool_response|>", 499: '<|"|>'}  # fmt: skip
_WORDS = ("the", "and", "is", "was", "thought", "user", "model", "system", "sky", "blue")


def _pieces() -> Iterator[str]:
    """Yield the ordinary pieces: letters and marks, then what the merges build, then the 256 bytes."""
    yield from "\n▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-()"
    for word in _WORDS:
        yield from (word[:end] for end in range(2, len(word) + 1))
    yield from (f"<0x{byte:02X}>" for byte in range(256))


def tiny_tokenizer():
    """Return a `tokenizers.Tokenizer` of 512 pieces built as Gemma's: byte-pair merges, byte fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in _SPECIAL.items()}
    vocab["\n"] = 107
    free = iter(index for index in range(512) if index not in _SPECIAL and index != 107)
    vocab |= {piece: next(free) for piece in dict.fromkeys(_pieces()) if piece not in vocab}
    vocab |= {f"<unused{index}>": index for index in free}
    merges = dict.fromkeys((word[:end], word[end]) for word in _WORDS for end in range(1, len(word)))
    model = models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL.values()])
    return tokenizer
