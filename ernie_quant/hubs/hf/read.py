"""The Hugging Face hub: `hf://org/name@revision`. Token and endpoint are those of huggingface_hub (HF_TOKEN, HF_ENDPOINT)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ernie_quant.errors import ErnieQuantError, HubError
from ernie_quant.hubs import Listing, RemoteFile
from ernie_quant.hubs._answers import PASSING, TIMEOUT, asked_for, one_line, range_headers, retry_after
from ernie_quant.hubs._patience import CHUNK, Transient

DOWNLOAD = "hf download {name} --local-dir {local}"


def connect() -> HuggingFace:
    """The hub of its client's settings."""
    return HuggingFace()


class HuggingFace:
    """A hub that speaks Hugging Face's protocol."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        self.endpoint, self.token = endpoint, token

    def listing(self, repo: str, revision: str) -> Listing:
        """The files of a revision, with sizes and hashes. Raises Transient or HubError."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(self.endpoint, token=self.token)
        with client_errors(f"{repo}@{revision}" if revision else repo):
            info = api.model_info(repo, revision=revision or None, files_metadata=True)
            found = [
                RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else "", s.blob_id or "") for s in info.siblings or []
            ]
            if not all(file.digest for file in found):  # a mirror that leaves the hashes out here
                entries = [e for e in api.list_repo_tree(repo, recursive=True, revision=info.sha) if isinstance(e, RepoFile)]
                found = [RemoteFile(e.path, e.size, e.lfs.sha256 if e.lfs else "", e.blob_id or "") for e in entries]
        if bare := next((file.name for file in found if not file.digest), None):
            raise HubError(f"{repo}: the hub says no hash of {bare}, and what cannot be checked is not read")
        return Listing(f"hf://{repo}", repo, str(info.sha), {file.name: file for file in found})

    @contextmanager
    def read(self, listing: Listing, name: str, start: int, stop: int | None) -> Iterator[Iterator[bytes]]:
        """Bytes of a file, from whatever host the hub sends us to; the token does not go there."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(listing.repo, name, revision=listing.commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token) | range_headers(start, stop)
        with ExitStack() as stack:
            with client_errors(f"{listing.repo}: {name}"):
                stream = get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True)
                response = stack.enter_context(stream)
                _check(response)
            chunks = asked_for(response.iter_raw(CHUNK), response.status_code, start, stop)
            yield _guarded(chunks, f"{listing.repo}: {name}")


def _guarded(chunks: Iterator[bytes], what: str) -> Iterator[bytes]:
    with client_errors(what):
        yield from chunks


def _check(response: Any) -> None:
    if response.status_code in PASSING:
        raise Transient(f"the hub answers {response.status_code}", retry_after(response))
    if response.status_code not in (200, 206):
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        response.read()
        hf_raise_for_status(response)
        raise Transient(f"the hub answers {response.status_code}")


@contextmanager
def client_errors(what: str) -> Iterator[None]:
    """The client's errors as ours: what passes as Transient, the rest as HubError."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (Transient, ErnieQuantError):
        raise
    except OfflineModeIsEnabled:
        raise HubError(f"{what}: cannot be reached: HF_HUB_OFFLINE is set") from None
    except HFValidationError as error:
        raise HubError(f"{what}: {error}") from None
    except GatedRepoError:
        raise HubError(f"{what}: is gated: accept its terms on the hub, and log in (`hf auth login` or HF_TOKEN)") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{what}: there is no such repository, or the token may not see it (`hf auth login` or HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{what}: there is no such revision") from None
    except EntryNotFoundError:
        raise HubError(f"{what}: there is no such file") from None
    except HfHubHTTPError as error:
        response = error.response
        if response is not None and response.status_code in PASSING:
            raise Transient(f"the hub answers {response.status_code}", retry_after(response)) from None
        raise HubError(f"{what}: {one_line(str(error))}") from None
    except UnicodeEncodeError:  # says what it cannot encode: the token
        raise HubError(f"{what}: the token (HF_TOKEN) is none: it has letters that no token has") from None
    except RuntimeError as error:  # of the client's uploads
        if not isinstance(error.__cause__, Exception):
            raise
        with client_errors(what):
            raise error.__cause__ from None
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not package.startswith(("httpx", "httpcore")) and not isinstance(error, OSError):
            raise
        if type(error).__name__ == "LocalProtocolError":  # shows the header that it refuses: the token
            raise HubError(f"{what}: the request cannot be sent; is there a space or line end in the token (HF_TOKEN)?") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            raise HubError(f"{what}: the hub answers {status}") from None
        raise Transient(f"{type(error).__name__}: {one_line(str(error))}") from None
