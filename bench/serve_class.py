"""Thirty chats at once against `serve`: is any lost or mixed up, and how much faster are they than one after another?

    python bench/serve_class.py [num_chats] [places]

Each chat has its own topic and asks five questions, each with the whole conversation so far. First all chats run at
once, then the same ones one after another on the same server, greedily. None is lost if each got five answers. A batch
rounds the last bits differently, so an answer may part from the one given alone; one that does is mixed up if it names
another chat's topic and not its own. The ratio of the tokens/s is the gain. Run it on a quiet machine.
"""

import re
import sys
import threading
import time

import gemma_qat_kit as gqk

TURNS, NUM_TOKENS = 5, 16
TOPICS = ("rivers", "violins", "volcanoes", "bridges", "owls", "bread", "comets", "harbors",
          "cactus", "chess", "clocks", "dolphins", "tigers", "castles", "honey", "glaciers",
          "lighthouses", "mirrors", "pianos", "rainbows", "sailing", "silk", "spiders", "tea",
          "telescopes", "tulips", "whales", "windmills", "wolves", "yoga")  # fmt: skip


def questions(chat: int) -> list[str]:
    """Return the five questions of a chat, which name its own topic."""
    topic = TOPICS[chat % len(TOPICS)]
    return [f"Tell me fact number {turn} about {topic}." for turn in range(1, TURNS + 1)]


def chat(address: str, key: str, number: int, answers: dict[int, list[str]], tokens: list[int]) -> None:
    """Have one conversation; keep its answers and count their tokens."""
    with gqk.load(address, token=key) as model:
        messages, mine = [], answers.setdefault(number, [])
        for question in questions(number):
            messages.append({"role": "user", "content": question})
            reply = model.chat(messages, temperature=0, max_new_tokens=NUM_TOKENS)
            messages.append(reply.message)
            mine.append(reply.text)
            tokens.append(reply.new_tokens)


def all_at_once(served, num_chats: int) -> tuple[float, dict[int, list[str]], int, int]:
    """Return seconds, answers, tokens, and the longest queue that was seen."""
    answers, tokens, longest = {}, [], 0
    threads = [threading.Thread(target=chat, args=(served.address, served.key, number, answers, tokens))
               for number in range(num_chats)]  # fmt: skip
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        longest = max(longest, getattr(served.queue(), "waiting", 0))
        time.sleep(0.5)
    return time.perf_counter() - started, answers, sum(tokens), longest


def one_after_another(served, num_chats: int) -> tuple[float, dict[int, list[str]], int]:
    """Return seconds, answers and tokens."""
    answers, tokens = {}, []
    started = time.perf_counter()
    for number in range(num_chats):
        chat(served.address, served.key, number, answers, tokens)
    return time.perf_counter() - started, answers, sum(tokens)


def is_mixed_up(chat: int, answer: str) -> bool:
    """Whether an answer names the topic of another chat and not its own."""
    own = TOPICS[chat % len(TOPICS)]
    words = set(re.findall("[a-z]+", answer.lower()))
    named = {topic for topic in TOPICS if words & {topic, topic.rstrip("s")}}
    return bool(named) and own not in named


def main() -> None:
    """Print what was lost, mixed up and gained."""
    num_chats, places = (int(text) for text in (sys.argv[1:3] or (30, 8)))
    with gqk.serve("smollm2-135m", num_chats=places, context_length=1024, report=lambda progress: None) as served:
        gqk.load(served.address, token=served.key).chat("Hello", max_new_tokens=4)
        at_once, together, tokens, longest = all_at_once(served, num_chats)
        print(f"{num_chats} chats at once: {at_once:.0f} s", flush=True)
        in_turn, alone, tokens_alone = one_after_another(served, num_chats)
    lost = sum(len(together.get(number, ())) != TURNS for number in range(num_chats))
    pairs = [(n, *both) for n in range(num_chats) for both in zip(together[n], alone[n], strict=False)]
    same = sum(one == other for _, one, other in pairs)
    mixed = sum(is_mixed_up(n, one) for n, one, other in pairs if one != other)
    rates = tokens / at_once, tokens_alone / in_turn
    print(f"{num_chats} chats of {TURNS} turns at {places} places, at most {longest} waiting at once")
    print(f"lost {lost}, mixed up {mixed}; {same} of {len(pairs)} answers are letter by letter those given alone")
    print(f"at once {rates[0]:.1f} tokens/s, one after another {rates[1]:.1f}: ratio {rates[0] / rates[1]:.2f}")


if __name__ == "__main__":
    main()
