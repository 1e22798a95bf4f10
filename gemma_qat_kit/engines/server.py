"""Reach an OpenAI-compatible server over HTTP, and say in plain words why it does not answer."""

import contextlib
import http.client
import json
import re
import ssl
import urllib.parse

from gemma_qat_kit.errors import BadSettingError, EndpointError, KitError

CONNECT_SECONDS = 10
ANSWER_SECONDS = 600  # to something that is computed, perhaps with weights that are still to be read from the disk
MAX_BYTES = 2**24  # of one answer that is read whole, or one event of a streamed one


class Server:
    """An address and the key to it.

    Args:
        url: Base address, with or without "/v1".
        key: Sent as a bearer token; never printed.

    Raises:
        EndpointError: The address or the key cannot be one.
    """

    def __init__(self, url: str, key: str | None = None):
        self._parts = _split(url)
        path = urllib.parse.quote(self._parts.path, safe="/%~").rstrip("/")
        self._path = path.removesuffix("/v1")
        self._key = _checked_key(key)
        # Each request has its own connection, and its end ends the answer.
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"

    @property
    def address(self) -> str:
        """The server's address without path, user or key."""
        return f"{self._parts.scheme}://{self._parts.netloc.rpartition('@')[2]}"

    def _connect(self) -> http.client.HTTPConnection:
        """Return an open connection."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        try:
            connection = kind(self._parts.hostname, self._parts.port, timeout=CONNECT_SECONDS)
            connection.connect()
        except ssl.SSLError as err:
            raise EndpointError(
                f"{self.address} answers without a valid certificate.", "https needs one.", "Check the address."
            ) from err
        except (OSError, http.client.HTTPException, ValueError) as err:  # ValueError: this can be no host's name
            raise self._no_answer(err) from err
        return connection

    def _request(self, connection, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        """Return the response to a request, whose status is 200."""
        try:
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            if response.status == 200:
                return response
            refusal = response.read(MAX_BYTES)
        except (OSError, http.client.HTTPException) as err:
            raise self._no_answer(err) from err
        raise self._refused(response, refusal)

    def _get(self, path: str) -> object:
        """Return the JSON at a path."""
        try:
            return json.loads(self._read(path))
        except (ValueError, RecursionError) as err:
            raise self._not_a_server() from err

    def _read(self, path: str, body: str | None = None) -> bytes:
        """Return what lies at a path, or answers a body that is sent to it."""
        connection = self._connect()
        try:
            if body is not None:
                connection.sock.settimeout(ANSWER_SECONDS)
            return self._request(connection, "POST" if body else "GET", path, body).read(MAX_BYTES)
        except KitError:
            raise
        except (OSError, http.client.HTTPException) as err:
            raise self._no_answer(err) from err
        finally:
            connection.close()

    def _post(self, path: str, body: dict) -> dict:
        """Return the JSON object that a path beside the API answers with, {} where the server has no such path."""
        connection = self._connect()
        try:
            connection.request("POST", self._path + path, json.dumps(body), self._headers)
            response = connection.getresponse()
            answer = json.loads(response.read(MAX_BYTES)) if response.status == 200 else {}
        except (OSError, http.client.HTTPException) as err:
            raise self._no_answer(err) from err
        except (ValueError, RecursionError):
            return {}
        finally:
            connection.close()
        return answer if isinstance(answer, dict) else {}

    def _refused(self, response: http.client.HTTPResponse, body: bytes) -> KitError:
        """Build the error for a status that is not 200."""
        error = _error_of(body)
        if response.status in (401, 403):
            return EndpointError(f"{self.address} refused the key.", "It wants its own API key.", 'Pass token="…".')
        if response.status in (404, 405) and not error:
            return self._not_a_server()
        if error.get("type") == "exceed_context_size_error":  # llama.cpp's name for it
            return BadSettingError(
                f"The prompt has {error.get('n_prompt_tokens')} tokens.",
                f"With its answer it must fit in context_length={error.get('n_ctx')}.",
                "Shorten it, or load the model with a larger context_length.",
            )
        text = error.get("message") or response.headers.get("Location") or body.decode("utf-8", "replace")
        return EndpointError(
            f"{self.address} answered {response.status}: {self._shown(text)}.",
            "A request within the server's limits gets 200.",
            "Shorten the conversation or max_new_tokens, check the address, or look at the server's log.",
        )

    def _shown(self, text: object) -> str:
        """Return somebody else's text on one short line, and without the key, which it may repeat."""
        text = str(text).replace(self._key, "…") if self._key else str(text)
        return "".join(c if c.isprintable() else " " for c in text[:300]).strip().rstrip(".")

    def _no_answer(self, err: Exception) -> EndpointError:
        return EndpointError(
            f"{self.address} does not answer ({type(err).__name__}).",
            "A running OpenAI-compatible server is needed.",
            "Start the server, or check the address and port.",
        )

    def _not_a_server(self) -> EndpointError:
        return EndpointError(
            f"{self.address}{self._path}/v1 is not an OpenAI-compatible server.",
            "It answers /v1/models and /v1/chat/completions.",
            "Check the address.",
        )


def _split(url: str) -> urllib.parse.SplitResult:
    """Return the parts of a server's address."""
    with contextlib.suppress(ValueError):  # brackets or a port that make no sense
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    shown = re.sub(r"//[^/]*@", "//…@", url).partition("?")[0]  # without what may be a password or a key
    raise EndpointError(f"{shown!r} is not a server's address.", "It looks like http://host:port/v1.", "Check it.")


def _checked_key(key: str | None) -> str:
    """Return a key that fits in a header; the error that `http.client` raises otherwise would print it."""
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable():
        raise EndpointError(
            "The API key has a character that no key has.",
            "It is one line of plain letters, digits and signs.",
            "Copy it again.",
        )
    return key


def _error_of(body: bytes) -> dict:
    """Return the error object in a server's answer, {} where there is none."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return error if isinstance(error, dict) else {"message": error}
