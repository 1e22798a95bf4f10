"""An answer that a conversation waits for: its pieces as they come, and its place in the conversation at the end."""

from gemma_qat_kit.chat.context import Fit
from gemma_qat_kit.generation import Delta, Reply, Stream
from gemma_qat_kit.tools import call_message


class Answer:
    """An answer as it comes: iterate over it for its pieces, read `reply` at any time.

    When it ends, by itself, by `cancel` or by an error, the conversation keeps what was said.

    Args:
        conversation: Where it belongs.
        stream: What the model writes.
        question: The turn that is answered; its number is -1 while the conversation does not have it.
        model: What answers, for the record.
        settings: Those of `Model.stream`.
        fit: What of the conversation the model reads.
    """

    def __init__(self, conversation, stream: Stream, question, model: str, settings: dict, fit: Fit):
        self._conversation, self._stream, self._question = conversation, stream, question
        self._model, self._settings, self.fit, self._is_kept = model, settings, fit, False

    def __iter__(self) -> "Answer":
        return self

    def __next__(self) -> Delta:
        try:
            return next(self._stream)
        except BaseException:  # StopIteration, Ctrl-C, a server that is gone: what was said stays
            self._keep()
            raise

    def cancel(self) -> None:
        """Stop the answer, from any thread; the iteration then ends, and what was said stays."""
        self._stream.cancel()

    def finish(self) -> Reply:
        """Wait for the end and return the reply."""
        for _ in self:
            pass
        return self.reply

    @property
    def reply(self) -> Reply:
        """The answer so far."""
        return self._stream.reply

    def _keep(self) -> None:
        reply = self.reply
        calls = [call_message(call) | {"unread": call.text} for call in reply.tool_calls]
        if self._is_kept or not (reply.text or reply.thoughts or calls):
            return
        self._is_kept = True
        self._conversation.keep(
            self._question,
            content=reply.text,
            thoughts=reply.thoughts,
            tool_calls=tuple(calls),
            model=self._model,
            settings=self._settings,
            timings=timings(reply) | {"num_dropped": self.fit.num_dropped},
        )


def timings(reply: Reply) -> dict:
    """Return what was measured of an answer, without what it says."""
    said = ("text", "thoughts", "tool_calls")
    return {name: value for name, value in vars(reply).items() if name not in said}
