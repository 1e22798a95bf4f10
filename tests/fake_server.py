"""An OpenAI-compatible server on 127.0.0.1 that answers what a test tells it to, and remembers what it was asked."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STALL = object()
"""In an answer: send nothing more until the test is over."""


class FakeServer(ThreadingHTTPServer):
    """A server that lists `models` and streams `answer`, a list of byte chunks.

    `status` other than 200 sends `body` instead. `closes` speaks HTTP/1.0, where the end of the connection is the end
    of the answer. `cuts` ends the connection without the last chunk.
    """

    daemon_threads = True

    def __init__(self, answer=(), *, models=("model-a",), status=200, body=b"", closes=False, cuts=False, headers=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.status, self.body, self.closes, self.cuts = answer, status, body, closes, cuts
        self.models = (
            models if isinstance(models, bytes) else json.dumps({"data": [{"id": m} for m in models]}).encode()
        )
        self.models_status, self.extra_headers = 200, dict(headers)
        self.pages = {}  # what else it has: end of the path -> bytes
        self.asked, self.over, self.stalls = [], threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Say nothing of a client that has gone."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._note(None)
        pages = {"/v1/models": self.server.models} | self.server.pages
        known = next((pages[end] for end in pages if self.path.endswith(end)), None)
        self._send(self.server.models_status if known is not None else 404, known or b"no")

    def do_POST(self):
        self._note(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.server.status != 200:
            self._send(self.server.status, self.server.body)
            return
        if self.server.answer and self.server.answer[0] is STALL:
            self._stall()
        if self.server.closes:
            self.protocol_version = "HTTP/1.0"
        self.send_response(200)
        if not self.server.closes:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            self._stream()

    def _note(self, body):
        self.server.asked.append((self.command, self.path, dict(self.headers), body))

    def _stall(self):
        self.server.stalls.set()
        self.server.over.wait(30)

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.server.extra_headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self):
        for chunk in self.server.answer:
            if chunk is STALL:
                self._stall()
            else:
                self.wfile.write(chunk if self.server.closes else b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.wfile.flush()
        if not (self.server.closes or self.server.cuts):
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


def event(delta=None, finish_reason=None, **more):
    """One event of a chat answer."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return b"data: " + json.dumps({"choices": choices} | more).encode() + b"\n\n"


def answer_of(*texts, reason="stop"):
    """A whole answer: role, texts, end, counts."""
    usage = {"prompt_tokens": 5, "completion_tokens": len(texts)}
    pieces = [event({"content": text}) for text in texts]
    return [event({"role": "assistant"}), *pieces, event({}, reason), event(usage=usage), b"data: [DONE]\n\n"]
