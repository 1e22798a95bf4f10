"""The one face of every model, over an engine that only notes what it was asked."""

import pytest

from gemma_qat_kit.catalog import BUILT_IN_SIZE, Sampling
from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.generation import Delta, Finish, Settings
from gemma_qat_kit.memory.parts import ENGINE, TEXT_LAYERS, Part
from gemma_qat_kit.model import Model

CARD = Sampling(temperature=1.0, top_p=0.95, top_k=64)


class Runner:
    """An engine; its stream is a list that can be cancelled."""

    model, context_length, hf = "a server's model", 4096, ("model", "processor")

    def __init__(self, name="llama_cpp"):
        self.name, self.asked, self.num_closes = name, [], 0

    def stream(self, conversation, settings):
        self.asked.append((conversation, settings))
        return Pieces([Delta.thought("Hm."), Delta("Blue."), Finish("stop", 3, 4)])

    def memory(self):
        return (Part(ENGINE, 5, "ram"), Part(TEXT_LAYERS, 7, "mapped"))

    def close(self):
        self.num_closes += 1


class Pieces(list):
    def cancel(self):
        pass


def model_of(size="E2B", format="q4_0", name="llama_cpp"):
    return Model(size, format, CARD, Runner(name))


@pytest.mark.parametrize(
    ("size", "format", "name"),
    [("E2B", "q4_0", "E2B q4_0"), (None, "bf16", "custom bf16"), (None, "endpoint", "a server's model")],
)
def test_a_model_is_called_by_size_and_format_or_as_its_server_says(size, format, name):
    assert model_of(size, format).name == name


def test_a_model_says_what_runs_it():
    model = model_of()
    assert (model.engine, model.context_length) == ("llama_cpp", 4096)
    assert repr(model) == "<Model E2B q4_0, llama_cpp, context_length=4096>"


def test_a_question_is_streamed_with_the_cards_sampling():
    model = model_of()
    assert list(model.stream("Why?")) == ["Hm.", "Blue."]
    assert model.runner.asked == [([{"role": "user", "content": "Why?"}], Settings(False, 512, 1.0, 0.95, 64, None))]


def test_settings_of_the_call_come_first_even_where_they_are_zero():
    model = model_of()
    model.stream("Why?", thinking=True, max_new_tokens=9, temperature=0, top_p=0.5, top_k=0, seed=0)
    assert model.runner.asked[0][1] == Settings(True, 9, 0.0, 0.5, 0, 0)


def test_chat_returns_the_whole_reply():
    reply = model_of().chat("Why?", temperature=0)
    assert (str(reply), reply.thoughts, reply.finish_reason) == ("Blue.", "Hm.", "stop")
    assert (reply.prompt_tokens, reply.new_tokens) == (3, 4)


def test_generate_passes_the_bare_text_on():
    model = model_of()
    assert model.generate("The sky is", max_new_tokens=3).text == "Blue."
    assert model.runner.asked == [("The sky is", Settings(False, 3, 1.0, 0.95, 64, None))]


@pytest.mark.parametrize("prompt", ["", None, 7, [{"role": "user", "content": "Why?"}]])
def test_generate_needs_text(prompt):
    with pytest.raises(BadSettingError) as caught:
        model_of().generate(prompt)
    assert caught.value.wrong == f"{prompt!r} is no prompt."
    assert "There must be a text" in caught.value.allowed
    assert "chat()" in caught.value.next_step


@pytest.mark.parametrize("call", ["stream", "chat"])
def test_bad_settings_and_messages_are_refused_before_the_engine_is_asked(call):
    model = model_of()
    for arguments in ({"temperature": "hot"}, {"max_new_tokens": 0}, {"top_p": 2}):
        with pytest.raises(BadSettingError):
            getattr(model, call)("Why?", **arguments)
    with pytest.raises(BadSettingError, match="no question"):
        getattr(model, call)("")
    assert model.runner.asked == []


def test_the_built_in_model_does_not_think():
    model = model_of(BUILT_IN_SIZE, "q4_1")
    with pytest.raises(BadSettingError) as caught:
        model.chat("Why?", thinking=True)
    assert caught.value.wrong == f"{BUILT_IN_SIZE} cannot think."
    assert caught.value.allowed == "Gemma 4 can, in every size."
    assert "thinking=False" in caught.value.next_step
    assert str(model.chat("Why?", thinking=False)) == "Blue."


def test_hf_is_there_where_transformers_runs():
    assert model_of("E2B", "mobile", "transformers").hf == ("model", "processor")


@pytest.mark.parametrize(("size", "format"), [("31B", "q4_0"), (None, "q4_k"), (None, "endpoint")])
def test_hf_of_another_engine_is_refused_with_a_call_that_has_it(size, format):
    model = model_of(size, format, "llama_cpp")
    with pytest.raises(BadSettingError) as caught:
        _ = model.hf
    assert caught.value.wrong == f"{model.name} runs in llama_cpp, which has no transformers model."
    assert "q4_0-unquantized" in caught.value.allowed
    assert f'gqk.load("{size or "E2B"}", "q4_0-unquantized").hf' in caught.value.next_step


def test_memory_is_measured_part_by_part():
    use = model_of().memory()
    assert (use.parts, use.total_bytes) == ({TEXT_LAYERS: 7, ENGINE: 5}, 12)
    assert (use.in_place("ram"), use.in_place("mapped")) == (5, 7)
    assert "total in memory, measured" in str(use)


def test_a_with_block_closes_the_model_even_after_an_error():
    model = model_of()
    with model as entered:
        assert entered is model
    with pytest.raises(KeyError), model:
        raise KeyError
    assert model.runner.num_closes == 2


def test_two_models_are_never_equal_and_can_be_kept_in_a_set():
    runner = Runner()
    assert len({Model("E2B", "q4_0", CARD, runner), Model("E2B", "q4_0", CARD, runner)}) == 2
