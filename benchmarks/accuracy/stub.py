"""An OpenAI-like server in a thread, for tests and dry runs of the harness: answers by a function, fails as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


class Stub:
    """answer(body) -> text. fail(body, earlier) -> an HTTP status to fail with or None, `earlier`: how often the
    same body was asked before."""

    def __init__(
        self,
        answer: Callable[[Body], str],
        fail: Callable[[Body, int], int | None] = lambda body, earlier: None,
        report: Callable[[Body], dict[str, Any] | None] = lambda body: None,
        port: int = 0,
    ) -> None:
        self.bodies: list[Body] = []
        self.in_flight = self.most_in_flight = 0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def _send(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self._send(200, {"object": "list", "data": [{"id": "stub", "object": "model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    earlier = stub.bodies.count(body)
                    stub.bodies.append(body)
                    stub.in_flight += 1
                    stub.most_in_flight = max(stub.most_in_flight, stub.in_flight)
                status = fail(body, earlier)
                text = answer(body)
                with lock:
                    stub.in_flight -= 1
                if status is not None:
                    self._send(status, {"error": {"message": "as told", "type": "test", "code": status}})
                    return
                chat = "messages" in body
                choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
                choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
                content: dict[str, Any] = {
                    "id": "x",
                    "object": "chat.completion" if chat else "text_completion",
                    "created": 0,
                    "model": "stub",
                    "choices": [choice],
                    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
                }
                if (entry := report(body)) is not None:
                    content["calidrop"] = [entry]
                self._send(200, content)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Stub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
