"""Memory and time are bounded whatever a file claims."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers.raw_gguf import array, file_of, key, tensor

# the costliest files that are known for each bound, built with as much of everything as it allows
COSTLY = {
    "names.safetensors": lambda: b"{" + b",".join('"%016d😀":0'.encode() % i for i in range(1_249_000)) + b"}",
    "objects.safetensors": lambda: b"{" + b",".join(b'"%010d":{"a":0}' % i for i in range(624_000)) + b"}",
    "text.safetensors": lambda: '{"a":"😀'.encode() + b"x" * ((32 << 20) - 100) + b'"}',
    "dicts.pdparams": lambda: b"}\x94" * 1_800_000,
    "tuples.pdparams": lambda: b"N" + b"\x85" * 3_600_000,
    "memo.pdparams": lambda: b"N" + b"\x94" * 3_600_000,
    "calls.pdparams": lambda: b"N" + b"Q" * 3_600_000,
    "payloads.pdparams": lambda: b"C\0\x94" * 1_200_000 + b"}\x94" * 600_000,
    "texts.pdparams": lambda: (b"X\xfc\1\0\0" + b"x" * 504 + "😀".encode()) * 73_000 + b"}" * 3_300_000,
    "keys.pdparams": lambda: b"X\xfe\1\0\0" + b"a" * 510 + b"q\0" + b"}h\0Ns" * 900_000,
    "members.bin": lambda: directory(b"PK\1\2" + bytes(24) + b"\5" + bytes(17) + b"%05x" % i for i in range(320_000)),
    "tensors.gguf": lambda: file_of((), [tensor(f"{i:063}", (0,) * 4) for i in range(100_000)]),
    "texts.gguf": lambda: file_of([array("k", 8, [f"{i:09}😀" for i in range(2_900_000)])]),
    "text.gguf": lambda: file_of([key("k", 8, "😀" + "x" * ((64 << 20) - 100))]),
    "numbers.gguf": lambda: file_of([array("k", 12, [struct.pack("<d", 0.5) * 3_000_000], 3_000_000)]),
}  # fmt: skip


def directory(entries: Iterable[bytes]) -> bytes:
    """An archive that is nothing but a directory."""
    data = b"".join(entries)
    return data + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(data), 0, 0)


READ = """
import sys, time
from pathlib import Path
from ernie_quant.errors import CheckpointError
from ernie_quant.readers import read_header, read_keys
peak_kb = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, start, said = peak_kb(), time.process_time(), ""
try:
    read_header(Path(sys.argv[1]))
    if sys.argv[1].endswith(".gguf"):
        read_keys(Path(sys.argv[1]))
except CheckpointError as error:
    said = str(error)
print((peak_kb() - before) // 1000, time.process_time() - start, len(said))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", COSTLY)
def test_memory_and_time_are_bounded_whatever_a_file_claims(tmp_path: Path, name: str) -> None:
    data = COSTLY[name]()
    (tmp_path / name).write_bytes(len(data).to_bytes(8, "little") + data if name.endswith(".safetensors") else data)
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / name], capture_output=True, text=True, check=True)
    megabytes, seconds, letters = map(float, done.stdout.split())
    print(f"{name}: {megabytes:.0f} MB, {seconds:.1f} s")
    assert megabytes < 600
    assert seconds < 20
    assert letters < 600
