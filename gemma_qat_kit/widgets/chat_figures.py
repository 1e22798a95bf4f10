"""What a ChatPanel says in numbers: speed, memory, and how full the context is."""

from gemma_qat_kit.chat.conversation import Turn
from gemma_qat_kit.units import readable_bytes
from gemma_qat_kit.widgets.look import escape

_ENDS = {"cancelled": "Stopped.", "length": "Cut off: it reached the longest answer or the end of the context."}


def speed_words(reply, session) -> str:
    """Say how long an answer was, how fast it came and could come, what the model holds, and why it ended."""
    speed = f" at {reply.tokens_per_second:.3g} tokens/s" if reply.tokens_per_second else ""
    if speed and session.limit is not None:
        share = reply.tokens_per_second / session.limit.tokens_per_second
        speed += f" ({100 * share:.0f} % of what this machine's memory allows)"
    held = f"; the model holds {readable_bytes(session.memory_bytes)}" if session.memory_bytes else ""
    said = f"{counted(reply.new_tokens, 'token')}{speed}, the first after {reply.first_token_seconds:.2g} s{held}."
    return " ".join(filter(None, (said, _drafted(reply, session.model), _ENDS.get(reply.finish_reason, ""))))


def _drafted(reply, model) -> str:
    """Say how many of the drafter's guesses were right, or why it is off."""
    if reply.acceptance_rate is None:
        return model.drafter_note or ""
    return f"Of {counted(reply.drafted_tokens, 'guess')} of the drafter {100 * reply.acceptance_rate:.0f} % were right."


def counted(number: int, noun: str) -> str:
    """Write "1 token" or "1,200 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def end_note(turn: Turn) -> str:
    """Say below an answer what a reader must know: that it is not whole, what it wants called, what was left out."""
    calls = [f"It wants this called: {_call_words(call)}." for call in turn.tool_calls]
    dropped = turn.timings.get("num_dropped")
    left_out = f"No room for all: the oldest {counted(dropped, 'message')} left out." if dropped else ""
    return " ".join(filter(None, (_ENDS.get(turn.timings.get("finish_reason"), ""), *calls, left_out)))


def _call_words(call: dict) -> str:
    """Write a call as Python would; a file may hold anything in its place."""
    function = call.get("function")
    if call.get("unread") or not isinstance(function, dict):
        return f"{call.get('unread')} (it cannot be read)"
    arguments = function.get("arguments")
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) if isinstance(arguments, dict) else ""
    return f"{function.get('name')}({given})"


def meter_html(used: int | None, length: int | None) -> str:
    """Draw how much of the context the conversation takes, and say what happens when it is full."""
    if length is None:
        return '<div class="gqk-text gqk-quiet">Context: the server does not say how long it is.</div>'
    share = min((used or 0) / length, 1)
    words = f"Context: {used or 0:,} of {length:,} tokens" if used is not None else f"Context: up to {length:,} tokens"
    if share > 0.75:
        words += "; when it is full, the oldest messages are left out of the prompt, and the answer says so"
    colour = "#D55E00" if share > 0.75 else "#0072B2"
    bar = f'<div style="width:{100 * share:.1f}%;background:{colour}"></div>'
    return (
        f'<div class="gqk-text gqk-quiet">{escape(words)}.<div class="gqk-bar" role="img" '
        f'aria-label="{100 * share:.0f} % of the context is used">{bar}</div></div>'
    )
