#!/usr/bin/env python3
"""Shows how a function of your own, in Python, answers stoop: it keeps a list of
users to be locked out, and puts the user of the alert on it. It needs nothing but
Python 3 and can be copied as it is; docs/functions.md has what is asked and answered.

    block_user.py call --url tls://127.0.0.1:4222 --ca tls.crt --user block-user \\
        --password-file password          answers the responder call
    block_user.py http --key-file key     answers the responder webhook-call
"""

import argparse
import hashlib
import hmac
import http.server
import json
import pathlib
import re
import socket
import ssl
import sys
import time
import urllib.parse

# What a name may be. Attackers choose it: without this a line break in it would put
# others on the list.
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


def block(question, blocked):
    """Puts the user of the alert on the list, once, and returns the answer."""
    user = question.get("alert", {}).get("output_fields", {}).get("user.name")
    if not isinstance(user, str) or not USER.fullmatch(user):
        return {"status": "refused", "reason": "the alert names no user that could be locked out"}
    if blocked.exists() and user in blocked.read_text().split("\n"):
        return {"status": "nothing", "reason": user + " is on the list", "found": {"user": user}}
    with blocked.open("a") as f:
        f.write(user + "\n")
    return {"status": "done", "reason": user + " is on the list now", "found": {"user": user}}


def answer(body, blocked):
    """The answer to what stoop asked, as it is sent."""
    try:
        said = block(json.loads(body), blocked)
    except Exception as e:  # whatever it is, stoop shall hear of it
        said = {"status": "failed", "reason": repr(e)}
    return json.dumps(said).encode()


class NATS:
    """As much of a NATS client as it takes to answer. There are whole ones for
    Python, such as nats-py, which reconnect by themselves."""

    def __init__(self, url, ca, user, password):
        at = urllib.parse.urlsplit(url)
        raw = socket.create_connection((at.hostname, at.port or 4222), timeout=10)
        # The server speaks first, and what comes after its first line is TLS.
        info = b""
        while not info.endswith(b"\n"):
            byte = raw.recv(1)
            if not byte:
                raise ConnectionError("stoop has hung up")
            info += byte
        tls = ssl.create_default_context(cafile=ca).wrap_socket(raw, server_hostname=at.hostname)
        self.file = tls.makefile("rwb")
        self.send("CONNECT " + json.dumps({
            "user": user, "pass": password, "verbose": False, "pedantic": False,
            "tls_required": True, "lang": "python", "version": "1", "name": "block_user",
        }))
        self.socket = tls

    def send(self, line, body=None):
        self.file.write(line.encode() + b"\r\n" + (b"" if body is None else body + b"\r\n"))
        self.file.flush()

    def serve(self, subject, respond):
        # In a queue group one of several such programs is asked, not all of them.
        self.send(f"SUB {subject} block-user 1")
        self.send("PING")
        ready = False
        while line := self.file.readline():
            verb, *words = line.decode().split()
            if verb == "PING":
                self.send("PONG")
            elif verb == "PONG" and not ready:
                ready = True
                self.socket.settimeout(None)
                print("listening", flush=True)
            elif verb == "-ERR":
                raise ConnectionError(line.decode().strip())
            elif verb == "MSG":
                body = self.file.read(int(words[-1]) + 2)[:-2]
                if len(words) == 4:  # subject, subscription, where to answer, size
                    said = respond(body)
                    self.send(f"PUB {words[2]} {len(said)}", said)
        raise ConnectionError("stoop has hung up")


def by_nats(args):
    password = args.password_file.read_text().strip() if args.password_file else ""
    while True:
        try:
            NATS(args.url, args.ca, args.user, password).serve(args.subject, lambda b: answer(b, args.list))
        except OSError as e:
            if "Violation" in str(e):
                sys.exit(f"block_user: {e}")
            print(f"block_user: {e}; again in a second", file=sys.stderr, flush=True)
            time.sleep(1)  # stoop may restart


def signed(header, body, key):
    """Whether the header X-Stoop-Signature (t=TIME,v1=SIGNATURE) is of this body, and
    not older than five minutes, so that nobody can send it again later."""
    parts = dict(p.split("=", 1) for p in (header or "").split(",") if "=" in p)
    at, signature = parts.get("t", ""), parts.get("v1", "")
    if not at.isdecimal() or not at.isascii() or abs(time.time() - int(at)) > 300:
        return False
    want = hmac.new(key, at.encode() + b"." + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(want.encode(), signature.encode())


def by_http(args):
    key = args.key_file.read_bytes().strip()

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self):
            size = int(self.headers.get("Content-Length") or 0)
            if size > 4 << 20:
                return self.reply(413, b"")
            body = self.rfile.read(size)
            if not signed(self.headers.get("X-Stoop-Signature"), body, key):
                return self.reply(401, b"not signed by stoop, or too old")
            self.reply(200, answer(body, args.list))

        def reply(self, code, body):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    host, _, port = args.listen.rpartition(":")
    # One question after the other.
    server = http.server.HTTPServer((host, int(port)), Handler)
    print(f"listening on http://{host}:{server.server_port}", flush=True)
    server.serve_forever()


def main():
    path = pathlib.Path
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(required=True)
    nats = ways.add_parser("call", help="answer the responder call")
    nats.add_argument("--url", default="tls://127.0.0.1:4222", help="stoop's broker.listen")
    nats.add_argument("--ca", help="the authority that signed its certificate, a PEM file (default: the system's)")
    nats.add_argument("--user", default="", help="a name of broker.users")
    nats.add_argument("--password-file", type=path, help="a file that holds the password")
    nats.add_argument("--subject", default="functions.block-user", help="one of the user's serve")
    nats.set_defaults(run=by_nats)
    web = ways.add_parser("http", help="answer the responder webhook-call")
    web.add_argument("--listen", default="127.0.0.1:8080", help="host:port; put TLS in front of it")
    web.add_argument("--key-file", type=path, required=True, help="a file that holds the rule's signingKey")
    web.set_defaults(run=by_http)
    for way in nats, web:
        way.add_argument("--list", type=path, default=path("blocked-users"), help="the file with the list")
    args = parser.parse_args()
    try:
        args.run(args)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
