"""Windows of text: what is held out, in which order the rest comes, and that a step alone decides."""

import pytest
import torch
from small_network import TEXT, make_pair

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.qat.batches import DEFAULT_TEXTS, read_windows
from gemma_qat_kit.qat.settings import TrainSettings
from gemma_qat_kit.quality import texts
from gemma_qat_kit.quality.scoring import ModuleScorer


class Letters:
    """Reads a text as one token per character, with a first token 0."""

    context_length = None

    def tokenize(self, text):
        return [0, *map(ord, text)]


def text(first, count):
    """Return so many windows of 16 tokens, each of one letter of its own."""
    return "".join(chr(first + i) * 15 for i in range(count))


def windows_of(*several, **settings):
    return read_windows(Letters(), several, TrainSettings(sequence_length=16, **settings))


def letters(rows):
    """Return the letter of each window."""
    return [chr(row[1]) for row in rows]


def test_a_window_is_the_first_token_and_consecutive_text():
    windows = windows_of(text(65, 20))
    for row in [*windows.sources[0], *windows.held_out]:
        assert row[0] == 0
        assert len(row) == 16
        assert len(set(row[1:].tolist())) == 1
    assert letters(windows.sources[0]) == [chr(65 + i) for i in range(16)]


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (10, 2), (35, 7), (60, 8)])
def test_the_end_of_a_text_is_held_out(count, held_out):
    windows = windows_of(text(65, count), batch_size=1)
    assert letters(windows.held_out) == [chr(65 + i) for i in range(count - held_out, count)]
    assert not set(letters(windows.held_out)) & set(letters(windows.sources[0]))


def test_every_text_gives_its_end():
    windows = windows_of(text(65, 40), text(200, 40), text(300, 3), batch_size=4)
    assert letters(windows.held_out) == [chr(c) for c in (103, 104, 238, 239, 302)]
    many = windows_of(*(text(100 * i, 3) for i in range(1, 11)), batch_size=4)
    assert len(many.held_out) == 10


def test_an_update_never_repeats_a_window_before_all_were_seen():
    windows = windows_of(text(65, 20), batch_size=2, gradient_accumulation=2)
    for epoch in range(3):
        seen = [letter for step in range(4) for letter in letters(windows.batch(4 * epoch + step))]
        assert sorted(seen) == letters(windows.sources[0])
    assert windows.batch(0).shape == (4, 16)


def test_each_time_round_has_another_order_and_each_seed_too():
    orders = [
        tuple(letter for step in range(4) for letter in letters(windows_of(text(65, 20), batch_size=4, seed=seed).batch(
            4 * epoch + step))) for seed in (0, 1) for epoch in (0, 1)
    ]  # fmt: skip
    assert len(set(orders)) == 4


def test_texts_take_turns_however_long_they_are():
    windows = windows_of(text(65, 40), text(300, 5), batch_size=6)
    for step in range(8):
        first, second = letters(windows.batch(step))[::2], letters(windows.batch(step))[1::2]
        assert all(ord(letter) < 300 for letter in first)
        assert all(ord(letter) >= 300 for letter in second)


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    windows, again = windows_of(text(65, 30), seed=7), windows_of(text(65, 30), seed=7)
    torch.manual_seed(1)
    later = again.batch(11)
    assert torch.equal(later, windows.batch(11))
    for step in range(11):
        windows.batch(step)
    assert torch.equal(later, windows.batch(11))


def test_a_part_of_a_window_at_the_end_is_left_out():
    windows = windows_of(text(65, 5) + "z" * 9)
    assert letters([*windows.sources[0], *windows.held_out]) == list("ABCDE")


def test_none_is_the_built_in_text_and_a_path_is_read(tmp_path):
    module, tokenizer = make_pair()
    scorer, settings = ModuleScorer(module, tokenizer), TrainSettings(sequence_length=64)
    default, named = (read_windows(scorer, one, settings) for one in (None, DEFAULT_TEXTS))
    assert torch.equal(default.held_out, named.held_out)
    ids = torch.tensor(scorer.tokenize(texts.read(DEFAULT_TEXTS[0]).content)[:64])
    assert torch.equal(default.sources[0][0], ids)
    path = tmp_path / "mine.txt"
    path.write_text(TEXT)
    assert torch.equal(read_windows(scorer, path, settings).held_out, read_windows(scorer, TEXT, settings).held_out)


TOO_SHORT = [([text(65, 1) + "zz"], 1, 1), ([text(65, 5)], 5, 5), ([text(65, 9), "z" * 20], 1, 10)]


@pytest.mark.parametrize(("several", "batch_size", "count"), TOO_SHORT)
def test_a_text_that_is_too_short_is_an_error_that_counts(several, batch_size, count):
    message = rf"has {count} windows of 16 tokens\. An update takes {batch_size}, .*longer text, or TrainSettings"
    with pytest.raises(BadSettingError, match=message):
        windows_of(*several, batch_size=batch_size)


def test_no_text_at_all_is_an_error():
    with pytest.raises(BadSettingError, match=r"no text to train on\. .*text=None"):
        read_windows(Letters(), [], TrainSettings())


def test_a_window_longer_than_the_model_can_read_is_an_error():
    module, tokenizer = make_pair()
    with pytest.raises(BadSettingError, match="512"):
        read_windows(ModuleScorer(module, tokenizer), TEXT, TrainSettings(sequence_length=1024))


class Template(Letters):
    """Writes conversations as Gemma's template does, after a first token that each window has already."""

    bos_token = "^"

    @property
    def tokenizer(self):
        return self

    def apply_chat_template(self, messages, tokenize):
        return "^" + "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_conversations_are_written_out_by_the_models_own_template():
    said = [[{"role": "user", "content": "x" * 9}, {"role": "model", "content": "y" * 14}] for _ in range(9)]
    windows = read_windows(Template(), [text(65, 8), said], TrainSettings(sequence_length=16))
    read = "".join(chr(c) for row in [*windows.sources[1], *windows.held_out[1:]] for c in row[1:])
    written = ("<user>" + "x" * 9 + "<model>" + "y" * 14) * 9
    assert written.startswith(read)
    assert len(read) > len(written) - 16
    alone = read_windows(Template(), said, TrainSettings(sequence_length=16))
    assert torch.equal(alone.sources[0][: len(windows.sources[1])], windows.sources[1])


@pytest.mark.parametrize("wrong", [[["no message"]], [[{"role": "user"}]], 7])
def test_what_is_no_conversation_is_refused(wrong):
    with pytest.raises(BadSettingError, match=r"cannot be written as this model sees them.*Mend the conversations"):
        read_windows(Template(), [wrong], TrainSettings(sequence_length=16))
    with pytest.raises(BadSettingError, match="cannot be written"):
        read_windows(Letters(), [wrong], TrainSettings(sequence_length=16))
