"""A replacement for Hugging Face's hub: a local HTTP server that serves directories as models."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


@contextlib.contextmanager
def serving(models, revisions=("main",)):
    """Serve directories by model id. Yield the environment variables for the client, and a list of requested files."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, content, status=200, **headers):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            parts = parts[2:] if is_api else parts
            verb = next((i for i, part in enumerate(parts) if part in ("revision", "tree", "resolve")), len(parts))
            model, (revision, *rest) = "/".join(parts[:verb]), [*parts[verb + 1 :], "main"][:]
            if model not in models:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if revision not in (*revisions, COMMIT):
                return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            directory = models[model]
            if is_api:
                names = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
                files = [
                    {"type": "file", "path": n, "size": (directory / n).stat().st_size, "oid": etag(directory / n)}
                    for n in names
                ]
                info = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self.answer(files if parts[verb] == "tree" else info)
            file = directory.joinpath(*rest[:-1])
            if not file.is_file():
                return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                asked.append(file.name)
            return self.answer(file.read_bytes(), ETag=f'"{etag(file)}"')

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()
