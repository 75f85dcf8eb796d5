import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgepress.targets.command_device as command_device
import edgepress.targets.remote.ssh_device as ssh_device
from edgepress.targets.base import DeviceFailed, LinkBroken, OnDevice, Target
from edgepress.targets.devices.base import host_architecture, open_device
from edgepress.targets.remote.ssh_device import SshDevice
from tests.loopback import Lab, boards
from tests.targets.tiny import HOST, PI4, export_tiny, need, tiny_answer, tiny_feed

QUICK_S = 60
INFO = '{"inputs": [], "outputs": [], "features": {"asimd": true, "asimddp": true}}'


@pytest.fixture(scope="module")
def pi4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu-aarch64", "qemu-user")
    return export_tiny(PI4, tmp_path_factory.mktemp("pi4") / "bundle").folder


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A board that runs bundles of this machine's own architecture, without an emulator."""
    with boards(1, run_with=()) as lab:
        for name, value in lab.environment.items():
            monkeypatch.setenv(name, value)
        yield lab


def device_of(lab: Lab, target: Target = HOST) -> SshDevice:
    device = open_device(lab.boards[0].name, target)
    assert isinstance(device, SshDevice)
    return device


def scripted(folder: Path, script: str, info: str = INFO) -> Path:
    """A bundle whose executable is a shell script that knows `--info`."""
    folder.mkdir(exist_ok=True)
    model = folder / "model"
    model.write_text(f"#!/bin/sh\nif [ $1 = --info ]; then echo '{info}'; exit; fi\n{script}\n")
    model.chmod(0o755)
    return folder


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + QUICK_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


def test_a_bundle_answers_on_the_board(
    lab: Lab, pi4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_of(lab, PI4)
    assert device.selftest(pi4)["passed"] is True
    feeds = [tiny_feed(seed) for seed in range(3)]
    for answer, feed in zip(device.infer(pi4, feeds), feeds, strict=True):
        for name, wanted in tiny_answer(feed).items():
            assert answer[name].tobytes() == wanted.tobytes()
    assert device.store.sent_bytes > (pi4 / "model").stat().st_size
    monkeypatch.setattr(device.store, "stage", None)  # it is brought there once
    device.info(pi4)


def test_an_emulated_board_gives_no_times(lab: Lab, pi4: Path) -> None:
    device = device_of(lab, PI4)
    assert device.emulated
    made = device.bench(pi4, threads=1, seconds=1, runs=10, defended=True)
    assert (made.samples_ms, made.instructions) == ((), None)
    assert made.device["note"] == "nothing was measured: the board runs bundles under an emulator"
    with pytest.raises(DeviceFailed, match=r"whose times mean nothing\. Use the device qemu"):
        device.profile(pi4, threads=1, seconds=1, runs=10)


def test_a_feature_that_the_board_lacks_is_named_before_much_is_sent(
    bare: Lab, tmp_path: Path
) -> None:
    folder = scripted(
        tmp_path / "bundle", "exit 9", INFO.replace('"asimddp": true', '"asimddp": false')
    )
    (folder / "weights.epw").write_bytes(bytes(100_000))
    device = device_of(bare)
    with pytest.raises(DeviceFailed, match="this board lacks asimddp, which the bundle needs"):
        device.selftest(folder)
    assert device.store.sent_bytes == (folder / "model").stat().st_size


def test_a_board_is_measured(bare: Lab, tmp_path: Path) -> None:
    folder = export_tiny(HOST, tmp_path / "bundle").folder
    device = device_of(bare)
    assert not device.emulated
    made = device.bench(folder, threads=1, seconds=0.001, runs=20)
    assert len(made.samples_ms) >= 20
    assert made.device["name"] == bare.boards[0].name
    assert len(device.profile(folder, threads=1, seconds=0.001, runs=20)) == 3
    host, *_, cores = device.machine.split(", ")
    assert host == os.uname().nodename
    assert cores.endswith(" cores")


def test_what_lies_on_the_board_runs_there(bare: Lab, tmp_path: Path) -> None:
    device = device_of(bare)
    there = bare.boards[0].home / "a b;$(c)"
    shutil.copytree(scripted(tmp_path / "bundle", 'echo "{\\"passed\\": true, \\"at\\": \\"$PWD\\"}"'), there)  # fmt: skip  # noqa: E501
    there.chmod(0o755)
    assert device.selftest(OnDevice(there))["at"] == str(there)
    assert device.store.sent_bytes == 0
    with pytest.raises(DeviceFailed, match="elsewhere is not there, or not any more"):
        device.selftest(OnDevice(there.with_name("elsewhere")))


def test_a_folder_that_changed_is_brought_again(bare: Lab, tmp_path: Path) -> None:
    device = device_of(bare)
    for answer in (7, 8888):
        folder = scripted(tmp_path / "bundle", f"echo '{{\"passed\": {answer}}}'")
        assert device.selftest(folder)["passed"] == answer


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -SEGV $$", "`model --selftest` was ended by SIGSEGV"),
        ("kill -KILL $$", "ended by SIGKILL. That is how the system ends .* memory runs out"),
        ("echo 'model: wrong' >&2; exit 2", "exited with 2: model: wrong"),
        ("echo wrong >&2; exit 255", "exited with 254: wrong"),
        ("echo oh", "should print a JSON object with passed, but printed: oh"),
        ("read x || exit 9", "exited with 9"),
    ],
)
def test_programs_that_misbehave(
    bare: Lab, tmp_path: Path, script: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_device, "_SELFTEST_S", QUICK_S)
    folder = scripted(tmp_path / "bundle", script)
    with pytest.raises(DeviceFailed, match=f"^{bare.boards[0].name}: .*{message}"):
        device_of(bare).selftest(folder)


