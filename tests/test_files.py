"""Files that appear whole or not at all."""

import resource

import pytest

from latentcast.files import read_json, write_json


def test_json_on_a_full_disk_leaves_what_stood_there(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"psnr": 20.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(OSError, match=r"figures.json: cannot be written \(File too large\)$"):
            write_json(path, {"psnr": list(range(5000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_json(path) == {"psnr": 20.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list"), ("", "not valid")]
)
def test_anything_but_a_json_object_is_refused(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"plan.json: {message}") as error:
        read_json(path)
    assert "\n" not in str(error.value)
