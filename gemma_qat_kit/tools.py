"""Functions that a model may ask for: what it is told of them, and its calls, read from untrusted text.

The kit never runs a function by itself. A call is data; the caller decides, and says what came of it in a message
{"role": "tool", "name": …, "content": text}.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from gemma_qat_kit.errors import BadSettingError

_NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_MAX_DEPTH = 32  # of objects and lists in arguments; deeper is nonsense, and Python's stack is finite
# What Gemma 4 writes: call:NAME{key:<|"|>text<|"|>,other:[1,true,null,{…}]}, as its chat template writes it, too.
_TOKEN = re.compile(
    r"""\s*(?: <\|"\|>(?P<quoted>.*?)<\|"\|> | (?P<json>"(?:[^"\\]|\\.)*") | (?P<mark>[{}\[\],:])
    | (?P<bare>[^\s{}\[\],:"<>]+) )\s*""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_END = ("mark", "end")  # in no place where it is allowed
_WORDS = {"true": True, "false": False, "null": None, "None": None}


@dataclass(frozen=True)
class ToolCall:
    """What a model asks for.

    Attributes:
        name: Of the function; "" where the model wrote none.
        arguments: By name; {} where they cannot be read.
        text: The call as it was written, where it cannot be read; else "".
    """

    name: str
    arguments: dict
    text: str = ""

    @property
    def is_valid(self) -> bool:
        """Whether name and arguments could be read; whether they make sense, the caller must check."""
        return not self.text


def parse_call(text: str) -> ToolCall:
    """Return the call in what Gemma 4 writes between `<|tool_call>` and `<tool_call|>`, whatever that is."""
    head, brace, body = text.strip().partition("{")
    name = head.strip().removeprefix("call:").strip()
    if not brace or not _NAME.fullmatch(name):
        return ToolCall("", {}, text)
    try:
        tokens = _tokens(brace + body)
        arguments = _value(next(tokens, _END), tokens, 0)
        is_whole = next(tokens, None) is None
    except ValueError:
        is_whole = False
    return ToolCall(name, arguments) if is_whole else ToolCall(name, {}, text)


def call_from_json(name: object, arguments: str) -> ToolCall:
    """Return the call for a name and the JSON of its arguments, as OpenAI-compatible servers give them."""
    good = name if isinstance(name, str) and _NAME.fullmatch(name) else ""
    try:
        values = json.loads(arguments or "{}", parse_constant=_no_constant)
    except (ValueError, RecursionError):
        values = None
    return ToolCall(good, values) if good and isinstance(values, dict) else ToolCall(good, {}, f"{name}{arguments}")


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not in JSON")


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Yield kind and text of each token; raise ValueError at what is none."""
    at = 0
    while at < len(text):
        if not (found := _TOKEN.match(text, at)):
            raise ValueError(f"nothing known at character {at}")
        yield found.lastgroup, found[found.lastgroup]
        at = found.end()


def _value(token: tuple[str, str], tokens: Iterator, depth: int) -> object:
    kind, text = token
    if kind == "quoted":
        return text
    if kind == "json":
        return json.loads(text, strict=False)
    if kind == "bare":
        return _WORDS[text] if text in _WORDS else _number(text)
    if text not in "{[" or depth == _MAX_DEPTH:
        raise ValueError(f"{text} at depth {depth}")
    return dict(_pairs(tokens, depth + 1)) if text == "{" else list(_items(tokens, depth + 1))


def _number(text: str) -> int | float:
    if not (found := _NUMBER.fullmatch(text)):
        raise ValueError("a word without quotes")
    number = float(text) if found[1] or found[2] else int(text)
    if not math.isfinite(number):
        raise ValueError("a number without end")
    return number


def _pairs(tokens: Iterator, depth: int) -> Iterator[tuple[str, object]]:
    token = next(tokens, _END)
    while token != ("mark", "}"):
        kind, key = token
        if kind == "mark" or next(tokens, _END) != ("mark", ":"):
            raise ValueError("a key and a colon are needed")
        yield json.loads(key, strict=False) if kind == "json" else key, _value(next(tokens, _END), tokens, depth)
        token = _after_comma(tokens, "}")


def _items(tokens: Iterator, depth: int) -> Iterator[object]:
    token = next(tokens, _END)
    while token != ("mark", "]"):
        yield _value(token, tokens, depth)
        token = _after_comma(tokens, "]")


def _after_comma(tokens: Iterator, end: str) -> tuple[str, str]:
    """Return the end, or what follows a comma."""
    token = next(tokens, _END)
    if token not in (("mark", end), ("mark", ",")):
        raise ValueError("a comma is needed")
    return token if token == ("mark", end) else next(tokens, _END)


def tool_schemas(tools: Sequence[dict | Callable] | None) -> list[dict]:
    """Return what the model is told of the functions: JSON schemas, as OpenAI's API has them.

    Args:
        tools: Schemas ({"name": …, "description": …, "parameters": …}, also inside {"type": "function", "function":
            …}), or Python functions whose arguments have type hints and are described in a Google-style docstring.

    Raises:
        BadSettingError: Something else, or two of one name.
    """
    schemas = [_schema(tool) for tool in tools or ()] if isinstance(tools, (list, tuple, type(None))) else [None]
    names = [schema and schema["function"]["name"] for schema in schemas]
    if None in names or len(set(names)) < len(names):
        raise BadSettingError(
            f"{tools!r:.200} cannot be offered as tools.",
            'They are a list of Python functions or of schemas such as {"name": "weather", "description": "…", '
            '"parameters": {"type": "object", "properties": {…}}}, each with a name of its own.',
            "Pass tools=[function].",
        )
    return schemas


def _schema(tool: object) -> dict | None:
    """Return a tool's schema, None where it is none that JSON can carry."""
    if inspect.isroutine(tool):
        return _schema_of_function(tool)
    about = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(about, dict) or not _NAME.fullmatch(str(about.get("name", ""))):
        return None
    try:
        json.dumps(about)
    except (TypeError, ValueError, RecursionError):
        return None
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": empty | {key: value for key, value in about.items() if key != "type"}}


def _schema_of_function(function: Callable) -> dict:
    from transformers.utils import chat_template_utils as hints

    try:
        return hints.get_json_schema(function)
    except (hints.DocstringParsingException, hints.TypeHintParsingException) as err:
        raise BadSettingError(
            f"{function.__name__} cannot be offered as a tool: {err}.",
            "Its arguments have type hints, and its docstring a line for each under 'Args:'.",
            "Add them, or pass its JSON schema.",
        ) from err


def linked_calls(messages: list[dict]) -> list[dict]:
    """Return messages in which each call has an id, and each answer to a call that of the call.

    Raises:
        BadSettingError: Calls that are none, or an answer to a call that nobody made.
    """
    linked, open_calls, numbers = [], {}, count()
    for message in messages:
        if message["role"] == "tool":
            waiting = open_calls.get(message["name"])
            if not waiting:
                raise BadSettingError(
                    f"There is no call of {message['name']!r:.80} to answer.",
                    "A message of role 'tool' follows the reply that called the function, once for each call.",
                    "Append reply.message first, as it is.",
                )
            linked.append(message | {"tool_call_id": waiting.pop(0)})
            continue
        calls = [_linked(call, f"call_{next(numbers)}") for call in message.get("tool_calls") or ()]
        open_calls = {}
        for call in calls:
            open_calls.setdefault(call["function"]["name"], []).append(call["id"])
        linked.append(message | {"tool_calls": calls} if calls else message)
    return linked


def _linked(call: object, id: str) -> dict:
    about = call.get("function") if isinstance(call, dict) else None
    name, arguments = (about.get("name"), about.get("arguments", {})) if isinstance(about, dict) else (None, None)
    read = call_from_json(name, arguments) if isinstance(arguments, str) else ToolCall(name, arguments)
    if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(arguments, (dict, str)) and read.is_valid):
        raise BadSettingError(
            f"{call!r:.200} is no call of a tool.",
            'It is {"type": "function", "function": {"name": …, "arguments": {…}}}.',
            "Append reply.message as it is.",
        )
    return {"id": id, "type": "function", "function": {"name": name, "arguments": read.arguments}}


def call_message(call: ToolCall) -> dict:
    """Return a call as a message carries it."""
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
