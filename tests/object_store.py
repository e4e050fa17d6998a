"""An S3 server in a process of its own, which notes its requests.

Not in a thread of the test process: ranks that are forked from there would miss it.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3


class ObjectStore:
    """A client of it that starts no threads, and the requests it has had."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.client: Any = boto3.client("s3")
        self._log = log
        self._seen = 0

    def new_requests(self) -> list[dict[str, Any]]:
        """Those since the last call: method, path, query, and the bytes that came back."""
        lines = self._log.read_text().splitlines()
        new, self._seen = lines[self._seen :], len(lines)
        return [json.loads(line) for line in new]

    def keys(self, bucket: str) -> list[str]:
        listed = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return [entry["Key"] for entry in listed]


def count(requests: list[dict[str, Any]]) -> dict[str, int]:
    """Requests by kind."""
    return dict(Counter("LIST" if "list-type" in r["query"] else r["method"] for r in requests))


@contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Start it; boto and s3fs find it, and a key, in the environment."""
    log = folder / "requests.jsonl"
    server = subprocess.Popen(
        [sys.executable, __file__, log], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    before = dict(os.environ)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        os.environ.update(
            AWS_ENDPOINT_URL=url,
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="secret",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_MAX_ATTEMPTS="1",  # s3fs tries again itself
        )
        yield ObjectStore(url, log)
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.kill()
        server.wait()


def _serve(log: Path) -> None:
    """Print the port and serve."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    store = DomainDispatcherApplication(create_backend_app)
    requests = log.open("w", buffering=1)

    def noted(environ: Any, start_response: Any) -> Any:
        body = b"".join(store(environ, start_response))
        request = {
            "method": environ["REQUEST_METHOD"],
            "path": environ["PATH_INFO"],
            "query": environ["QUERY_STRING"],
            "bytes": len(body),
        }
        requests.write(json.dumps(request) + "\n")
        return [body]

    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # connections are kept, as S3 does
    server = make_server("127.0.0.1", 0, noted, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
