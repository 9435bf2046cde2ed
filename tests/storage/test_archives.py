"""Extraction of untrusted archives."""

import io
import tarfile

import pytest

from cvlab.errors import DataError
from cvlab.storage.archives import extract_tar


def pack(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd"
            tar.addfile(member, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return path


def extract(path, folder):
    folder.mkdir(exist_ok=True)
    extract_tar(path, folder, max_bytes=10_000, max_members=5)


def test_files_and_folders_are_unpacked(tmp_path):
    members = [("a", tarfile.DIRTYPE, b""), ("a/b.txt", tarfile.REGTYPE, b"hello"), ("c", tarfile.REGTYPE, b"")]
    extract(pack(tmp_path / "x.tgz", members), tmp_path / "out")
    assert (tmp_path / "out" / "a" / "b.txt").read_bytes() == b"hello"
    assert (tmp_path / "out" / "c").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../evil", tarfile.REGTYPE),
        ("a/../../evil", tarfile.REGTYPE),
        ("/evil", tarfile.REGTYPE),
        ("C:/evil", tarfile.REGTYPE),
        ("a/C:evil", tarfile.REGTYPE),
        ("a\\..\\evil", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("hard", tarfile.LNKTYPE),
        ("device", tarfile.CHRTYPE),
        ("fifo", tarfile.FIFOTYPE),
        (".", tarfile.REGTYPE),
    ],
)
def test_other_members_are_rejected(tmp_path, name, kind):
    path = pack(tmp_path / "x.tgz", [(name, kind, b"evil")])
    with pytest.raises(DataError):
        extract(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["out", "x.tgz"]


def test_too_many_members_or_bytes_are_rejected(tmp_path):
    many_members = pack(tmp_path / "many.tgz", [(f"f{k}", tarfile.REGTYPE, b"") for k in range(6)])
    with pytest.raises(DataError, match="more than 5 members"):
        extract(many_members, tmp_path / "out")
    large = pack(tmp_path / "large.tgz", [("f", tarfile.REGTYPE, bytes(10_001))])
    with pytest.raises(DataError, match="more than 10000 bytes"):
        extract(large, tmp_path / "out2")


@pytest.mark.parametrize("raw", [b"", b"x" * 600, b"\x1f\x8b" + b"x" * 600])
def test_a_file_that_is_not_an_archive_is_rejected(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(DataError, match="cannot be unpacked"):
        extract(tmp_path / "x", tmp_path / "out")


def test_a_truncated_archive_is_rejected(tmp_path):
    path = pack(tmp_path / "x.tar", [("f", tarfile.REGTYPE, bytes(5000))], "w")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError):
        extract(path, tmp_path / "out")
