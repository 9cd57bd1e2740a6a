"""ModelScope and AI Studio through their own packages, unchanged, against small hubs on the loopback."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.disk import contents
from helpers.hub_others.aistudio import FakeAiStudio
from helpers.hub_others.base import TOKEN, FakeHub, Fault, Repo
from helpers.hub_others.modelscope import FakeModelScope
from helpers.hubs import INT4, NAME, SOURCE, TELLING_THE_SOURCE, planned

from ernie_quant import hubs, sources
from ernie_quant.errors import HubError, RetryError, VerifyError
from ernie_quant.planning.make import make_plan
from ernie_quant.publish import Destination, Published, publish
from ernie_quant.publish import files as publishing
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import download, open_source
from ernie_quant.sources import hub as sources_hub

REPO = "me/tiny-wint4"
only_modelscope = pytest.mark.parametrize("scheme", ["modelscope"], indirect=True)
only_aistudio = pytest.mark.parametrize("scheme", ["aistudio"], indirect=True)
PACKAGES = {"modelscope": "modelscope_hub", "aistudio": "aistudio_sdk"}


@pytest.fixture(params=["modelscope", "aistudio"])
def scheme(request: pytest.FixtureRequest) -> str:
    package = PACKAGES[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed: pip install '.[{request.param}]'")
    return str(request.param)


@pytest.fixture
def hub(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """With the source in it; the packages find it by their own settings, and nobody waits."""
    with FakeModelScope() if scheme == "modelscope" else FakeAiStudio() as hub:
        for key, value in {
            "MODELSCOPE_ENDPOINT": hub.endpoint, "MODELSCOPE_API_TOKEN": TOKEN, "MODELSCOPE_HOME": str(tmp_path / "ms"),
            "STUDIO_GIT_HOST": hub.endpoint, "STUDIO_MODEL_API_URL_PREFIX": hub.endpoint, "AISTUDIO_ACCESS_TOKEN": TOKEN,
            "AISTUDIO_CACHE_HOME": str(tmp_path / "ai"), "NO_PROXY": "127.0.0.1,localhost",
            "ERNIE_QUANT_CACHE": str(tmp_path / "cache"),
        }.items():  # fmt: skip
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setattr(download.HubDownload, "_pause", lambda self, seconds: None)
        monkeypatch.setattr(sources_hub, "HEAD", 1000)
        monkeypatch.setattr(publishing, "_pictures", lambda found: {})
        hub.put(NAME, SOURCE)
        yield hub
        assert not [r for r in hub.log if r.host == "localhost" and r.secret and r.method == "GET"]


def made_from_hub(scheme: str, tmp_path: Path, finished: Path, revision: str = "") -> None:
    """Quantize the repository; the result must be that of the folder."""
    plan = planned(f"{scheme}://{NAME}{revision}")
    run_plan(plan, tmp_path / "made")
    made, local = contents(tmp_path / "made"), contents(finished)
    assert made.keys() == local.keys()
    assert all(made[name] == local[name] for name in made.keys() - TELLING_THE_SOURCE)


def publish_to(scheme: str, out: Path, **options: Any) -> Published:
    return publish(out, hubs.publisher(scheme), Destination(REPO, **({"revision": "master"} | options)))


def on_hub(hub: FakeHub, revision: str = "master") -> dict[str, bytes]:
    commit = hub.repos[REPO].resolve(revision)
    assert commit is not None
    return {name: data for name, data in commit.files.items() if name != ".gitattributes"}


# as a source


def test_a_repository_gives_the_result_of_the_folder(hub: Any, scheme: str, tmp_path: Path, finished: Path) -> None:
    made_from_hub(scheme, tmp_path, finished)
    ranges = [r.range for r in hub.asked("^/object/") if r.range]
    assert "bytes=0-999" in ranges


def test_the_revision_is_the_commit(hub: Any, scheme: str) -> None:
    repo = hub.repos[NAME]
    first = repo.branches["master"]
    source = open_source(f"{scheme}://{NAME}")
    assert source.revision == first
    repo.commit("master", {"README.md": b"# other"})
    repo.tags["v1"] = first
    assert open_source(f"{scheme}://{NAME}@v1").revision == first
    assert open_source(f"{scheme}://{NAME}@{first}").revision == first
    assert open_source(f"{scheme}://{NAME}").revision == repo.branches["master"] != first


def test_what_is_pinned_can_be_read_after_the_branch_has_moved(hub: Any, scheme: str, tmp_path: Path, finished: Path) -> None:
    plan = planned(f"{scheme}://{NAME}")
    weights = {name: b"other" for name in hub.repos[NAME].resolve("master").files if name.endswith(".safetensors")}
    hub.repos[NAME].commit("master", weights)
    run_plan(plan, tmp_path / "made")
    assert contents(tmp_path / "made").keys() == contents(finished).keys()


@only_modelscope
def test_without_commits_the_listing_is_the_revision(hub: Any, scheme: str, tmp_path: Path, finished: Path) -> None:
    hub.names_commits = False
    files = hub.repos[NAME].resolve("master").files
    lines = sorted(f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}\n" for name, data in files.items())
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert open_source(f"{scheme}://{NAME}").revision == digest
    made_from_hub(scheme, tmp_path, finished)


@only_modelscope
def test_a_file_without_a_hash_is_refused(hub: Any, scheme: str) -> None:
    hub.unhashed = {"config.json"}
    with pytest.raises(HubError, match=r"config\.json: the hub reports no sha256 of it, so it cannot be checked"):
        sources.open_source(f"{scheme}://{NAME}")


@only_modelscope
def test_without_commits_a_changed_file_is_refused(hub: Any, scheme: str, tmp_path: Path) -> None:
    hub.names_commits = False
    plan = planned(f"{scheme}://{NAME}")
    files = hub.repos[NAME].resolve("master").files
    hub.repos[NAME].commit("master", {n: data[:-1] + b"?" for n, data in files.items() if n.endswith(".safetensors")})
    with pytest.raises(RetryError, match="another hash than the hub's"):
        run_plan(plan, tmp_path / "made")


@only_aistudio
def test_pointers_are_looked_for_in_two_places(hub: Any, scheme: str, tmp_path: Path, finished: Path) -> None:
    hub.shows_pointers = "blobs"
    made_from_hub(scheme, tmp_path, finished)
    hub.shows_pointers = ""
    with pytest.raises(HubError, match="shows neither the file nor its pointer, so it cannot be checked"):
        sources.open_source(f"{scheme}://{NAME}")


@pytest.mark.parametrize("what", [429, 503, "drop"])
def test_what_passes_is_waited_for(hub: Any, scheme: str, tmp_path: Path, finished: Path, what: int | str) -> None:
    where = (
        ["repo/files", "/repo\\?", "^/object/"] if scheme == "modelscope" else ["git/trees", "/contents/", "/media/", "^/object/"]
    )
    hub.faults = [Fault("GET", place, what, times=2) for place in where]
    made_from_hub(scheme, tmp_path, finished)
    assert not any(fault.times for fault in hub.faults)


def test_a_hub_that_stays_away_is_worth_another_try(hub: Any, scheme: str) -> None:
    hub.faults = [Fault("GET", "repo/files|git/trees", 503, times=1000)]
    with pytest.raises(RetryError, match=r"503|not now"):
        sources.open_source(f"{scheme}://{NAME}")


def test_wrong_bytes_of_the_right_size_are_found_by_their_hash(hub: Any, scheme: str, tmp_path: Path, finished: Path) -> None:
    plan = planned(f"{scheme}://{NAME}")
    hub.faults = [Fault("GET", "^/object/", "wrong", times=2)]
    run_plan(plan, tmp_path / "made")
    assert not hub.faults[0].times
    assert contents(tmp_path / "made").keys() == contents(finished).keys()
    hub.faults = [Fault("GET", "^/object/", "wrong", times=1000)]
    with pytest.raises(RetryError, match="arrived 3 times with another hash than the hub's"):
        run_plan(planned(f"{scheme}://{NAME}"), tmp_path / "again")


def test_what_is_not_there(hub: Any, scheme: str) -> None:
    for address in (f"{scheme}://nobody/nothing", f"{scheme}://{NAME}@no-such-branch"):
        with pytest.raises(HubError, match="there is no such repository, revision or file"):
            sources.open_source(address)


def test_a_token_with_a_line_end_is_not_shown(hub: Any, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MODELSCOPE_API_TOKEN", "AISTUDIO_ACCESS_TOKEN"):
        monkeypatch.setenv(variable, f"{TOKEN}\nx")
    with pytest.raises(HubError, match="has letters that no token has") as caught:
        sources.open_source(f"{scheme}://{NAME}")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == PACKAGES[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    package = PACKAGES[name].replace("_", "-")
    for work in (lambda: sources.open_source(f"{name}://{NAME}"), lambda: hubs.publisher(name)):
        with pytest.raises(HubError, match=f"needs the package {package}: pip install '{package}<"):
            work()


# publishing


def test_everything_arrives_and_twice_is_once(hub: Any, scheme: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = publish_to(scheme, out, tag="v1")
    assert done.status == "published"
    assert hub.repos[REPO].private
    assert done.commit == hub.repos[REPO].branches["master"] == hub.repos[REPO].tags["v1"]
    assert on_hub(hub) == contents(out)
    posts = len([r for r in hub.log if r.method == "PUT"])
    assert publish_to(scheme, out, tag="v1").status == "up-to-date"
    assert len([r for r in hub.log if r.method == "PUT"]) == posts
    assert len(hub.repos[REPO].commits) == 2  # the hub's own, and ours
    assert not capsys.readouterr().out  # the packages print


def test_a_file_that_is_left_out_silently_is_named(hub: Any, scheme: str, out: Path) -> None:
    hub.leave_out = {"config.json"}
    with pytest.raises(VerifyError, match=r"config\.json: is not there"):
        publish_to(scheme, out)
    hub.leave_out = set()
    assert publish_to(scheme, out).uploaded == 1


def test_a_file_that_was_made_other_by_the_hub_is_named(hub: Any, scheme: str, out: Path) -> None:
    class Other(type(hub.repos[NAME])):  # type: ignore[misc]
        def commit(self, branch: str, put: dict[str, bytes], drop: tuple[str, ...] = ()) -> Any:
            put = put | ({"config.json": put["config.json"][:-1] + b"\t"} if "config.json" in put else {})
            return super().commit(branch, put, drop)

    hub.repos[REPO] = Other()
    hub.repos[REPO].commit("master", {})
    with pytest.raises(VerifyError, match=r"config\.json: has another size or hash"):
        publish_to(scheme, out)


def test_a_large_file_that_the_storage_loses_is_not_committed(hub: Any, scheme: str, out: Path) -> None:
    weights = next(path for path in sorted(out.glob("*.safetensors")))
    hub.forget = {hashlib.sha256(weights.read_bytes()).hexdigest()}
    with pytest.raises(RetryError, match="was uploaded, but the hub does not have it"):
        publish_to(scheme, out)
    assert set(on_hub(hub)) == {"README.md"}


@pytest.mark.parametrize("what", [429, 503, "drop"])
def test_an_interrupted_publish_goes_on(hub: Any, scheme: str, out: Path, what: int | str) -> None:
    places = ["objects/batch", "/commit/|/contents$"]
    hub.faults = [Fault("POST", place, what) for place in places] + [Fault("PUT", "^/object/", what)]
    assert publish_to(scheme, out).status == "published"
    assert not any(fault.times for fault in hub.faults)
    assert on_hub(hub) == contents(out)


def test_somebody_else_commits_in_between(hub: Any, scheme: str, out: Path) -> None:
    publish_to(scheme, out)
    hub.repos[REPO].commit("master", {"config.json": b"{}"})
    publisher = hubs.publisher(scheme)
    upload = publisher.upload

    def slow(repo: str, revision: str, file: Any) -> bool:
        if len(hub.repos[REPO].commits) == 3:
            hub.repos[REPO].commit("master", {"generation_config.json": b"{}"})
        return upload(repo, revision, file)

    publisher.upload = slow  # type: ignore[method-assign]
    assert publish(out, publisher, Destination(REPO, "master")).status == "published"
    assert on_hub(hub) == contents(out)


def test_files_of_an_earlier_result_go_and_deleted_ones_stay(hub: Any, scheme: str, out: Path) -> None:
    publish_to(scheme, out, delete=True)
    assert not list(out.glob("*.safetensors"))
    assert publish_to(scheme, out).status == "up-to-date"
    assert len([name for name in on_hub(hub) if name.endswith(".safetensors")]) == 4


def test_what_the_new_result_has_no_more_is_dropped(hub: Any, scheme: str, out: Path, tmp_path: Path) -> None:
    publish_to(scheme, out)
    plan = make_plan(open_source(SOURCE), runtime="vllm", recipe=INT4)
    run_plan(plan, tmp_path / "other")
    assert publish_to(scheme, tmp_path / "other").dropped == 5  # four weight files and the index
    assert on_hub(hub) == contents(tmp_path / "other")


def test_the_visibility_is_that_of_the_hub(hub: Any, scheme: str, out: Path) -> None:
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit("master", {".gitattributes": b""})
    with pytest.raises(HubError, match="is public, and --private was asked for"):
        publish_to(scheme, out, private=True)
    assert publish_to(scheme, out).status == "published"
    assert hubs.publisher(scheme).is_private("nobody/nothing") is None


def test_there_are_no_pull_requests(hub: Any, scheme: str, out: Path) -> None:
    publisher = hubs.publisher(scheme)
    assert not publisher.pull_requests  # type: ignore[attr-defined]
    with pytest.raises(HubError, match="without --pr"):
        publisher.commit(REPO, "master", "", [], [], "", True)


@only_modelscope
def test_modelscope_makes_no_branches(hub: Any, scheme: str, out: Path) -> None:
    with pytest.raises(HubError, match="has no branch main; ModelScope's is master"):
        publish_to(scheme, out, revision="main")


@only_aistudio
def test_aistudio_makes_branches(hub: Any, scheme: str, out: Path) -> None:
    done = publish_to(scheme, out, revision="other")
    assert hub.repos[REPO].branches["other"] == done.commit != hub.repos[REPO].branches["master"]


@only_aistudio
def test_aistudio_begins_with_nothing(hub: Any, scheme: str, out: Path) -> None:
    hub.repos[REPO] = Repo()
    assert publish_to(scheme, out, tag="v1").status == "published"
    assert on_hub(hub, "v1") == contents(out)


@only_aistudio
def test_aistudio_makes_it_elsewhere(hub: Any, scheme: str, out: Path) -> None:
    hub.owner = "somebody"
    with pytest.raises(HubError, match="AI Studio made somebody/tiny-wint4 in the namespace of the token's owner"):
        publish_to(scheme, out)


@only_aistudio
def test_aistudio_forbids(hub: Any, scheme: str, out: Path) -> None:
    hub.suffixes = (".safetensors",)
    with pytest.raises(HubError, match="AI Studio takes no files of this type"):
        publish_to(scheme, out)
    hub.suffixes, hub.card_refused = (), "license is missing"
    with pytest.raises(HubError, match=r"README\.md: AI Studio does not take the card: license is missing"):
        publish_to(scheme, out)
    assert set(on_hub(hub)) == {"README.md"}


@only_aistudio
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # of baidubce, when it is compiled
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # it leaves sockets open
def test_aistudio_takes_large_files_in_parts(hub: Any, scheme: str, out: Path) -> None:
    client = importlib.import_module("baidubce.services.bos.bos_client").BosClient
    if not hasattr(client, "put_super_obejct_from_file"):  # sic; aistudio_sdk/utils/bos_sdk.py calls it so
        pytest.skip(
            "bce-python-sdk 0.9.67 renamed what aistudio-sdk 0.3.9 calls, which then falls back to one PUT of up to 5 GiB"
        )
    hub.multipart = True
    assert publish_to(scheme, out).status == "published"
    assert on_hub(hub) == contents(out)
    assert len(hub.asked("partNumber=1&", "PUT")) == 4
