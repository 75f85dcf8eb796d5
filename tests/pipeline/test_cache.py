import os
from pathlib import Path

import pytest

from edgepress.pipeline.cache import Cache, cache_folder, code_version, content_key

KEY = content_key("a")


def put(cache: Cache, key: str, text: str) -> None:
    def fill(folder: Path) -> None:
        (folder / "value.txt").write_text(text)

    cache.put(key, fill)


def value(cache: Cache, key: str) -> str | None:
    entry = cache.get(key)
    return None if entry is None else (entry / "value.txt").read_text()


def test_an_entry_comes_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new")
    assert value(cache, KEY) is None
    put(cache, KEY, "one")
    assert value(cache, KEY) == "one"
    assert value(Cache(tmp_path / "new"), KEY) == "one"
    assert not list((tmp_path / "new").glob(".partial-*"))


def test_a_second_writer_changes_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    put(cache, KEY, "one")
    put(cache, KEY, "two")
    assert value(cache, KEY) == "one"


@pytest.mark.parametrize("damage", ["value", "missing", "extra", "index", "index-shape"])
def test_a_damaged_entry_is_dropped(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    put(cache, KEY, "one")
    entry = cache.get(KEY)
    assert entry is not None
    match damage:
        case "value":
            (entry / "value.txt").write_text("two")
        case "missing":
            (entry / "value.txt").unlink()
        case "extra":
            (entry / "more.txt").write_text("")
        case "index":
            (entry / "entry.json").write_text("{")
        case _:
            (entry / "entry.json").write_text("[1]")
    assert cache.get(KEY) is None
    assert not entry.exists()
    put(cache, KEY, "three")
    assert value(cache, KEY) == "three"


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=900)
    keys = [content_key(i) for i in range(3)]
    for age, key in enumerate(keys[:2]):
        put(cache, key, "x" * 300)
        entry = cache.get(key)
        assert entry is not None
        os.utime(entry, (age + 1, age + 1))
    assert cache.get(keys[0]) is not None  # used again, so the other one is the oldest
    put(cache, keys[2], "x" * 300)
    assert [cache.get(key) is not None for key in keys] == [True, False, True]


def test_what_fill_raises_is_raised_and_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cache.put(KEY, fill)
    assert cache.get(KEY) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    put(cache, KEY, "one")
    assert cache.get(KEY) is None


def test_a_full_disk_is_no_error(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    Cache(tmp_path).put(KEY, fill)
    assert Cache(tmp_path).get(KEY) is None


def test_keys_and_versions() -> None:
    assert content_key("a", 1) != content_key("a", "1")
    assert code_version("edgepress.passes") == code_version("edgepress.passes")
    assert code_version("edgepress.passes") != code_version("edgepress.calibration")


def test_the_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("EDGEPRESS_CACHE_DIR")
    assert cache_folder().name == "edgepress"


def test_another_process_may_finish_its_entry_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a glob has listed can be renamed before it is looked at."""
    listed = Path.glob

    def glob(folder: Path, pattern: str) -> list[Path]:
        return [*listed(folder, pattern), folder / pattern.replace("*", "gone")]

    monkeypatch.setattr(Path, "glob", glob)
    put(Cache(tmp_path), KEY, "one")
    assert value(Cache(tmp_path), KEY) == "one"
