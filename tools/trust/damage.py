"""Ways to damage a file: at random bytes, in what its format means, or with another in its place.

Containers are opened where they can be: a damaged table in a whole ``.gz`` is another test of a
reader than a damaged ``.gz``, whose checksum is wrong.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.helpers.user_data import Evil

HUGE = 2**40
"""What headers claim: no machine of ours has as much."""
NUMBERS = (
    *("-1", "0", "0.5", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e30", "2147483648"),
    *("9223372036854775808", str(HUGE), "7" * 5_000, "0x10", "1_000", "", '""', "null", "true"),
    *("many", "１", "1e-400", "--1", "-", "1 2"),
)
"""What stands in the place of a number in a text."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 0.5, HUGE, -HUGE, 2**63, 10**400, math.nan, math.inf, 1e300),
    *("", "x", "3", "\0", "é\ud800", "../outside/x", "/etc/hostname", "..", "x" * 2**20),
    *([], {}, [[]], [None], [1, "x"], {"": {}}, {"x": 1}, "DEEP"),
)
"""What stands in the place of a value in JSON; ``"DEEP"`` becomes a list in lists."""
CODE = tuple(f"../input/{folder}code.py:made" for folder in ("", "run/"))
"""Code beside a ``config.json``, which makes a folder outside when it is imported."""
DEEP = "[" * 100_000 + "]" * 100_000
LONG = 3 * 2**20
"""Bytes of a line that is very long."""


@dataclass(frozen=True)
class Around:
    """What a file may be led to."""

    outside: Path
    """A folder that nothing may write to."""
    others: tuple[bytes, ...]
    """Files of other kinds."""

    @property
    def evil(self) -> bytes:
        """A pickle that makes a folder outside."""
        return pickle.dumps(Evil(self.outside / "ran"), protocol=2)


Way = Callable[[Random, bytes, Around], bytes]


def damage(random: Random, path: Path, around: Around) -> str:
    """Damage a file; returns how."""
    if random.random() < 0.02:
        target = random.choice([path, path.parent, around.outside / "file", Path("missing")])
        path.unlink()
        path.symlink_to(target)
        return f"a link to {target.name}"
    how, content = damaged(random, path.name, path.read_bytes(), around)
    path.write_bytes(content)
    return how


def damaged(random: Random, name: str, raw: bytes, around: Around) -> tuple[str, bytes]:
    """How a file was damaged, and its content."""
    format_ = format_of(name, raw)
    kind = random.choices(["bytes", "whole", "format"], [4, 2, 6 if format_ else 0])[0]
    if kind == "format":
        return inside(random, format_, raw, around)
    ways = BYTES if kind == "bytes" else WHOLE
    how = random.choice(list(ways))
    for _ in range(random.choice([1, 1, 2, 5]) if kind == "bytes" else 1):
        raw = ways[how](random, raw, around)
    return how, raw


def format_of(name: str, raw: bytes) -> str:
    """The format of a file whose meaning is damaged, or nothing."""
    if raw[:4] == b"PK\3\4":
        return "zip"
    if raw[:6] == b"\x93NUMPY":
        return "npy"
    if name.endswith((".tgz", ".tar.gz")):
        return "tar"
    if raw[:2] == b"\x1f\x8b":
        return "gz"
    suffixes = {".json": "json", ".safetensors": "safetensors", ".png": "png", ".jpg": "jpg"}
    texts = dict.fromkeys((".csv", ".txt", ".index"), "text")
    return (suffixes | texts).get(Path(name).suffix, "")


def inside(random: Random, format_: str, raw: bytes, around: Around) -> tuple[str, bytes]:
    """Damage what a format means; what cannot be opened is damaged as bytes."""
    if format_ == "gz":
        how, content = damaged(random, "inner.csv", gzip.decompress(raw), around)
        return f"gz of {how}", gzip.compress(content, compresslevel=1)
    if format_ == "zip":
        return in_zip(random, raw, around)
    ways = {"json": JSON, "text": TEXT}.get(format_, {format_: OTHERS.get(format_, flip)})
    how = random.choice(list(ways))
    return how, ways[how](random, raw, around)


