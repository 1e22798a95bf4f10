"""What a model is told of functions, and its calls, read from text that nobody can trust."""

import json
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import _compile_jinja_template

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.testing import CHAT_TEMPLATE
from gemma_qat_kit.tools import ToolCall, call_from_json, parse_call, tool_schemas

_SOME = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_KEYS = st.text("abcxyz_09", min_size=1, max_size=6)
_TEXTS = st.text('ab é1"{}[],:<|>\n\\', max_size=12).filter(lambda text: '<|"|>' not in text)
_VALUES = st.recursive(
    st.booleans() | st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)


def weather(city: str, days: int = 3, unit: Literal["C", "F"] = "C", days_off: list[str] | None = None):
    """
    Tell the weather.

    Args:
        city: Its name.
        days: How many.
        unit: Of the temperature.
        days_off: Names.
    """
    raise AssertionError("the kit runs no function")


def rendered(messages, tools=None):
    template = _compile_jinja_template(CHAT_TEMPLATE)
    return template.render(messages=messages, tools=tools, bos_token="<bos>", add_generation_prompt=True)


@_SOME
@given(st.dictionaries(_KEYS, _VALUES, max_size=4))
def test_a_call_is_read_back_as_the_chat_template_writes_it(arguments):
    calls = [{"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    text = rendered([{"role": "assistant", "content": "", "tool_calls": calls}])
    written = text.partition("<|tool_call>")[2].partition("<tool_call|>")[0]
    assert parse_call(written) == ToolCall("weather", arguments)


@_SOME
@given(st.dictionaries(_TEXTS, _VALUES, max_size=4))
def test_a_call_is_read_from_json(arguments):
    assert call_from_json("f", json.dumps(arguments)) == ToolCall("f", arguments)
    assert parse_call("call:f" + json.dumps(arguments)) == ToolCall("f", arguments)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("call:f{}", {}),
        (" f { } ", {}),
        ('call:f{a:<|"|>x{[,:"}<|"|>,b:[1,-2.5,1e3,true,false,null,None]}',
         {"a": 'x{[,:"}', "b": [1, -2.5, 1000.0, True, False, None, None]}),
        ('call:f{<|"|>a b<|"|>:{<|"|>c<|"|>:[{d:{}}]},1:"\\u00e9\n"}', {"a b": {"c": [{"d": {}}]}, "1": "é\n"}),
        ("call:f{a:1,a:2,}", {"a": 2}),
        ('call:f{a:<|"|><script>alert(1)</script><|"|>}', {"a": "<script>alert(1)</script>"}),
    ],
)  # fmt: skip
def test_calls_are_read(text, arguments):
    call = parse_call(text)
    assert call == ToolCall("f", arguments)
    assert call.is_valid


@pytest.mark.parametrize(
    "body",
    ["{", "{a", "{a:", "{a:1", "{a:1]", "{a 1}", "{:1}", "{a:1,,b:2}", "{a:1}}", "{a:1} b", "{[a:1]}", "{a:Paris}",
     '{a:<|"|>x}', '{a:"x}', '{a:"\\x"}', "{a:1_0}", "{a:0x1}", "{a:NaN}", "{a:1e999}", "{a:" + "9" * 5000 + "}",
     "{a:__import__('os')}", "{a:<|x}", "{1.5.2:x}", "{a:[1 2]}", "{a:[}", "{a:end}", "{end",
     "{a:" * 40 + "1" + "}" * 40],
)  # fmt: skip
def test_arguments_that_cannot_be_read_are_kept_as_they_were_written(body):
    call = parse_call("call:f" + body)
    assert call == ToolCall("f", {}, "call:f" + body)
    assert not call.is_valid


@pytest.mark.parametrize(
    "text", ["", "call:", "call:f", "f", "{}", "call:{a:1}", "call:a b{}", "call:é{}", "x" * 65 + "{}"]
)
def test_a_call_without_a_name_is_kept_as_it_was_written(text):
    assert parse_call(text) == ToolCall("", {}, text)


@pytest.mark.parametrize(
    "text",
    ["call:f" + "{a:" * 30_000, "call:f{a:" + "[" * 100_000, 'call:f{a:<|"|>' + "x" * 100_000, 
     "call:f{" + "a:1," * 25_000,
     "call:f{" + " " * 100_000 + "<", 'call:f{"' + "\\" * 100_000, "x" * 100_000, "call:f{a:" + "1" * 100_000 + "}",
     'call:f{a:<|"|>' + '<|"|>,' * 20_000, "call:f{" + "\ud800" * 100_000],
)  # fmt: skip
def test_a_hundred_thousand_characters_of_nonsense_are_kept_as_they_were_written(text):
    assert parse_call(text).text == text  # a parser that goes back would take minutes


@pytest.mark.parametrize(
    ("name", "text"),
    [("f", "{"), ("f", "[1]"), ("f", "7"), ("f", '{"a": NaN}'), ("f", "[" * 100_000), (None, "{}"), ("a b", "{}")],
)  # fmt: skip
def test_json_that_is_no_call_is_kept_as_it_was_written(name, text):
    call = call_from_json(name, text)
    assert (call.name, call.arguments) == ("f" if name == "f" else "", {})
    assert call.text.endswith(text)


def test_a_function_is_described_as_transformers_describes_it():
    assert tool_schemas([weather]) == [get_json_schema(weather)]


def test_a_schema_is_taken_bare_or_as_openai_has_it():
    bare = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}
    whole = [{"type": "function", "function": bare}]
    assert tool_schemas([bare]) == tool_schemas([{"type": "function", "function": bare}]) == whole
    assert tool_schemas([{"name": "now"}])[0]["function"]["parameters"] == bare["parameters"]
    assert tool_schemas(None) == tool_schemas([]) == []


@pytest.mark.parametrize(
    "tools",
    ["add", [1], [{}], [{"name": ""}], [{"name": "a b"}], [{"function": 1}], [{"name": "a", "description": {1}}],
     [{"name": "a"}, {"name": "a"}], {"name": "a"}, weather, [int]],
)  # fmt: skip
def test_what_is_no_tool_is_shown(tools):
    with pytest.raises(BadSettingError, match="cannot be offered as tools") as caught:
        tool_schemas(tools)
    assert "tools=[function]" in caught.value.next_step


def undescribed(city: str):
    """Tell the weather."""


def unhinted(city):
    """Tell.

    Args:
        city: Its name.
    """


@pytest.mark.parametrize("function", [undescribed, unhinted])
def test_a_function_without_hints_or_description_is_refused(function):
    with pytest.raises(BadSettingError, match=rf"{function.__name__} cannot be offered as a tool: .*'?city'?"):
        tool_schemas([function])
