"""llama.cpp in its child process: what it answers, how it is stopped, and what is left when anything dies."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

import gemma_qat_kit as gqk
from gemma_qat_kit import testing
from gemma_qat_kit.engines.endpoint import EndpointEngine
from gemma_qat_kit.engines.llama_cpp import LlamaCppEngine
from gemma_qat_kit.errors import BadSettingError, EndpointError, ModelClosedError
from gemma_qat_kit.generation import STOP_IDS, Settings, Stream

GREEDY = Settings(False, 24, 0, 1, 0, None)
LONG = Settings(False, 400, 0, 1, 0, None)
QUESTION = [{"role": "user", "content": "Name three colors."}]
TALE = [{"role": "user", "content": "Tell me a long story about the sea."}]


@pytest.fixture(scope="module")
def engine(built_in):
    engine = LlamaCppEngine(built_in, context_length=512)
    yield engine
    engine.close()


@pytest.fixture
def tiny_engine(tiny):
    engine = LlamaCppEngine(tiny("12B", "q4_0"), context_length=256)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def thinking_engine(tmp_path_factory):
    """A tiny model whose template has the mark by which llama.cpp knows Gemma 4's format: its tool calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "CHAT_TEMPLATE", testing.CHAT_TEMPLATE + "{#- '<|tool_call>call:' -#}")
        path = testing.write_tiny_checkpoint(tmp_path_factory.mktemp("thinking"), "12B", "q4_0")
    engine = LlamaCppEngine(path, context_length=256)
    yield engine
    engine.close()


def ask(engine, conversation=QUESTION, settings=GREEDY):
    stream = Stream(engine.stream(conversation, settings))
    pieces = list(stream)
    assert "".join(pieces) == stream.reply.text
    return stream.reply


def post(engine, path, body):
    """Ask llama.cpp's own interface."""
    server = EndpointEngine(engine.address, engine._key, model="any")
    server._path = ""
    connection = server._connect()
    try:
        return json.loads(server._request(connection, "POST", path, json.dumps(body)).read())
    finally:
        connection.close()


def test_the_real_model_answers_sensibly(built_in):
    with gqk.load("smollm2-135m", context_length=512) as model:
        reply = model.chat("Why is the sky blue?", temperature=0, max_new_tokens=16)
    assert "light" in reply.text
    assert reply.finish_reason == "length"
    assert reply.prompt_tokens > 10
    assert reply.new_tokens == 16
    assert reply.tokens_per_second > 0


