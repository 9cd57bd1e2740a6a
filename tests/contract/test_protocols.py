"""Every plug-in stands in helpers/protocols.py, where mypy holds it to its protocol."""

from __future__ import annotations

from types import ModuleType

import pytest
from helpers import protocols

from ernie_quant import archs, codecs, plugins, runners, runtimes, writers


@pytest.mark.parametrize(
    ("package", "listed"),
    [
        (archs, protocols.ARCHS),
        (runners, protocols.RUNNERS),
        (runtimes, protocols.RUNTIMES),
        (writers, protocols.FORMATS),
    ],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_no_file_is_missing(package: ModuleType, listed: tuple[object, ...]) -> None:
    assert sorted(plugins.name_of(plugin, package) for plugin in listed) == list(plugins.names(package))


def test_no_codec_is_missing() -> None:
    assert {codecs.name_of(codec) for codec in protocols.CODECS} == set(plugins.names(codecs))
