import resource

import pytest

from shared.atomic import replace_file
from shared.errors import StorageError


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path, durable):
    path = tmp_path / "folder" / "file"
    replace_file(path, b"old", durable=durable)
    replace_file(path, b"new", durable=durable)
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_where_writing_fails_the_old_file_stays_and_the_error_names_it(tmp_path):
    path = tmp_path / "file"
    path.mkdir()  # a folder cannot be replaced by a file
    (path / "inside").write_text("kept")
    with pytest.raises(StorageError, match="file cannot be written"):
        replace_file(path, b"new")
    assert (path / "inside").read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_where_no_byte_more_can_be_written_the_old_file_stays_alone(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(StorageError, match="free some space"):
            replace_file(path, bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
