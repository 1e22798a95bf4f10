"""The three ways to run a model, one module each: `transformers`, `llama_cpp` and `endpoint`.

An engine has `stream(conversation, settings)`, where a conversation is a list of messages or, for a raw completion, a
string; `tokenize(text)` and `logits(ids)`, with which it is measured; `memory()`; `close()`; and the attributes `name`
and `context_length`.
"""
