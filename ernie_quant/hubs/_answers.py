"""What hubs answer, whatever their client: what passes, how long to wait, and messages that show no secret."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ernie_quant.errors import ErnieQuantError, HubError
from ernie_quant.hubs._patience import Transient

PASSING = (408, 429, 500, 502, 503, 504)
TIMEOUT = 30.0  # seconds without a byte


def retry_after(response: Any) -> float | None:
    """Seconds that the hub asks for."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None


def range_headers(start: int, stop: int | None) -> dict[str, str]:
    """Of a request for bytes `start` to `stop` (None: the end), as they are."""
    asked = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
    return {"Accept-Encoding": "identity", **asked}


def asked_for(chunks: Iterator[bytes], status: int, start: int, stop: int | None) -> Iterator[bytes]:
    """The bytes of that request; a server that knows no ranges answers 200 and sends all of it."""
    return part_of(chunks, start if status == 200 else 0, None if stop is None else stop - start)


def part_of(chunks: Iterator[bytes], skip: int, count: int | None) -> Iterator[bytes]:
    """`chunks` without the first `skip` bytes, and at most `count` of the others."""
    for chunk in chunks:
        if skip:
            chunk, skip = chunk[skip:], max(0, skip - len(chunk))
        if count is not None:
            chunk = chunk[:count]
            count -= len(chunk)
        if chunk:
            yield chunk
        if count == 0:
            return


def one_line(text: str) -> str:
    """Without what looks like a token or the signature of an address."""
    text = re.sub(r"hf_\w+", "hf_…", " ".join(text.split()))
    return re.sub(r"\?[^\s'\")]+", "?…", text)[:300]


@contextmanager
def requests_errors(what: str, token: str) -> Iterator[None]:
    """The errors of the package requests as ours; `token` is where the token comes from."""
    requests = importlib.import_module("requests")
    urllib3 = importlib.import_module("urllib3")
    try:
        yield
    except (Transient, ErnieQuantError):
        raise
    except (UnicodeEncodeError, requests.exceptions.InvalidHeader):  # they show the header that they refuse: the token
        raise HubError(f"{what}: the token ({token}) is none: it has letters that no token has") from None
    except requests.exceptions.JSONDecodeError:
        raise Transient("the hub's answer is no JSON") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema) as error:
        raise HubError(f"{what}: {one_line(str(error))}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise Transient(f"{type(error).__name__}: {one_line(str(error))}") from None