def test_a_program_that_takes_too_long_is_ended(
    bare: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_of(bare)
    folder = scripted(tmp_path / "bundle", "exec sleep 600")
    there = device.staged(folder)
    monkeypatch.setattr(command_device, "_SELFTEST_S", 0.3)
    with pytest.raises(DeviceFailed, match=r"no answer within 0\.3 s"):
        device.selftest(there)
    bare.boards[0].wait_until_idle()


# A program is asked to end, and one that is deaf to that is ended by force.
@pytest.mark.parametrize("at_term", ["touch asked; exit", ""])
def test_a_program_ends_with_the_link(
    bare: Lab, tmp_path: Path, at_term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_term:
        monkeypatch.setattr(ssh_device, "_KILL_AFTER_S", 1)
    board = bare.boards[0]
    link = bare.link(board)
    device = device_of(bare)
    wait = f"cd {board.home}; trap '{at_term}' TERM; touch started; while :; do sleep 1; done"
    there = device.staged(scripted(tmp_path / "bundle", wait))
    raised: list[Exception] = []

    def work() -> None:
        try:
            device.selftest(there)
        except DeviceFailed as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(board.home / "started")
    link.cut()
    thread.join()
    assert [type(error) for error in raised] == [LinkBroken]
    board.wait_until_idle()
    assert (board.home / "asked").exists() == bool(at_term)


def test_a_cut_while_samples_are_sent(lab: Lab, pi4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_device, "_CHUNK_BYTES", 10**6)
    link = lab.link(lab.boards[0])
    device = device_of(lab, PI4)
    there = device.staged(pi4)
    link.cut_after(50_000)
    with pytest.raises(LinkBroken):
        device.infer(there, [tiny_feed(0)] * 20_000)
    lab.boards[0].wait_until_idle()


def test_the_wrong_architecture_is_named_and_nothing_is_run(
    bare: Lab, pi4: Path, tmp_path: Path
) -> None:
    if host_architecture() != "x86_64":
        pytest.skip("this machine runs bundles for aarch64")
    folder = tmp_path / "bundle"
    shutil.copytree(pi4, folder)
    # a shell takes what the kernel does not run for a script, as it does with this one
    (folder / "model").write_text("touch canary\n")
    with pytest.raises(
        DeviceFailed, match=r"its system is x86_64, but pi4 bundles are aarch64\. Install another"
    ):
        device_of(bare, PI4).selftest(folder)
    assert not list(bare.boards[0].home.rglob("canary"))


def test_a_missing_emulator_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with boards(1, run_with=("/nowhere/qemu-aarch64", "-cpu", "max")) as lab:
        for name, value in lab.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            DeviceFailed, match="run_with names /nowhere/qemu-aarch64, which is not"
        ):
            device_of(lab, PI4).selftest(scripted(tmp_path / "bundle", "true"))


def test_an_old_glibc_is_named(bare: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "./model: /lib/libc.so.6: version `GLIBC_9.99' not found (required by ./model)"
    folder = scripted(tmp_path / "bundle", f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
    monkeypatch.setattr(ssh_device, "needed_glibc", lambda _: (9, 99))
    with pytest.raises(DeviceFailed, match=r"glibc \S+ is too old: bundles .* need 9\.99"):
        device_of(bare).selftest(folder)


def test_words_before_the_executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scripted(tmp_path / "bundle", 'echo "{\\"passed\\": \\"$MARK\\"}"')
    with boards(1, run_with=("/usr/bin/env", "MARK=a  b;c")) as lab:
        for name, value in lab.environment.items():
            monkeypatch.setenv(name, value)
        assert device_of(lab).selftest(folder)["passed"] == "a  b;c"
