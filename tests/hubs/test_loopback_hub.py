"""The loopback hub and the official client, unmodified, understand each other in both directions, faults included.

The client reads its environment once, when it is imported, and by then conftest.py has said HF_HUB_OFFLINE=1. So the
`online` fixture sets the two constants that HF_HUB_OFFLINE=0 and HF_HUB_DISABLE_XET=1 would have set (the second because
clients with hf_xet upload by Xet without asking the hub), and names the hub with endpoint= and token=. Processes get the
same from `hub.environment()`; the last test here shows it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import HubProcess, LoopbackHub
from helpers.hubs import uploads
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import close_session, get_session

pytestmark = uploads
# older ones work with this hub too, but repeat other requests, and some look for endpoint= in HF_ENDPOINT only
pytest.importorskip("huggingface_hub", minversion="2.0")

NAME = "org/model"
CONFIG = b'{"model_type": "ernie4_5"}\n'
WEIGHTS = hashlib.shake_128(b"weights").digest(300_000)  # LFS by its name; five parts of at most 64 KiB
CHUNK = 1 << 16


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(tmp_path: Path, online: None) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "server", chunk_bytes=CHUNK, page_size=4) as hub:
        yield hub
        assert not hub.leaks


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def seeded(hub: LoopbackHub) -> str:
    """A repository with a small and a large file; the commit."""
    return hub.put(NAME, {"config.json": CONFIG, "model.safetensors": WEIGHTS})


def content(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and ".cache" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if p.name != ".gitattributes"}


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


# --- in


def test_a_folder_goes_up_and_comes_down_again(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "small.safetensors": b"\0" * 9, "sub/dir/notes.txt": b"hi\n"}
    for path, data in files.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(data)

    assert api.whoami()["name"] == hub.user
    assert str(api.create_repo(NAME, private=True)) == f"{hub.endpoint}/{NAME}"
    commit = api.upload_folder(repo_id=NAME, folder_path=tmp_path / "up", commit_message="all of it")

    held = hub.repo(NAME)
    assert held.private
    assert held.branches == {"main": commit.oid}
    assert [c.title for c in held.commits()] == ["all of it", "initial commit"]
    assert {p: f.lfs for p, f in held.files().items() if p != ".gitattributes"} == {p: ".safetensors" in p for p in files}
    assert {p: held.read(p) for p in files} == files
    parts = [r.path.rsplit("/", 1)[1] for r in hub.requests if r.method == "PUT" and r.path.count("/") == 5]
    assert parts == ["1", "2", "3", "4", "5"]

    assert content(Path(api.snapshot_download(NAME, cache_dir=tmp_path / "cache"))) == files
    assert content(Path(api.snapshot_download(NAME, local_dir=tmp_path / "down"))) == files
    api.delete_repo(NAME)
    assert NAME not in hub.store.repos


def test_a_commit_that_names_its_parent_is_refused_once_there_is_another(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    shard = add("shard.safetensors", WEIGHTS[:1000])
    api.preupload_lfs_files(NAME, [shard])
    assert [r.path for r in hub.requests if r.method == "PUT"] == [f"/upload/{NAME}/{hashlib.sha256(WEIGHTS[:1000]).hexdigest()}"]
    first = api.create_commit(NAME, [shard], commit_message="shard", parent_commit=seeded)
    assert hub.repo(NAME).find().parent == seeded

    with pytest.raises(HfHubHTTPError, match=r"A commit has happened since\. Please refresh and try again\.") as refused:
        api.create_commit(NAME, [add("a.txt", b"a")], commit_message="late", parent_commit=seeded)
    assert refused.value.response.status_code == 412
    assert hub.repo(NAME).branches["main"] == first.oid


def test_somebody_else_commits_just_before_us(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    fault = hub.stale_parent(times=1)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(NAME, [add("a.txt", b"a")], commit_message="mine", parent_commit=seeded)
    theirs = hub.repo(NAME).find()
    assert (fault.struck, theirs.parent, theirs.title) == (1, seeded, "somebody else's commit 1")
    api.create_commit(NAME, [add("a.txt", b"a")], commit_message="mine", parent_commit=theirs.id)
    assert set(hub.repo(NAME).files()) > {"a.txt", "somebody-else.txt"}


def test_commit_ids_follow_from_what_is_in_them(hub: LoopbackHub) -> None:
    assert hub.put("org/one", {"a": b"1"}) == hub.put("org/two", {"a": b"1"})
    assert hub.put("org/one", {"a": b"2"}) != hub.put("org/two", {"a": b"3"})


def test_copies_deletions_and_what_is_already_there(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    hub.put(NAME, {"old/a.txt": b"a", "old/b.txt": b"b"})
    operations = [
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("old/"),
    ]
    api.create_commit(NAME, operations, commit_message="tidy")
    assert set(hub.repo(NAME).files()) == {".gitattributes", "model.safetensors", "copy.safetensors"}
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("config.json", NAME)

    before, seen = hub.repo(NAME).branches["main"], len(hub.requests)
    api.upload_file(repo_id=NAME, path_in_repo="again.safetensors", path_or_fileobj=WEIGHTS)
    assert not [r for r in hub.requests[seen:] if r.host == "cdn"]
    assert hub.repo(NAME).find().parent == before


def test_an_object_that_is_not_what_it_says_is_refused(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    wrong = add("wrong.safetensors", WEIGHTS[:500])
    wrong.upload_info.sha256 = bytes(32)
    with pytest.raises(RuntimeError, match="wrong") as refused:
        api.create_commit(NAME, [wrong], commit_message="wrong")
    assert "BadDigest" in str(refused.value.__cause__)
    assert hub.repo(NAME).branches["main"] == seeded

    unsent = add("unsent.safetensors", WEIGHTS[:600])
    unsent._upload_mode, unsent._is_uploaded = "lfs", True
    with pytest.raises(HfHubHTTPError, match="pointed to a file that does not exist"):
        api.create_commit(NAME, [unsent], commit_message="unsent")


def test_a_card_without_metadata_warns_as_on_the_real_hub(api: HfApi, seeded: str) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(repo_id=NAME, path_in_repo="README.md", path_or_fileobj=b"# no metadata\n")
    api.upload_file(repo_id=NAME, path_in_repo="README.md", path_or_fileobj=b"---\nlicense: apache-2.0\n---\n")


# --- out


def test_a_listing_has_pages_and_hashes(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    hub.put(NAME, {f"part/{i:02}.txt": b"%d" % i for i in range(9)}, message="parts")
    hub.requests.clear()
    entries = {e.path: e for e in api.list_repo_tree(NAME, recursive=True, expand=True)}
    assert len(entries) == 3 + 1 + 9
    assert len([r for r in hub.requests if "/tree/" in r.path]) == 4  # pages of four

    weights, small = entries["model.safetensors"], entries["part/03.txt"]
    assert isinstance(weights, RepoFile)
    assert isinstance(small, RepoFile)
    assert weights.lfs
    assert (weights.size, weights.lfs.sha256) == (300_000, hashlib.sha256(WEIGHTS).hexdigest())
    assert small.lfs is None
    assert small.blob_id == hashlib.sha1(b"blob 1\x003").hexdigest()
    assert weights.last_commit
    assert small.last_commit
    assert (weights.last_commit.oid, small.last_commit.title) == (seeded, "parts")
    assert {e.path for e in api.list_repo_tree(NAME, "part")} == {f"part/{i:02}.txt" for i in range(9)}
    assert [p.path for p in api.get_paths_info(NAME, ["part", "config.json", "none"])] == ["part", "config.json"]
    siblings = api.model_info(NAME, files_metadata=True).siblings
    assert siblings
    assert {s.rfilename: s.size for s in siblings}["model.safetensors"] == 300_000


def test_branches_tags_and_older_commits(hub: LoopbackHub, api: HfApi, seeded: str, tmp_path: Path) -> None:
    api.create_tag(NAME, tag="v1", revision="main")
    api.create_branch(NAME, branch="next")
    api.upload_file(repo_id=NAME, path_in_repo="config.json", path_or_fileobj=b"{}", revision="next")
    assert hub.repo(NAME).tags == {"v1": seeded}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(NAME, tag="v1")
    refs = api.list_repo_refs(NAME)
    assert [b.name for b in refs.branches] == ["main", "next"]
    assert [(t.ref, t.target_commit) for t in refs.tags] == [("refs/tags/v1", seeded)]

    def read(revision: str) -> bytes:
        return Path(api.hf_hub_download(NAME, "config.json", revision=revision, cache_dir=tmp_path / "c")).read_bytes()

    assert [read(r) for r in ("v1", seeded, "main", "next")] == [CONFIG, CONFIG, CONFIG, b"{}"]
    assert [c.title for c in api.list_repo_commits(NAME, revision="next")][-1] == "initial commit"
    api.delete_tag(NAME, tag="v1")
    api.delete_branch(NAME, branch="next")
    with pytest.raises(RevisionNotFoundError):
        read("v1")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(NAME, "none.json", cache_dir=tmp_path / "c")


def test_a_pull_request_leaves_main_alone_until_it_is_merged(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    made = api.create_commit(NAME, [add("config.json", b"{}")], commit_message="propose", create_pr=True)
    assert (made.pr_revision, made.pr_num) == ("refs/pr/1", 1)
    assert hub.repo(NAME).branches == {"main": seeded}
    assert hub.repo(NAME).read("config.json", "refs/pr/1") == b"{}"
    api.upload_file(repo_id=NAME, path_in_repo="more.txt", path_or_fileobj=b"more", revision="refs/pr/1")
    assert [r.ref for r in api.list_repo_refs(NAME, include_pull_requests=True).pull_requests or []] == ["refs/pr/1"]
    api.merge_pull_request(NAME, 1)
    assert (hub.repo(NAME).read("config.json"), hub.repo(NAME).read("more.txt")) == (b"{}", b"more")
    assert api.create_pull_request(NAME, "another one").git_reference == "refs/pr/2"


def test_a_range_through_the_redirect(hub: LoopbackHub, seeded: str) -> None:
    address = f"{hub.endpoint}/{NAME}/resolve/main/model.safetensors"

    def get(asked: str) -> Any:
        return get_session().get(address, headers={"Range": asked, "Authorization": f"Bearer {hub.token}"})

    middle, tail, beyond = get("bytes=1000-1999"), get("bytes=-10"), get("bytes=300000-")
    head = get_session().head(address, follow_redirects=False)
    assert (middle.status_code, middle.content) == (206, WEIGHTS[1000:2000])
    assert middle.headers["Content-Range"] == "bytes 1000-1999/300000"
    assert tail.content == WEIGHTS[-10:]
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, "bytes */300000")
    assert (head.status_code, head.headers["X-Linked-Size"]) == (302, "300000")
    assert head.headers["X-Linked-ETag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert head.headers["X-Repo-Commit"] == seeded
    assert head.headers["Location"].startswith(hub.cdn)
    assert [r.authorization for r in hub.requests] == [True, False] * 3 + [False]


def test_a_token_at_the_other_host_is_refused_and_remembered(online: None, tmp_path: Path) -> None:
    with LoopbackHub(tmp_path) as hub:
        hub.put(NAME, {"model.safetensors": WEIGHTS})
        address = f"{hub.endpoint}/{NAME}/resolve/main/model.safetensors"
        there = get_session().head(address, follow_redirects=False).headers["Location"]
        assert get_session().get(there, headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400
        assert [r.path.split("/")[-1] for r in hub.leaks] == ["model.safetensors"]
        assert get_session().get(there.replace("size=300000", "size=300001")).status_code == 403


# --- who may


def test_who_may_see_and_change_what(hub: LoopbackHub, api: HfApi, seeded: str, tmp_path: Path) -> None:
    anonymous = HfApi(endpoint=hub.endpoint, token=False)
    stranger = HfApi(endpoint=hub.endpoint, token=hub.stranger_token)
    reader = HfApi(endpoint=hub.endpoint, token=hub.read_token)
    impostor = HfApi(endpoint=hub.endpoint, token="hf_nobody")
    assert anonymous.model_info(NAME).sha == seeded
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.upload_file(repo_id=NAME, path_in_repo="a.txt", path_or_fileobj=b"a")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        impostor.model_info(NAME)

    api.update_repo_settings(NAME, gated="manual")
    assert stranger.model_info(NAME).gated == "manual"
    for other in (anonymous, stranger):
        with pytest.raises(GatedRepoError):
            other.hf_hub_download(NAME, "config.json", cache_dir=tmp_path)

    api.update_repo_settings(NAME, private=True, gated=False)
    assert reader.model_info(NAME).private
    for other in (anonymous, stranger):
        with pytest.raises(RepositoryNotFoundError):
            other.snapshot_download(NAME, cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError):
            other.upload_file(repo_id=NAME, path_in_repo="a.txt", path_or_fileobj=b"a")


def test_creating_what_exists(api: HfApi, seeded: str) -> None:
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        api.create_repo(NAME)
    assert api.create_repo(NAME, exist_ok=True).repo_id == NAME
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("org/other")


# --- faults, as the client has them


def test_too_many_requests_are_repeated_after_the_time_the_hub_names(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    fault = hub.fail(path="/preupload/", status=429, headers={"Retry-After": "0"})
    api.upload_file(repo_id=NAME, path_in_repo="a.txt", path_or_fileobj=b"a")
    assert [r.status for r in hub.requests if "/preupload/" in r.path] == [429, 200]
    assert fault.struck == 1


def test_a_commit_that_fails_is_not_repeated(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    hub.fail(method="POST", path="/commit/", status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        api.create_commit(NAME, [add("a.txt", b"a")], commit_message="a")
    assert hub.repo(NAME).branches["main"] == seeded


@pytest.mark.parametrize("status", [500, None])
def test_a_commit_may_have_happened_although_its_answer_is_lost(
    hub: LoopbackHub, api: HfApi, seeded: str, status: int | None
) -> None:
    hub.fail(method="POST", path="/commit/", status=status, late=True)
    with pytest.raises(Exception, match=r"500|disconnected"):
        api.create_commit(NAME, [add("a.txt", b"a")], commit_message="a")
    assert hub.repo(NAME).find().parent == seeded
    assert hub.repo(NAME).read("a.txt") == b"a"


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    """The client keeps whole pieces of 10 MiB."""
    hub.put(NAME, {"model.safetensors": WEIGHTS * 50})
    fault = hub.drop(path="^/lfs/.*model.safetensors", after_bytes=12_000_000)
    got = api.hf_hub_download(NAME, "model.safetensors", cache_dir=tmp_path)
    assert Path(got).read_bytes() == WEIGHTS * 50
    assert fault.struck == 1
    assert [(r.range, r.status, r.fault) for r in hub.requests if r.host == "cdn"] == [
        ("", 200, "drop"),
        (f"bytes={10 << 20}-", 206, ""),
    ]


def test_a_download_that_is_reset_is_not_repeated_by_the_client(
    hub: LoopbackHub, api: HfApi, seeded: str, tmp_path: Path
) -> None:
    hub.drop(path="^/lfs/", after_bytes=100_000, reset=True)
    with pytest.raises(Exception, match="reset"):
        api.hf_hub_download(NAME, "model.safetensors", cache_dir=tmp_path)


def test_an_upload_that_is_cut_is_repeated(hub: LoopbackHub, api: HfApi, seeded: str) -> None:
    other = hashlib.shake_128(b"other").digest(200_000)
    fault = hub.drop(method="PUT", path="/upload/.*/2$", after_bytes=30_000)
    api.upload_file(repo_id=NAME, path_in_repo="other.safetensors", path_or_fileobj=other)
    assert fault.struck == 1
    assert hub.repo(NAME).read("other.safetensors") == other
    assert [r.path[-2:] for r in hub.requests if r.method == "PUT"] == ["/1", "/2", "/2", "/3", "/4"]


def test_the_client_does_not_notice_wrong_bytes(hub: LoopbackHub, api: HfApi, seeded: str, tmp_path: Path) -> None:
    """Which is why a tool that writes checkpoints has to check the hashes itself."""
    fault = hub.corrupt(path="model.safetensors")
    got = Path(api.hf_hub_download(NAME, "model.safetensors", cache_dir=tmp_path)).read_bytes()
    assert fault.struck == 1
    assert len(got) == len(WEIGHTS)
    assert [i for i in range(len(got)) if got[i] != WEIGHTS[i]] == [150_000]


def test_a_slow_download(hub: LoopbackHub, api: HfApi, seeded: str, tmp_path: Path) -> None:
    hub.slow(path="^/lfs/", bytes_per_second=600_000)
    start = time.monotonic()
    assert Path(api.hf_hub_download(NAME, "model.safetensors", cache_dir=tmp_path)).read_bytes() == WEIGHTS
    assert 0.4 < time.monotonic() - start < 5


# --- processes


def test_the_hub_as_a_process_and_a_client_process(tmp_path: Path) -> None:
    (tmp_path / "seed/org/model").mkdir(parents=True)
    (tmp_path / "seed/org/model/model.safetensors").write_bytes(WEIGHTS)
    story = (
        "from huggingface_hub import hf_hub_download, upload_file\n"
        f"path = hf_hub_download('{NAME}', 'model.safetensors')\n"
        f"upload_file(repo_id='{NAME}', path_in_repo='copy.safetensors', path_or_fileobj=path)\n"
    )
    with HubProcess(tmp_path / "server", "--seed", str(tmp_path / "seed")) as hub:
        hub.call("fail", path="/preupload/", status=503)
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        subprocess.run([sys.executable, "-c", story], env=environment, check=True, timeout=60, capture_output=True)
        held = hub.call("repo", repo=NAME)
        assert hub.call("struck") == [1]
        assert not [r for r in hub.call("requests") if r["host"] == "cdn" and r["authorization"]]
    files = held["commits"][0]["files"]
    assert files["copy.safetensors"] == files["model.safetensors"]
    assert files["copy.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
