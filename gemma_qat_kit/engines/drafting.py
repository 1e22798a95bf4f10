"""Whether an MTP drafter is worth its work on this machine: decided once, from measured speeds, and said."""

MIN_TOKENS = 32  # of the first answers, before anything is decided


def pays(drafted_speed: float, plain_speed: float) -> bool:
    """Tell whether a drafter makes a model faster, both speeds in tokens/s."""
    return drafted_speed > plain_speed


class Drafting:
    """The trial of a drafter: the first answers are drafted and timed, then it stays on or is switched off.

    Args:
        plain_speed: Tokens/s of the model without its drafter, measured when it was loaded.
    """

    def __init__(self, plain_speed: float):
        self.plain_speed, self.drafted_speed, self.is_on = plain_speed, None, True
        self._tokens, self._seconds = 0, 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Take the time of a drafted answer, and decide once enough tokens were timed.

        Args:
            num_tokens: Generated after the first one.
            seconds: From the first token to the last.
        """
        if self.drafted_speed is not None or num_tokens < 1 or seconds <= 0:
            return
        self._tokens, self._seconds = self._tokens + num_tokens, self._seconds + seconds
        if self._tokens >= MIN_TOKENS:
            self.drafted_speed = self._tokens / self._seconds
            self.is_on = pays(self.drafted_speed, self.plain_speed)

    @property
    def note(self) -> str:
        """What was decided and why, as a sentence."""
        if self.drafted_speed is None:
            return f"The drafter is on; after {MIN_TOKENS} tokens it is decided whether it pays."
        speeds = f"{self.drafted_speed:.3g} tokens/s with it, {self.plain_speed:.3g} without"
        if self.is_on:
            return f"The drafter stays on: {speeds}, measured here on the first answers."
        return f"The drafter is switched off, it does not pay: {speeds}, measured here on the first answers."
