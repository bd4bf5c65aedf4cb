"""A Hugging Face Hub on this machine: the routes by which huggingface_hub downloads and uploads."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator


class Hub:
    """Models by name, each with its files; `asked` lists the requests."""

    def __init__(self):
        self.models: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.gated: set[str] = set()


@contextlib.contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """A hub and its address, which is served until the `with` ends."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def answer(self, code: int, content: bytes = b"", headers: dict | None = None) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": len(content), **(headers or {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, value, code: int = 200) -> None:
            self.answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def refuse(self, kind: str, code: int = 404) -> None:
            self.answer(code, b"{}", {"X-Error-Code": kind, "X-Error-Message": kind})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].strip("/").split("/")
            api = path[:2] == ["api", "models"]
            name = "/".join(path[2:4] if api else path[:2])
            if name not in hub.models:
                return self.refuse("RepoNotFound")
            if name in hub.gated:
                return self.refuse("GatedRepo", 403)
            files = hub.models[name]
            if api and path[4:5] == ["tree"]:
                return self.answer_json(
                    [
                        {"type": "file", "path": file, "size": len(content), "oid": _hash(content)}
                        for file, content in files.items()
                    ]
                )
            if api:
                siblings = [{"rfilename": file} for file in files]
                return self.answer_json({"id": name, "sha": _commit(files), "siblings": siblings})
            file = "/".join(path[4:])  # user/name/resolve/REVISION/FILE
            if file not in files:
                return self.refuse("EntryNotFound")
            headers = {"ETag": f'"{_hash(files[file])}"', "X-Repo-Commit": _commit(files)}
            self.answer(200, files[file], headers)

        def do_POST(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0].strip("/").split("/")
            if path == ["api", "repos", "create"]:
                given = json.loads(sent)
                name = "/".join(filter(None, (given.get("organization", "me"), given["name"])))
                hub.models.setdefault(name, {})
                return self.answer_json({"url": f"http://{self.headers['Host']}/{name}"})
            if path == ["api", "validate-yaml"]:
                return self.answer_json({"errors": [], "warnings": []})
            files = hub.models["/".join(path[2:4])]
            if path[4] == "preupload":
                names = [each["path"] for each in json.loads(sent)["files"]]
                modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                return self.answer_json({"files": modes})
            for line in map(json.loads, sent.splitlines()):  # the commit
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            host = f"http://{self.headers['Host']}/{'/'.join(path[2:4])}"
            self.answer_json(
                {"commitUrl": f"{host}/commit/{_commit(files)}", "commitOid": _commit(files)}
            )

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _commit(files: dict[str, bytes]) -> str:
    return _hash("".join(map(_hash, files.values())).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
