"""A small OpenAI-compatible server on this machine, whose latencies and faults a test chooses."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Server:
    """What a running server was asked, and where it is."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


class Fault:
    """What a server does instead of answering: `hang`, `nonsense`, `refuse`, `redirect`, `break`, `plain`, `flood`."""

    def __init__(self, kind: str, where: str = "") -> None:
        self.kind, self.where = kind, where


def even(first_s: float, between_s: float) -> Callable[[int, int, int], list[float]]:
    """Token times of a server whose first token takes `first_s` and each further one `between_s`."""
    return lambda _number, _prompt, output: [first_s + i * between_s for i in range(output)]


@contextmanager
def serving(
    times: Callable[[int, int, int], list[float]],
    *,
    faults: Callable[[int], Fault | None] = lambda _number: None,
    models: Any = ("tiny",),
    usage: bool = True,
) -> Iterator[Server]:
    """A server until the context ends; `faults` are by a request's number, `models` None hides the list of them."""
    lock, count = threading.Lock(), iter(range(1 << 30))
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            found.paths.append(self.path)
            if isinstance(models, Fault):
                self._fail(models)
                return
            if models is None:
                self._whole(404, b"{}")
                return
            self._whole(200, json.dumps({"object": "list", "data": [{"id": name} for name in models]}).encode())

        def do_POST(self) -> None:
            began_s = time.perf_counter()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = next(count)
                found.bodies.append(body)
                found.headers.append(dict(self.headers))
                found.paths.append(self.path)
            fault = faults(number)
            if fault is not None:
                self._fail(fault)
                return
            chat = "messages" in body
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            tokens = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
            self._begin()
            if chat:
                self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            due = times(number, tokens, body["max_tokens"])
            for i, due_s in enumerate(due):
                over.wait(max(0.0, began_s + due_s - time.perf_counter()))
                said: dict[str, Any] = {"delta": {"content": "a"}} if chat else {"text": "a"}
                self._event({"choices": [{**said, "finish_reason": "length" if i == len(due) - 1 else None}]})
            if usage:
                self._event({"choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": len(due)}})
            self._piece(b"data: [DONE]\n\n")
            self._piece(b"")

        def _begin(self, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()

        def _piece(self, content: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
            self.wfile.flush()

        def _event(self, event: dict[str, Any]) -> None:
            self._piece(b"data: " + json.dumps(event).encode() + b"\n\n")

        def _whole(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _fail(self, fault: Fault) -> None:
            match fault.kind:
                case "hang":
                    over.wait(20)
                    self.close_connection = True
                case "stall":
                    self._begin()
                    self._event({"choices": [{"text": "a"}]})
                    over.wait(20)
                    self.close_connection = True
                case "nonsense":
                    self._whole(200, b"<html>\x1b[31mwelcome</html>\n")
                case "plain":
                    self._whole(200, b'{"choices": [{"text": "a"}], "usage": {}}\n')
                case "refuse":
                    self._whole(503, b"overloaded")
                case "error":
                    self._begin()
                    self._event({"error": {"message": "out of memory"}})
                    self._piece(b"")
                case "redirect":
                    self._whole(307, b"", Location=fault.where)
                case "break":
                    self._begin()
                    self._event({"choices": [{"text": "a"}]})
                    self._piece(b"")
                case "flood":
                    self._begin()
                    for _ in range(64):
                        self._piece(b"x" * (1 << 16))
                    self._piece(b"")

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, *_: object) -> None:
            pass  # clients leave as tests ask them to

    server = Quiet(("127.0.0.1", 0), Handler)
    found = Server(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
