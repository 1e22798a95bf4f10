"""Whom llama.cpp's server answers: how many chats at once, at which address, with which key."""

import errno
import ipaddress
import secrets
import socket
import urllib.parse
from dataclasses import dataclass, field

from gemma_qat_kit.errors import BadSettingError
from gemma_qat_kit.memory.key_values import KEPT_MIB
from gemma_qat_kit.memory.settings import check_count

MOST_CHATS = 256  # llama.cpp's LLAMA_MAX_SEQ
_KEY_LENGTH = 8  # the shortest that is taken
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without those that look like another when they are copied from a wall


def draw_key() -> str:
    """Return a key of 79 random bits that a class can copy from a wall, as in "k7dm-…"."""
    letters = "".join(secrets.choice(_LETTERS) for _ in range(16))
    return "-".join(letters[start : start + 4] for start in range(0, 16, 4))


@dataclass(frozen=True)
class Serving:
    """Whom a server answers; as it is, this process alone.

    Attributes:
        num_chats: Answers that it computes at once; each has a context of its own.
        host: The address of this machine that it listens at.
        port: 0 takes a free one.
        key: What every request must carry.

    Raises:
        BadSettingError: A number out of range, or a key that is no good.
    """

    num_chats: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    key: str = field(default_factory=draw_key, repr=False)

    def __post_init__(self) -> None:
        check_count("num_chats", self.num_chats, MOST_CHATS)
        if not isinstance(self.port, int) or isinstance(self.port, bool) or not 0 <= self.port <= 65535:
            raise BadSettingError(
                f"port={self.port!r} cannot be used.", "It is a whole number up to 65535.", "Try port=0, a free one."
            )
        key = self.key if isinstance(self.key, str) else ""
        if len(key) < _KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise BadSettingError(
                f"A key of {len(key)} characters like this one cannot be used.",
                f"A key is always required: {_KEY_LENGTH} or more plain letters, digits and signs, without spaces.",
                "Leave key out, and one is drawn.",
            )

    @property
    def kept_mib(self) -> int:
        """MiB for conversations whose place another one took: with them they go on without being read again."""
        return KEPT_MIB * self.num_chats if self.num_chats > 1 else 0

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        address = _ip_address(self.host)
        return self.host == "localhost" if address is None else address.is_loopback

    def check_address(self) -> None:
        """Listen for a moment, to refuse an address before anything is loaded for it.

        Raises:
            BadSettingError: The port is taken or not allowed, or the host is no address of this machine.
        """
        family = socket.AF_INET6 if ":" in str(self.host) else socket.AF_INET
        try:
            socket.create_server((self.host, self.port), family=family).close()
        except (OSError, TypeError, UnicodeError) as err:
            raise self._unusable(err) from err

    def _unusable(self, err: Exception) -> BadSettingError:
        code = getattr(err, "errno", None)
        if code in (errno.EADDRINUSE, errno.EACCES):
            why = "is taken" if code == errno.EADDRINUSE else "is not allowed to this user"
            return BadSettingError(
                f"Port {self.port} of {self.host} {why}.",
                "A server needs a port of its own, above 1023 for most users.",
                "Leave port=0, which takes a free one, or close the other server.",
            )
        return BadSettingError(
            f"host={self.host!r} is no address of this machine.",
            '"127.0.0.1" is reached by this machine only, "0.0.0.0" by all of its network.',
            'Leave host="127.0.0.1", or try host="0.0.0.0".',
        )

    def url_here(self, listening: str) -> str:
        """Return how this process reaches a server that listens at `listening`, "http://host:port"."""
        return listening.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")

    def url_for_others(self, url: str) -> str:
        """Return the address to give to those who shall use the server that this process reaches by `url`."""
        address, port = _ip_address(self.host), urllib.parse.urlsplit(url).port
        host = _lan_address() if address is not None and address.is_unspecified else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _lan_address() -> str:
    """Return this machine's address in its network, its name where it has none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of nobody (RFC 5737); connecting only picks a way to it
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