# Bytes -------------------------------------------------------------------------------------------


def place(random: Random, raw: bytes | bytearray) -> int:
    """A place in a file: anywhere, or near its begin or end, where headers are."""
    near = min(len(raw), 200)
    where = [random.randrange(len(raw) + 1), random.randrange(near + 1)]
    return random.choice([*where, len(raw) - random.randrange(near + 1)])


def flip(random: Random, raw: bytes, around: Around) -> bytes:
    content = bytearray(raw or b"\0")
    for _ in range(random.choice([1, 2, 8])):
        content[min(place(random, content), len(content) - 1)] = random.randrange(256)
    return bytes(content)


def span(random: Random, raw: bytes) -> tuple[int, int]:
    begin = place(random, raw)
    return begin, min(begin + random.choice([1, 3, 17, 200, 5_000]), len(raw))


def cut(random: Random, raw: bytes, around: Around) -> bytes:
    begin, end = span(random, raw)
    return raw[:begin] + raw[end:]


def double(random: Random, raw: bytes, around: Around) -> bytes:
    begin, end = span(random, raw)
    return raw[:end] + raw[begin:end] * random.choice([1, 1, 100]) + raw[end:]


def insert(random: Random, raw: bytes, around: Around) -> bytes:
    begin = place(random, raw)
    new = [random.randbytes(random.choice([1, 4, 50])), b"\0", b"\xff" * 8, b"\n", b'"', b"\r"]
    return raw[:begin] + random.choice(new) + raw[begin:]


def zero(random: Random, raw: bytes, around: Around) -> bytes:
    begin, end = span(random, raw)
    return raw[:begin] + bytes(end - begin) + raw[end:]


def high(random: Random, raw: bytes, around: Around) -> bytes:
    """The largest number there is, in the place of one of 1, 2, 4 or 8 bytes."""
    begin, size = place(random, raw), random.choice([1, 2, 4, 8])
    most = random.choice([b"\xff" * size, (b"\xff" * size)[:-1] + b"\x7f"])
    return raw[:begin] + most + raw[begin + size :]


BYTES: dict[str, Way] = {
    "bytes flipped": flip,
    "bytes cut": cut,
    "bytes doubled": double,
    "bytes inserted": insert,
    "bytes of zeros": zero,
    "bytes of ones": high,
    "end cut off": lambda random, raw, _: raw[: place(random, raw)],
}
WHOLE: dict[str, Way] = {
    "an empty file": lambda *_: b"",
    "another file": lambda random, _, around: random.choice(around.others),
    "a pickle that runs code": lambda *given: given[2].evil,
    "random bytes": lambda random, *_: random.randbytes(random.choice([1, 100, 10_000])),
    "zeros": lambda random, *_: bytes(random.choice([1, 100, 2**20])),
    "a byte order mark": lambda random, raw, _: (
        random.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]) + raw
    ),
    "UTF-16": lambda _, raw, __: raw.decode("latin1").encode("utf-16"),
    "one long line": lambda random, *_: long_line(random),
    "twice": lambda _, raw, __: raw + raw,
    "lines joined": lambda _, raw, __: raw.replace(b"\n", b","),
    "lines ended as on a Mac": lambda _, raw, __: raw.replace(b"\n", b"\r"),
}


