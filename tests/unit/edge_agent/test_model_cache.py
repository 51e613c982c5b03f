"""Base weights on disk: verified, continued after a crash, shared by agents, bounded."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.model_cache import ModelCache
from edge_agent.part_file import PartFile
from shared.errors import ModelError, StorageError
from shared.protocol.messages import Piece

CONTENT = b"weights of a block"


def piece(content: bytes = CONTENT, name: str = "block.0") -> Piece:
    digest = hashlib.sha256(content).hexdigest()
    return Piece(name=name, sha256=digest, size_bytes=len(content))


def filled(folder: Path, *contents: bytes) -> ModelCache:
    cache = ModelCache(folder)
    for content in contents:
        part = PartFile(folder, piece(content))
        part.append(content)
        cache.add(piece(content), part)
    return cache


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_complete_piece_is_found_under_its_hash(tmp_path):
    cache = filled(tmp_path, CONTENT)
    assert cache.missing([piece()]) == ()
    assert cache.path(piece()).read_bytes() == CONTENT
    assert names(tmp_path) == [piece().sha256]


def test_a_later_start_finds_it_again(tmp_path):
    filled(tmp_path, CONTENT).close()
    assert ModelCache(tmp_path).missing([piece(), piece(b"other")]) == (piece(b"other"),)


def test_missing_names_each_content_once(tmp_path):
    twins = [piece(name="block.0"), piece(name="block.1")]
    assert [one.sha256 for one in ModelCache(tmp_path).missing(twins)] == [piece().sha256]


def test_a_piece_that_is_not_here_has_no_path(tmp_path):
    with pytest.raises(ModelError, match=r"piece block.0 .* is not in .*; fetch it first"):
        ModelCache(tmp_path).path(piece())


def test_a_damaged_file_is_deleted_and_missing(tmp_path, caplog):
    filled(tmp_path, CONTENT).close()
    (tmp_path / piece().sha256).write_bytes(CONTENT[:-1] + b"X")
    assert ModelCache(tmp_path).missing([piece()]) == (piece(),)
    assert names(tmp_path) == []
    assert "is damaged; it is deleted and fetched again" in caplog.text


def test_wrong_bytes_never_get_the_name_and_are_deleted(tmp_path):
    cache = ModelCache(tmp_path)
    part = PartFile(tmp_path, piece())
    part.append(b"something else now")
    with pytest.raises(ModelError, match="do not have the SHA-256"):
        cache.add(piece(), part)
    assert names(tmp_path) == []


def test_what_a_killed_agent_left_is_continued(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from edge_agent.part_file import PartFile; from shared.protocol.messages import Piece\n"
        "folder, sha, size = sys.argv[1:]\n"
        "part = PartFile(Path(folder), Piece(name='block.0', sha256=sha, size_bytes=int(size)))\n"
        "part.append(b'weights of'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), piece().sha256, str(len(CONTENT))],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    part = PartFile(tmp_path, piece())
    assert part.size_bytes == 10
    part.append(CONTENT[10:])
    assert ModelCache(tmp_path).add(piece(), part).read_bytes() == CONTENT


def test_an_unfinished_file_that_is_too_long_is_begun_anew(tmp_path):
    (tmp_path / f"{piece().sha256}.0.part").write_bytes(CONTENT + b"X")
    part = PartFile(tmp_path, piece())
    assert part.size_bytes == 0
    part.append(CONTENT)
    assert ModelCache(tmp_path).add(piece(), part).read_bytes() == CONTENT


def test_two_agents_in_one_folder_do_not_mix_their_bytes(tmp_path):
    one, other = PartFile(tmp_path, piece()), PartFile(tmp_path, piece())
    for byte in CONTENT:
        one.append(bytes([byte]))
        other.append(bytes([byte]))
    caches = ModelCache(tmp_path), ModelCache(tmp_path)
    paths = {caches[0].add(piece(), one), caches[1].add(piece(), other)}
    assert [path.read_bytes() for path in paths] == [CONTENT]
    assert names(tmp_path) == [piece().sha256]


def test_pruning_deletes_what_was_used_longest_ago(tmp_path):
    contents = [b"a" * 10, b"b" * 10, b"c" * 10]
    filled(tmp_path, *contents).close()
    for age_s, content in enumerate([b"b" * 10, b"a" * 10, b"c" * 10]):
        os.utime(tmp_path / piece(content).sha256, (1000 + age_s, 1000 + age_s))
    assert ModelCache(tmp_path).prune(20) == 10
    assert not (tmp_path / piece(b"b" * 10).sha256).exists()
    assert len(names(tmp_path)) == 2


def test_pruning_leaves_what_another_agent_uses_and_what_is_being_written(tmp_path):
    user = filled(tmp_path, b"used", b"free")
    user.close()
    assert user.path(piece(b"used")).exists()
    writing = PartFile(tmp_path, piece())
    (tmp_path / f"{piece().sha256}.1.part").write_bytes(b"left over")
    ModelCache(tmp_path).prune(0)
    assert names(tmp_path) == sorted([piece(b"used").sha256, f"{piece().sha256}.0.part"])
    writing.close()


def test_a_full_disk_is_told_with_both_numbers(tmp_path, monkeypatch):
    part = PartFile(tmp_path, piece())

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"disk full: 18 bytes more are needed and [\d,]+ are"):
        part.append(CONTENT)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="choose another cache_folder"):
        ModelCache(tmp_path / "file" / "cache")