DIRECT = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = sys.argv[1], 512, 1, 1
body = {"messages": json.loads(sys.argv[2]), "max_tokens": 12, "temperature": 0}
print(json.dumps(xllamacpp.Server(params).handle_chat_completions(body)))
"""


def test_a_greedy_answer_is_that_of_xllamacpp_called_directly(engine, built_in):
    command = [sys.executable, "-c", DIRECT, str(built_in), json.dumps(TALE)]
    environment = os.environ | {"GOMP_SPINCOUNT": "10000"}  # or it takes minutes where other tests want the cores
    result = subprocess.run(command, capture_output=True, check=True, timeout=120, env=environment)
    direct = json.loads(result.stdout)
    reply = ask(engine, TALE, Settings(False, 12, 0, 1, 0, None))
    assert reply.text == direct["choices"][0]["message"]["content"]
    assert reply.finish_reason == direct["choices"][0]["finish_reason"] == "length"
    assert reply.prompt_tokens == direct["usage"]["prompt_tokens"]
    assert reply.new_tokens == direct["usage"]["completion_tokens"] == 12


def test_a_raw_prompt_is_continued_without_the_template(engine):
    reply = ask(engine, "The capital of France is", Settings(False, 4, 0, 1, 0, None))
    assert "Paris" in reply.text
    assert reply.prompt_tokens == 5


def test_a_seed_makes_sampling_repeatable(tiny_engine):
    first, second, other = (ask(tiny_engine, "the", Settings(False, 12, 1.5, 1, 0, seed)).text for seed in (7, 7, 8))
    assert first == second != other


def test_an_answer_ends_with_the_turn(engine):
    reply = ask(engine)
    assert (reply.text, reply.finish_reason) == ("1. Red\n2. Blue\n3. Green", "stop")


def test_an_answer_ends_with_the_context(tiny_engine):
    reply = ask(tiny_engine, "the sky " * 61, Settings(False, 2000, 0, 1, 0, None))
    assert reply.finish_reason == "length"
    assert reply.prompt_tokens + reply.new_tokens == pytest.approx(tiny_engine.context_length, abs=1)


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(engine):
    with pytest.raises(BadSettingError) as caught:
        ask(engine, "word " * 1000)
    assert caught.value.wrong == "The prompt has 1001 tokens."
    assert caught.value.allowed == "With its answer it must fit in context_length=512."
    assert caught.value.next_step == "Shorten it, or load the model with a larger context_length."
    assert "Blue" in ask(engine).text


def cancelled_after_first_piece(engine):
    """Cancel an answer from another thread and return the time until its iteration had ended."""
    stream = Stream(engine.stream(TALE, LONG))
    next(stream)
    reader = threading.Thread(target=list, args=(stream,))
    reader.start()
    time.sleep(0.05)
    started = time.perf_counter()
    stream.cancel()
    reader.join(10)
    seconds = time.perf_counter() - started
    assert stream.reply.finish_reason == "cancelled"
    assert 0 < stream.reply.new_tokens < LONG.max_new_tokens
    return seconds


def test_cancel_ends_an_answer_within_a_fifth_of_a_second_and_the_model_goes_on(engine):
    assert min(cancelled_after_first_piece(engine) for _ in range(3)) < 0.2  # the promise; a busy machine may stutter
    assert "Blue" in ask(engine).text


def test_an_answer_that_waits_for_another_can_be_cancelled(engine):
    first, second = (Stream(engine.stream(TALE, LONG)) for _ in range(2))
    next(first)
    waiting = threading.Thread(target=list, args=(second,))
    waiting.start()
    time.sleep(0.1)
    second.cancel()
    waiting.join(1)
    assert not waiting.is_alive()
    assert (second.reply.text, second.reply.finish_reason) == ("", "cancelled")
    first.cancel()


def test_two_threads_can_use_one_model(tiny_engine):
    prompts = ("the", "sky", "blue")
    alone = {prompt: ask(tiny_engine, prompt).text for prompt in prompts}
    replies = {}
    threads = [
        threading.Thread(target=lambda p=prompt: replies.update({p: ask(tiny_engine, p).text})) for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert replies == alone


def test_memory_is_the_childs_and_nothing_after_close(engine, tiny):
    assert sum(part.nbytes for part in engine.memory()) > 100 * 2**20
    other = LlamaCppEngine(tiny("12B", "q4_0"), context_length=256)
    other.close()
    assert other.memory() == ()


def test_closing_twice_does_no_harm_and_a_closed_model_says_so(tiny):
    engine = LlamaCppEngine(tiny("12B", "q4_0"), context_length=256)
    child = psutil.Process(engine._child.pid)
    waiting = engine.stream("the", GREEDY)
    engine.close()
    engine.close()
    assert not child.is_running()
    for call in (lambda: engine.stream("the", GREEDY), lambda: list(waiting)):
        with pytest.raises(ModelClosedError, match=r"closed\. .* Load it again\."):
            call()


def test_closing_during_an_answer_says_so_in_its_thread(tiny):
    engine = LlamaCppEngine(tiny("12B", "q4_0"), context_length=4096)  # long enough not to end by itself
    stream = engine.stream("the", Settings(False, 10_000, 0, 1, 0, None))
    pieces = iter(stream)
    next(pieces)
    engine.close()
    with pytest.raises(ModelClosedError):
        list(pieces)


@pytest.mark.parametrize("when", ["between answers", "during an answer"])
def test_a_child_that_was_killed_is_said(tiny_engine, when):
    stream = Stream(tiny_engine.stream("the", Settings(False, 200, 0, 1, 0, None)))
    if when == "during an answer":
        next(stream)
    tiny_engine._child.send_signal(signal.SIGKILL)
    with pytest.raises(EndpointError) as caught:
        list(stream)
    assert caught.value.wrong == "llama.cpp has stopped (code -9)."
    assert caught.value.allowed == "A loaded model stays up until close()."
    assert "Load it again" in caught.value.next_step
    assert stream.reply.finish_reason == "unfinished"


def test_a_forgotten_model_ends_its_child(tiny):
    engine = LlamaCppEngine(tiny("12B", "q4_0"), context_length=256)
    child = psutil.Process(engine._child.pid)
    del engine
    gc.collect()
    assert psutil.wait_procs([child], timeout=5)[1] == []


def test_a_wrong_key_is_refused_and_the_right_one_is_not_on_show(tiny_engine):
    with pytest.raises(EndpointError, match="refused the key"):
        list(Stream(EndpointEngine(tiny_engine.address, "wrong").stream("the", GREEDY)))
    assert tiny_engine.address.startswith("http://127.0.0.1:")
    child = psutil.Process(tiny_engine._child.pid)
    assert tiny_engine._key not in " ".join([*child.cmdline(), *child.environ().values(), repr(tiny_engine)])


def test_ctrl_c_stays_pythons(engine):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert os.getpgid(engine._child.pid) != os.getpgid(0)  # a terminal's Ctrl-C goes to a whole group


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    ("forced", "thoughts"),
    [('<[100]> "thought\\nthe sky" <[101]> "is blue"', "the sky"), ('"is blue"', ""),
     ('<[100]> "thought\\n" <[101]> "is blue"', "")],
    ids=["thoughts", "none", "an empty block"],
)  # fmt: skip
def test_thoughts_come_apart_from_the_answer(thinking_engine, thinking, forced, thoughts):
    source = thinking_engine.stream(QUESTION, Settings(thinking, 40, 0, 1, 0, None))
    source._body["grammar"] = f"root ::= {forced}"  # what a trained model writes of its own accord
    stream = Stream(source)
    assert "".join(piece for piece in stream if piece.is_thought) == stream.reply.thoughts == thoughts
    assert stream.reply.text == "is blue"


TEXTS = ["the sky is blue", " the  sky\n\n\n", "<bos><|turn>user\nthe<turn|>\n<|channel>thought\nx<channel|>b<eos>",
         "é ü 日本 🙂 \t\r\0", "<0x41><unused9>", "x" * 300]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_words_get_the_ids_of_the_hugging_face_tokenizer(tiny_engine, text):
    ids = post(tiny_engine, "/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
    assert ids == testing.tiny_tokenizer().encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("stop_id", STOP_IDS)
def test_every_stop_id_ends_the_turn(tiny_engine, stop_id):
    answer = post(tiny_engine, "/v1/completions", {"prompt": "the", "max_tokens": 5, "logit_bias": [[stop_id, 1e6]]})
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")
    assert answer["usage"]["completion_tokens"] == 1


def test_another_id_does_not_end_the_turn(tiny_engine):
    answer = post(tiny_engine, "/v1/completions", {"prompt": "the", "max_tokens": 5, "logit_bias": [[98, 1e6]]})
    assert answer["choices"][0]["finish_reason"] == "length"


def test_only_the_settings_of_the_model_card_shape_the_sampling(tiny_engine):
    with_card = {"prompt": "the", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 1, "stream": False}
    assert post(tiny_engine, "/completion", with_card)["generation_settings"]["min_p"] == 0
