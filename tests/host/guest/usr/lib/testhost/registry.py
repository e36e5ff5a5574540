#!/usr/bin/env python3
"""A read-only image registry on 127.0.0.1:5000, for tests that pull (OCI distribution-spec 1.1, "Pull").

It serves the test images that `tests/images/build` put below ROOT: ROOT/tags/NAME/TAG holds a digest,
ROOT/blobs/sha256/HEX the content. containerd asks it for every registry (/etc/containerd/certs.d/_default),
so that an image has the name which a test wants, whatever host is in it.
"""

import http.server
import json
import pathlib
import re
import shutil

ROOT = pathlib.Path("/var/lib/kata-rs-test/registry")
ADDRESS = ("127.0.0.1", 5000)
REQUEST = re.compile(r"/v2/(?P<name>[a-z0-9][a-z0-9._/-]*)/(?P<kind>manifests|blobs)/(?P<reference>[A-Za-z0-9_.:-]+)(?:\?.*)?")
DIGEST = re.compile(r"sha256:(?P<hex>[0-9a-f]{64})")


def content(kind, name, reference):
    """The file and the digest that a request means, or None."""
    digest = reference
    if kind == "manifests" and not DIGEST.fullmatch(reference):
        tag = ROOT / "tags" / name / reference
        if ".." in tag.parts or not tag.is_file():
            return None
        digest = tag.read_text().strip()
    found = DIGEST.fullmatch(digest)
    blob = ROOT / "blobs/sha256" / found["hex"] if found else None
    return (blob, digest) if blob and blob.is_file() else None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.rstrip("/") == "/v2":
            self.answer(200, "application/json", b"{}")
            return
        request = REQUEST.fullmatch(self.path)
        found = content(**{key: request[key] for key in ("kind", "name", "reference")}) if request else None
        if not found:
            error = "MANIFEST_UNKNOWN" if request and request["kind"] == "manifests" else "BLOB_UNKNOWN"
            self.answer(404, "application/json", json.dumps({"errors": [{"code": error, "message": f"{self.path} is not here"}]}).encode())
            return
        blob, digest = found
        kind = "application/octet-stream"
        if request["kind"] == "manifests":
            kind = json.loads(blob.read_bytes())["mediaType"]
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(blob.stat().st_size))
        self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        if self.command == "GET":
            with open(blob, "rb") as file:
                shutil.copyfileobj(file, self.wfile)

    do_HEAD = do_GET

    def answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(ADDRESS, Handler).serve_forever()