def long_line(random: Random) -> bytes:
    cell = random.choice([b"1,", b",", b"a", b'"', b"7", b"[", b"1\t", b'"",', b" ", b"id,"])
    return cell * (LONG // len(cell)) + random.choice([b"", b"\n", b"\n1,2\n"])


# Texts -------------------------------------------------------------------------------------------


def other_number(random: Random, raw: bytes, around: Around) -> bytes:
    """Some numbers become others, or no numbers."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", raw)) or list(re.finditer(b"", raw))
    chosen = random.sample(found, min(len(found), random.choice([1, 1, 3])))
    for one in sorted(chosen, key=lambda one: -one.start()):
        raw = raw[: one.start()] + random.choice(NUMBERS).encode() + raw[one.end() :]
    return raw


def other_lines(random: Random, raw: bytes, around: Around) -> bytes:
    """A line goes, comes twice, changes places, or gets another cell."""
    lines = raw.splitlines(keepends=True) or [b"\n"]
    chosen, other = random.randrange(len(lines)), random.randrange(len(lines))
    line = lines[chosen]
    cells = line.rstrip(b"\r\n").split(b",")
    fewer, more = b",".join(cells[:-1]) + b"\n", b",".join([*cells, cells[0]]) + b"\n"
    long = b",".join([*cells[:-1], cells[-1] + b"9" * LONG]) + b"\n"
    quoted, named = b'"' + line, b",".join(cells[::-1]) + b"\n"
    new = [b"", line + line, lines[other], fewer, more, b"\n", long, quoted, named, b",\n"]
    lines[chosen] = random.choice(new)
    return b"".join(lines)


TEXT: dict[str, Way] = {
    "other numbers": other_number,
    "other lines": other_lines,
    "no lines but the first": lambda _, raw, __: raw.partition(b"\n")[0] + b"\n",
    "other separators": lambda random, raw, _: raw.replace(b",", random.choice([b";", b"\t", b""])),
}


# JSON --------------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in JSON, as its container and its key or index."""
    items = value.items() if isinstance(value, dict) else ()
    for key, part in [*items, *(enumerate(value) if isinstance(value, list) else ())]:
        yield value, key
        yield from places(part)


def in_json(random: Random, raw: bytes, around: Around) -> bytes:
    """A value becomes another, or goes; a key is another; one comes to it."""
    found = json.loads(raw)
    holder, key = random.choice([*places(found)] or [([0], 0)])
    part, how = holder[key], random.choice(["value", "value", "value", "gone", "key", "nested"])
    if how == "gone":
        del holder[key]
    elif how == "key" and isinstance(holder, dict):
        holder[random.choice(["x", "", key.upper(), "x" * 2**20])] = holder.pop(key)
    elif how == "nested":
        holder[key] = random.choice([[part], {"x": part}, [part] * 3, str(part)])
    else:
        holder[key] = random.choice(VALUES)
    return json.dumps(found).replace('"DEEP"', DEEP).encode()


def names_code(random: Random, raw: bytes, around: Around) -> bytes:
    """An option names code that lies in the run folder, see ``file_kinds.py``."""
    found = json.loads(raw)
    if not isinstance(found, dict) or "router" not in found:
        return in_json(random, raw, around)
    option = random.choice(["router", "model", "data", "equal_to", "conv"])
    code = random.choice(CODE)
    return json.dumps(found | {option: [code] if option == "conv" else code}).encode()


JSON: dict[str, Way] = {
    "another value": in_json,
    "code of its own": names_code,
    "another number": other_number,
    "a number alone": lambda random, *_: random.choice(NUMBERS).encode(),
    "lists in lists": lambda *_: DEEP.encode(),
    "a value alone": lambda random, *_: json.dumps(random.choice(VALUES)).encode(),
}


# Headers -----------------------------------------------------------------------------------------


def in_npy(random: Random, raw: bytes, around: Around) -> bytes:
    """Another shape, type, order or header of an array; objects among its types."""
    file = io.BytesIO(raw)
    np.lib.format.read_magic(file)
    shape, order, dtype = np.lib.format.read_array_header_1_0(file)
    given: dict[str, Any] = {"shape": shape, "fortran_order": order, "descr": dtype.str}
    changed: dict[str, list[Any]] = {
        "shape": [(HUGE,), (HUGE, *shape[1:]), (-1,), (), shape[::-1], (*shape, 1), (0,), (2, 2)],
        "fortran_order": [not order, None],
        "descr": ["<f8", "|O", "|V8", "<U4", ">i8", "<c16", "|b1", f"|S{2**31 - 1}", "<M8[s]"],
    }
    key = random.choice(list(changed))
    given[key] = random.choice(changed[key])
    text = repr(given)
    if random.random() < 0.2:
        text = random.choice(["{", "(" * 2_000, "__import__('os').mkdir('ran')", "{}", text * 9])
    header = text.encode().ljust(117) + b"\n"
    body = around.evil if given["descr"] == "|O" else raw[file.tell() :]
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + body


def in_safetensors(random: Random, raw: bytes, around: Around) -> bytes:
    """Another header: a tensor less, of another name, type, shape or place."""
    (size,) = struct.unpack("<Q", raw[:8])
    if random.random() < 0.1:
        return struct.pack("<Q", random.choice([HUGE, 2**64 - 1, 0, size + 1])) + raw[8:]
    header = in_json(random, raw[8 : 8 + size], around)
    if random.random() < 0.3:
        text = header.replace(b'"F32"', random.choice([b'"F16"', b'"I64"', b'"F64"', b'"BOOL"']), 1)
        header = text
    return struct.pack("<Q", len(header)) + header + raw[8 + size :]


def in_png(random: Random, raw: bytes, around: Around) -> bytes:
    """Another size, depth or color type, with the right checksum."""
    head = bytearray(raw[12:29])
    where, most = random.choice([(4, 4), (8, 4), (12, 1), (13, 1), (16, 1)])
    number = random.choice([2**31 - 1, 20_000, 0, 1]) if most == 4 else random.randrange(20)
    head[where : where + most] = number.to_bytes(most, "big")
    return raw[:12] + head + struct.pack(">I", zlib.crc32(head)) + raw[33:]


def in_jpg(random: Random, raw: bytes, around: Around) -> bytes:
    """Another height or width."""
    begin = max(raw.find(b"\xff\xc0"), 0) + random.choice([5, 7])
    return raw[:begin] + random.choice([b"\xff\xff", b"\0\0", b"\0\1"]) + raw[begin + 2 :]


def in_tar(random: Random, raw: bytes, around: Around) -> bytes:
    """A member of another name, or a link."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(raw)) as old,
        tarfile.open(fileobj=out, mode="w:gz") as new,
    ):
        members = old.getmembers()
        chosen = random.choice(members)
        for member in members:
            content = old.extractfile(member) if member.isfile() else None
            if member is chosen:
                if random.random() < 0.3:
                    member.type, content = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), None
                    member.linkname = random.choice([str(around.outside), "../../outside", "x"])
                else:
                    member.name = random.choice(names(around))
            new.addfile(member, content)
    return out.getvalue()


def names(around: Around) -> list[str]:
    """Names that lead out of a folder, or are none."""
    return [*(f"{'../' * up}outside/new" for up in range(1, 6)), str(around.outside / "new"), "x"]


OTHERS: dict[str, Way] = {
    "npy": in_npy,
    "safetensors": in_safetensors,
    "png": in_png,
    "jpg": in_jpg,
    "tar": in_tar,
}


def in_zip(random: Random, raw: bytes, around: Around) -> tuple[str, bytes]:
    """A member is damaged, another one, or of another name; or its size is merely claimed."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
        compression = archive.infolist()[0].compress_type
    name = random.choice(list(members))
    how = random.choice(["member", "member", "member", "pickle", "name", "gone", "claim", "method"])
    content = members.pop(name)
    if how == "member":
        how, content = damaged(random, name, content, around)
    elif how == "pickle":
        content = in_pickle(random, content, around)
    elif how == "name":
        name = random.choice(names(around))
    elif how == "method":
        compression = random.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for other, whole in members.items():
            archive.writestr(zipfile.ZipInfo(other), whole, compression)
        if how != "gone":
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    made = out.getvalue()
    if how == "claim":
        begin = made.rfind(b"PK\1\2") + random.choice([20, 24, 42])
        size = struct.pack("<I", random.choice([2**32 - 2, 2**31, 0]))
        made = made[:begin] + size + made[begin + 4 :]
    return f"zip, {name}: {how}", made


def in_pickle(random: Random, raw: bytes, around: Around) -> bytes:
    """One that runs code, or whose sizes and names are others."""
    if not raw.startswith(b"\x80\2") or random.random() < 0.3:
        return around.evil
    old = random.choice([b"FloatStorage", b"LongStorage", b"_rebuild_tensor_v2", b"Data", b"K"])
    new = random.choice([b"DoubleStorage", b"system", b"", b"M\xff", b"J\xff\xff\xff\x7f"])
    return raw.replace(old, new, 1)
