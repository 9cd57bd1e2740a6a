"""Which address does what, on the hub and on the other host."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from . import admin, files, repos
from .storage import HubError
from .wire import Wire

Route = tuple[str, str, Callable[..., None]]

# HEAD is what GET is; a repository is <R>, one quoted segment <X>, the rest of the address <P>
# fmt: off
HUB: tuple[Route, ...] = (
    ("GET",      "/api/whoami-v2",                     repos.whoami),
    ("POST",     "/api/repos/create",                  repos.create),
    ("DELETE",   "/api/repos/delete",                  repos.delete),
    ("POST",     "/api/validate-yaml",                 repos.validate_yaml),
    ("POST",     "/api/complete_multipart",            files.complete_multipart),
    ("GET",      "/api/models/<R>",                    repos.info),
    ("GET",      "/api/models/<R>/revision/<X>",       repos.info),
    ("GET",      "/api/models/<R>/auth-check",         repos.auth_check),
    ("PUT",      "/api/models/<R>/settings",           repos.settings),
    ("GET",      "/api/models/<R>/refs",               repos.refs),
    ("POST",     "/api/models/<R>/branch/<X>",         repos.create_branch),
    ("DELETE",   "/api/models/<R>/branch/<X>",         repos.delete_branch),
    ("POST",     "/api/models/<R>/tag/<X>",            repos.create_tag),
    ("DELETE",   "/api/models/<R>/tag/<X>",            repos.delete_tag),
    ("GET",      "/api/models/<R>/tree/<X>",           repos.tree),
    ("GET",      "/api/models/<R>/tree/<X>/<P>",       repos.tree),
    ("POST",     "/api/models/<R>/paths-info/<X>",     repos.paths_info),
    ("GET",      "/api/models/<R>/commits/<X>",        repos.commits),
    ("POST",     "/api/models/<R>/preupload/<X>",      files.preupload),
    ("POST",     "/api/models/<R>/commit/<X>",         files.commit),
    ("POST",     "/api/models/<R>/discussions",        repos.open_discussion),
    ("GET",      "/api/models/<R>/discussions/<X>",    repos.discussion),
    ("POST",     "/api/models/<R>/discussions/<X>/merge", repos.merge),
    ("GET",      "/api/resolve-cache/models/<R>/<X>/<P>", files.resolve_cache),
    ("POST",     "/<R>.git/info/lfs/objects/batch",    files.lfs_batch),
    ("POST",     "/<R>.git/info/lfs/verify",           files.verify),
    ("GET",      "/<R>/resolve/<X>/<P>",               files.resolve),
    ("POST",     "/_admin/<X>",                        admin.call),
)
CDN: tuple[Route, ...] = (
    ("GET",      "/lfs/<R>/<X>/<P>",                   files.lfs_object),
    ("PUT",      "/upload/<R>/<X>",                    files.put_object),
    ("PUT",      "/upload/<R>/<X>/<X>",                files.put_part),
)
# fmt: on


def _compiled(routes: tuple[Route, ...]) -> list[tuple[str, re.Pattern[str], Callable[..., None]]]:
    found = []
    for method, path, handler in routes:
        pattern = re.escape(path).replace("<R>", r"([\w.-]+/[\w.-]+?)").replace("<X>", "([^/]+)").replace("<P>", "(.+)")
        found.append((method, re.compile(pattern), handler))
    return found


class HubWire(Wire):
    host_name = "hub"
    table = _compiled(HUB)

    def route(self) -> None:
        for method, pattern, handler in self.table:
            match = pattern.fullmatch(self.raw_path.rstrip("/"))
            if match and self.command.replace("HEAD", "GET") == method:
                return handler(self, *(unquote(group) for group in match.groups()))
        raise HubError(404, f"the loopback hub does not know {self.command} {self.raw_path}")


class CdnWire(HubWire):
    """The other host. Like an object store it refuses a token beside a signature; the log has it."""

    host_name = "cdn"
    table = _compiled(CDN)

    def route(self) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, "Only one auth mechanism allowed: the address is signed, and there is an Authorization header")
        super().route()
