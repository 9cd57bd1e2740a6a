"""`python -m helpers.hub.server --folder F`: the loopback hub as a process of its own; see admin.py for what it can be told."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from contextlib import suppress
from pathlib import Path

from .loopback import LoopbackHub


def main() -> None:
    parser = argparse.ArgumentParser(prog="helpers.hub.server", description="A loopback hub; prints its address as JSON.")
    parser.add_argument("--folder", type=Path, required=True, help="for what it stores")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=Path, help="a folder organization/name/files to start with")
    parser.add_argument("--chunk-bytes", type=int, default=64 << 20, help="larger LFS objects are uploaded in such parts")
    parser.add_argument("--page-size", type=int, default=50, help="entries on one page of a listing")
    parser.add_argument("--until-eof", action="store_true", help="end with the standard input, not only when killed")
    asked = parser.parse_args()
    with LoopbackHub(asked.folder, port=asked.port, chunk_bytes=asked.chunk_bytes, page_size=asked.page_size) as hub:
        for repo in sorted(asked.seed.glob("*/*")) if asked.seed else []:
            hub.put(repo.relative_to(asked.seed).as_posix(), repo)
        print(json.dumps({"endpoint": hub.endpoint, "cdn": hub.cdn, "token": hub.token}), flush=True)
        with suppress(KeyboardInterrupt):
            sys.stdin.read() if asked.until_eof else threading.Event().wait()


if __name__ == "__main__":
    main()
