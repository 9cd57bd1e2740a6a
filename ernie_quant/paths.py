"""Names of files and folders in a checkpoint or a result, and that none of them leads out of its folder."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from ernie_quant.errors import CheckpointError, MissingFileError

MTP_FOLDER = "mtp"
RANK_FOLDER = re.compile(r"rank(\d+)")
MANIFEST, SUMS = "ernie-quant.json", "SHA256SUMS"
STATE = ".ernie-quant"
FILE = "gguf_file"  # key of the config of a self-contained file: its name
CONFIG, README, SOURCE_README = "config.json", "README.md", "README.source.md"


def weight_folders(root: Path) -> list[Path]:
    """The folders in which a result, of whatever number of ranks, may have weights: rank folders, mtp/ and the root."""
    models = [root, root / MTP_FOLDER]
    ranks = [p for m in models if m.is_dir() for p in sorted(m.iterdir()) if RANK_FOLDER.fullmatch(p.name) and p.is_dir()]
    return [*ranks, *(m for m in reversed(models) if m.is_dir())]


def is_place(folder: str) -> bool:
    """A subfolder with weights of the model: of its MTP block, or of a rank."""
    return folder == MTP_FOLDER or RANK_FOLDER.fullmatch(folder) is not None


def inside(folder: Path, name: str, who: str, *, links: bool = False) -> Path:
    """`folder / name`, if that is a regular file that lies in it. Raises CheckpointError.

    A link may point to the `blobs` of the download cache whose snapshot the folder is, or is a folder of; elsewhere with
    `links` only.
    """
    path = folder / plain(name, who)
    try:
        real, root = path.resolve(), folder.resolve()
        exists, regular = path.exists(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long for the disk, links in a circle
        raise CheckpointError(f"{name[:200]}: named by {who}, but cannot be looked up: {error}"[:400]) from None
    if not exists and path.is_symlink():
        raise MissingFileError(f"{name}: named by {who}, but is a link to {real}, which is not there")
    if not links and not any(real.is_relative_to(r) for r in (root, *_blobs(root))):
        raise CheckpointError(
            f"{name}: is a link to {real}, outside the folder; copy the file or open its folder, or --follow-links if the"
            " links are yours"
        )
    if not exists:
        raise MissingFileError(f"{name}: named by {who}, but is not there")
    if not regular:
        raise CheckpointError(f"{name}: named by {who}, but is no regular file")
    return path


def _blobs(root: Path) -> list[Path]:
    """Where the files of a hub's snapshot lie, if `root` is one (`REPO/snapshots/COMMIT`) or a folder of one."""
    return [commit.parent.parent / "blobs" for commit in (root, *root.parents[:2]) if commit.parent.name == "snapshots"]


def plain(name: str, who: str) -> PurePosixPath:
    """A relative name, without tricks on any system. Raises CheckpointError."""
    parts = PurePosixPath(name).parts
    good = name and parts == PureWindowsPath(name).parts and not PureWindowsPath(name).drive and name.isprintable()
    if not good or ".." in parts or name.startswith("/") or any(":" in p for p in parts):
        raise CheckpointError(f"{who} names the file {name[:200]!r}, which is not a plain name in the folder")
    return PurePosixPath(name)
