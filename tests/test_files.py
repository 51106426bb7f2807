"""Files are replaced whole, with the rights that any new file has, and nothing is left beside them."""

import json
import os

import pytest

from empcause.files import replacing, write_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "metrics.json"
    write_text(path, json.dumps({"name": "é"}))
    write_text(path, "new\nline\n")
    assert path.read_bytes() == b"new\nline\n"
    assert os.listdir(tmp_path) == ["metrics.json"]
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def write_half():
        with replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\udc80")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_link_is_replaced_not_followed(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    write_text(link, "new")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "file", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "text")
    assert os.listdir(tmp_path) == ["folder"]
