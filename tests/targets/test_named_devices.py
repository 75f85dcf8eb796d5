"""The rules of `devices.toml`, and where it is looked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgepress.targets.base import DeviceFailed
from edgepress.targets.devices.base import find_device
from edgepress.targets.load import target_names
from edgepress.targets.named_devices import (
    InvalidDevices,
    NamedDevice,
    devices_file,
    named_devices,
    parse_devices,
)

ALL = """
[pi4-lab]
connect = "ssh:pi@10.0.0.7"
target = "raspberry-pi-4"
folder = "/opt/models of 'ours' $(x)"
run_with = ["chrt", "-f", "50"]

[bench]
connect = "local"
"""


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No devices.toml of the person who runs this."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEPRESS_DEVICES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_every_key() -> None:
    pi4, bench = parse_devices(ALL, "devices.toml").values()
    assert pi4 == NamedDevice(
        name="pi4-lab",
        connect="ssh:pi@10.0.0.7",
        target="raspberry-pi-4",
        folder="/opt/models of 'ours' $(x)",
        run_with=("chrt", "-f", "50"),
    )
    assert bench == NamedDevice(name="bench", connect="local")
    assert (bench.target, bench.folder, bench.run_with) == ("", "", ())


DEEP = "a = " + "[" * 5000
DIGITS = "a = " + "1" * 5000
LARGE = "a = { connect = 0x" + "f" * 5000 + " }"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pi", "boards.toml is not TOML: Expected"),
        ("[pi]\nx", r"boards.toml is not TOML: .*(line 2|end of)"),
        (DEEP, "boards.toml is not TOML"),
        (DIGITS, "boards.toml is not TOML"),
        (LARGE, r"\[a\]: connect must be a string, not an integer"),
        ("pi = 'ssh:pi'", r"boards.toml: \[pi\] must be a table, such as { connect = "),
        ("[['pi']]\nconnect = 'local'", r"\[pi\] must be a table"),
        ("['a b']", r"\[a b\]: a name is letters, digits"),
        ("['-x']", r"\[-x\]: a name is"),
        ("['']", r"\[\]: a name is"),
        ("['ä']", r"\[ä\]: a name is"),
        ('["pi\\n"]', "a name is"),
        ("[qemu]\nconnect = 'local'", r"\[qemu\]: qemu is a kind of device. Give the board anothe"),
        ("[pi]", r"\[pi\]: missing connect, such as connect = \"ssh:pi@10.0.0.7\"."),
        ("[pi]\nconnect = ''", r"\[pi\]: missing connect"),
        ("[pi]\nconect = 'ssh:pi'", r"\[pi\]: unknown key 'conect'. Did you mean connect\?"),
        ("[pi]\nname = 'pi'", r"\[pi\]: unknown key 'name'. Known: connect, folder, run_with, tar"),
        ("[pi]\nconnect = 1", r"\[pi\]: connect must be a string, not an integer."),
        ("[pi]\nconnect = ['ssh:pi']", r"connect must be a string, not such a list."),
        ("[pi]\ntarget = true", r"target must be a string, not true or false."),
        ("[pi]\nfolder = 2026-11-26", r"folder must be a string, not a date or a time."),
        ("[pi]\nfolder = 1.5", r"folder must be a string, not a number."),
        ("[pi]\nfolder.x = 1", r"folder must be a string, not a table."),
        ("[pi]\nrun_with = 'chrt'", r"run_with must be a list of strings, not a string."),
        ("[pi]\nrun_with = ['chrt', 50]", r"run_with must be a list of strings, not such a list."),
        ('[pi]\nconnect = "local"\nrun_with = [""]', "the first word of run_with is empty"),
        ('[pi]\nfolder = "/a\\u0000b"', "folder holds a NUL character"),
        ('[pi]\nrun_with = ["a", "\\u0000"]', "run_with holds a NUL character"),
        ("[pi]\nconnect = 'shh:pi'", "connect = 'shh:pi' is of no known kind. Did you mean ssh"),
        ("[pi]\nconnect = 'usb'", "is of no known kind. Known: local, qemu, ssh"),
        ("[pi]\nconnect = 'base'", "is of no known kind"),
        ("[pi]\nconnect = 'ssh:pi'\nfolder = 'models'", "folder must begin with / or ~/, it is 'm"),
        ("[pi]\nconnect = 'ssh:pi'\nfolder = '~joe/x'", "folder must begin with / or ~/"),
    ],
)
def test_rules(text: str, message: str) -> None:
    with pytest.raises(InvalidDevices, match=message):
        parse_devices(text, "boards.toml")


TEXTS = st.text(max_size=80)
TABLES = st.from_regex(
    r"\[\"?[a-z.\\ ]{1,6}\"?\]\n((connect|folder|run_with|target|x) = "
    r"(\"[a-z:\\/~]{0,8}\"|\[(\"[a-z]*\",?){0,3}\]|[0-9.e:T+-]{1,6}|\{[a-z =1]{0,9}\}|true)\n){0,4}"
)


@given(TEXTS | TABLES)
@example(DEEP)
@example(DIGITS)
@example(LARGE)
@example("a = 1979-13-41")
@example('a = "\\ud800"')
@settings(deadline=None, max_examples=400)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        boards = parse_devices(text, "devices.toml")
    except InvalidDevices:
        return
    assert all(board.connect for board in boards.values())


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_devices() == {}
    users = tmp_path / "config/edgepress/devices.toml"
    users.parent.mkdir(parents=True)
    users.write_text("a = { connect = 'local' }")
    assert devices_file() == users
    assert list(named_devices()) == ["a"]
    Path("devices.toml").write_text("b = { connect = 'local' }")
    assert list(named_devices()) == ["b"]
    Path("other.toml").write_text("c = { connect = 'local' }")
    monkeypatch.setenv("EDGEPRESS_DEVICES", "other.toml")
    assert list(named_devices()) == ["c"]
    monkeypatch.setenv("EDGEPRESS_DEVICES", "")
    assert list(named_devices()) == ["b"]


def test_a_file_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_DEVICES", "absent.toml")
    with pytest.raises(InvalidDevices, match=r"EDGEPRESS_DEVICES names absent.toml, which is not"):
        named_devices()
    monkeypatch.setenv("EDGEPRESS_DEVICES", "")
    assert named_devices() == {}


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_DEVICES", str(tmp_path))
    with pytest.raises(InvalidDevices, match=r"cannot be read: .*directory"):
        named_devices()
    broken = tmp_path / "latin.toml"
    broken.write_bytes(b"# caf\xe9\n")
    monkeypatch.setenv("EDGEPRESS_DEVICES", str(broken))
    with pytest.raises(InvalidDevices, match=r"latin.toml cannot be read: .*utf-8"):
        named_devices()


def test_a_name_is_resolved() -> None:
    Path("devices.toml").write_text(ALL)
    assert find_device("pi4-lab").connect == "ssh:pi@10.0.0.7"
    assert find_device("ssh:elsewhere") == NamedDevice(
        name="ssh:elsewhere", connect="ssh:elsewhere"
    )
    with pytest.raises(
        DeviceFailed, match=r"no device is called 'pi4-lib'. Did you mean pi4-lab\?"
    ):
        find_device("pi4-lib")
    with pytest.raises(DeviceFailed, match=r"Known: local, qemu, ssh, pi4-lab, bench;"):
        find_device("x")


def test_the_page_on_devices_shows_every_key() -> None:
    page = Path(__file__).parent.parent.parent / "docs/devices.md"
    text = page.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    boards = parse_devices(text, "devices.md")
    assert all(board.target in target_names() for board in boards.values())
    for field in dataclasses.fields(NamedDevice):
        assert any(getattr(board, field.name) for board in boards.values()), field.name
