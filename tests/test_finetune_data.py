"""Datasets: what is read, what is refused with its line, and which tokens of a conversation are learnt."""

import csv
import json
import sys

import pytest
import torch
from small_network import make_pair

from gemma_qat_kit.errors import BadSettingError, MissingLibraryError
from gemma_qat_kit.finetune.conversations import PAIRS, read_conversations
from gemma_qat_kit.finetune.examples import IGNORED, make_batch, make_examples, written
from gemma_qat_kit.testing import CHAT_TEMPLATE

SAID = [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "is blue"}]


def tokenizer(template=CHAT_TEMPLATE):
    found = make_pair()[1]
    found.chat_template = template
    return found


def learnt(example, tokenizer):
    """Return the text of each run of learnt tokens."""
    runs, last = [], False
    for number, wanted in zip(example.ids, example.is_learnt, strict=True):
        if wanted:
            runs = [*runs[:-1], [*runs[-1], number]] if last else [*runs, [number]]
        last = wanted
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["list", "jsonl", "json", "csv"])
def test_a_question_and_an_answer_are_read_from_everywhere(tmp_path, pair, kind):
    row = {pair[0]: "the sky", pair[1]: "is blue"}
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    elif kind == "json":
        path.write_text(json.dumps([row, row]))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, pair)
            writer.writeheader()
            writer.writerows([row, row])
    assert read_conversations([row, row] if kind == "list" else str(path)) == [SAID, SAID]


@pytest.mark.parametrize("row", [SAID, {"messages": SAID}, {"conversations": [
    {"from": "human", "value": "the sky"}, {"from": "gpt", "value": "is blue"}]}])  # fmt: skip
def test_messages_are_read_under_their_usual_names(row):
    assert read_conversations([row]) == [SAID]


def test_an_instruction_may_have_an_input():
    (messages,) = read_conversations([{"instruction": "Say it.", "input": "blue", "output": "sky"}])
    assert messages[0]["content"] == "Say it.\n\nblue"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "it has the columns text"),
        ({"messages": []}, "it has the columns messages"),
        ([], "it has no messages"),
        ([SAID[0]], "nobody answers in it"),
        ([{"role": "robot", "content": "a"}], "a message has the role 'robot'"),
        ([SAID[0], {"role": "assistant", "content": " "}], "a message of the assistant is empty"),
        (["hello"], "a message is str"),
        (7, "it is int"),
        ({"prompt": "a", "completion": None}, "a message of the assistant is empty"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(tmp_path, row, said):
    with pytest.raises(BadSettingError, match=r"row 2: .*A row is .*Mend the row") as caught:
        read_conversations([SAID, row])
    assert said in str(caught.value)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(SAID) + "\n\n" + json.dumps(row))
    with pytest.raises(BadSettingError, match=r"data.jsonl, line 3: "):
        read_conversations(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"prompt": ', "a.jsonl, line 1: it is not JSON"),
        ("a.json", b"{}", "a.json: it is no list"),
        ("a.csv", b'prompt,completion\n"a,b', "a.csv, line"),
        ("a.jsonl", b"\xff\xfe", "byte 0 is not UTF-8"),
        ("a.jsonl", b"\n\n", "The dataset is empty"),
        ("a.parquet", b"", "no dataset that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadSettingError, match=said):
        read_conversations(tmp_path / name)


def test_what_is_nothing_is_refused(tmp_path):
    with pytest.raises(BadSettingError, match="No such file"):
        read_conversations(tmp_path / "a.jsonl")
    for nothing in (None, 7, {"prompt": "a"}):
        with pytest.raises(BadSettingError, match="is no dataset"):
            read_conversations(nothing)
    with pytest.raises(BadSettingError, match="The dataset is empty"):
        read_conversations([])


def test_a_dataset_of_the_hub_needs_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingLibraryError, match="pip install datasets"):
        read_conversations("owner/name")


def test_a_dataset_of_the_hub_is_its_train_split(monkeypatch):
    class Hub:
        @staticmethod
        def load_dataset(name, split):
            if name == "owner/gone":
                raise OSError("404")
            return [{"messages": SAID}] if split == "train" else []

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert read_conversations("owner/name") == [SAID]
    with pytest.raises(BadSettingError, match="owner/gone cannot be read: 404"):
        read_conversations("owner/gone")


def test_only_the_assistants_turns_are_learnt_with_their_end():
    words, said = tokenizer(), [{"role": "system", "content": "the user"}, *SAID, *SAID]
    (example,) = make_examples([said], words, 256).train
    assert learnt(example, words) == ["is blue<turn|>\n"] * 2
    assert words.decode(example.ids) == words.apply_chat_template(said, tokenize=False)


def test_an_empty_thought_before_an_answer_belongs_to_the_question():
    asks = CHAT_TEMPLATE.replace("'<|turn>model\\n' }}{% endif", "'<|turn>model\\n<|channel>' }}{% endif")
    template = asks.replace("message['role']) + '\\n' -}}", "message['role']) + '\\n' -}}{% if message['role'] == "
                            "'assistant' %}{{ '<|channel>' }}{% endif %}")  # fmt: skip
    text, ((start, end),) = written(SAID, tokenizer(template))
    assert text[start:end] == "is blue<turn|>\n"
    assert text[:start].endswith("<|channel>")


@pytest.mark.parametrize(
    ("template", "said"),
    [("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}",
      "does not show where an answer begins"),
     ("{{ raise_exception('no') }}", "cannot write a conversation: no"), (None, "cannot write a conversation")],
)  # fmt: skip
def test_a_template_that_does_not_show_the_answer_is_refused(template, said):
    conversation = [SAID[0], {"role": "assistant", "content": "Another"}, *SAID]
    with pytest.raises(BadSettingError, match=said):
        written(conversation, tokenizer(template))


def test_long_conversations_are_cut_and_counted():
    words = tokenizer()
    short, long = SAID, [SAID[0], {"role": "assistant", "content": "blue " * 100}]
    question = [{"role": "user", "content": "blue " * 100}, SAID[1]]
    found = make_examples([short] * 10 + [long, question], words, 40)
    assert (found.num_cut, found.num_empty) == (2, 1)
    assert len(found.train) == 9
    assert len(found.held_out) == 2
    assert len(found.held_out[-1].ids) == 40
    assert "2 were cut, 1 of these left out" in str(found)
    with pytest.raises(BadSettingError, match=r"Nothing is left to learn.*sequence_length=160"):
        make_examples([question], words, 40)


def test_a_batch_is_filled_up_and_asks_for_what_is_learnt():
    words = tokenizer()
    found = make_examples([SAID, [SAID[0], {"role": "assistant", "content": "blue"}]], words, 64).train
    batch = make_batch(found, 0, "cpu")
    lengths = [len(example.ids) for example in found]
    assert batch.ids.shape == (2, max(lengths))
    assert batch.mask.sum(-1).tolist() == lengths
    assert torch.equal(batch.labels[batch.labels != IGNORED], batch.ids[batch.labels != IGNORED])
    assert batch.num_learnt == sum(example.num_learnt for example in found)


def test_a_digest_tells_examples_apart():
    words, other = tokenizer(), [SAID[0], {"role": "assistant", "content": "is the sky"}]
    digests = {make_examples(rows, words, 64).digest for rows in ([SAID], [other], [SAID, other], [other, SAID])}
    assert len(digests) == 4
    assert make_examples([SAID], words, 64).digest in digests
