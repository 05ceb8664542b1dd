"""A server that has the room's own authority, and says what it likes."""

from __future__ import annotations

import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from strongroom.crypto.authority import Authority
from strongroom.formats.card import Card


class Liar(ThreadingHTTPServer):
    """`answer(method, path, body, headers)` gives status, headers, body (bytes, or an iterable of them)."""

    daemon_threads = True

    def __init__(self, folder, answer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.heard = answer, []
        self.authority = Authority(folder, "liar")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with self.authority.issued(["127.0.0.1"]) as certificate:
            context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def card(self, room=b"r" * 16, log_key=b"l" * 32, signer=b"s" * 32):
        return Card(self.url, room, log_key, signer, self.authority.pem)

    def handle_error(self, request, client_address):
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _do(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.heard.append((self.command, self.path, dict(self.headers)))
        status, headers, answer = self.server.answer(self.command, self.path, body, self.headers)
        if not isinstance(answer, bytes) and not hasattr(answer, "__next__"):
            answer = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if isinstance(answer, bytes):
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in answer:
            self.wfile.write(piece)
        self.close_connection = True

    do_GET = do_POST = do_DELETE = _do  # noqa: N815 - http.server's names

    def log_message(self, *_):
        pass
