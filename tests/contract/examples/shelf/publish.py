"""A place to publish to: every commit is a folder."""

import shutil

from ernie_quant.hubs.shelf.read import files_of, root

from ernie_quant.hubs import Head

DEFAULT_BRANCH = "main"


class Publisher:
    default_branch, pull_requests = DEFAULT_BRANCH, False

    def is_private(self, repo):
        return True if (root() / repo).is_dir() else None

    def create(self, repo, *, private):
        (root() / repo / "0").mkdir(parents=True)
        (root() / repo / "main").write_text("0")

    def head(self, repo, revision):
        place = root() / repo / revision
        if place.is_dir():
            return Head(revision, files_of(repo, revision))
        return Head(place.read_text(), files_of(repo, place.read_text())) if place.is_file() else None

    def fetch(self, repo, commit, name):
        return (root() / repo / commit / name).read_bytes()

    def upload(self, repo, revision, file):
        return False

    def commit(self, repo, revision, parent, files, drop, message, pr):
        new = str(int(parent) + 1)
        shutil.copytree(root() / repo / parent, root() / repo / new)
        for file in files:
            target = root() / repo / new / file.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file.path, target)
        (root() / repo / revision).write_text(new)
        return new

    def tag(self, repo, name, commit):
        (root() / repo / name).write_text(commit)


connect = Publisher
