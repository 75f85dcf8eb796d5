"""Links that break, stall, crawl, or are gone for good while a bundle is sent."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepress.targets.remote import ssh_shell
from tests.boards.conftest import (
    SSH_OVERHEAD_BYTES,
    Bundles,
    Edgepress,
    arrived_bytes,
    change_store,
    digests,
    gate,
    in_background,
    installed,
    remains,
    sent_size,
    wait_for,
    when,
)
from tests.loopback import Board, Lab
from tests.loopback_link import Link


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait before the next attempt, but not long."""
    change_store(monkeypatch, pause_s=0.1)


@pytest.fixture
def impatient_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ssh notice in 2 s, not in 45 s, that nothing comes any more."""
    quick = {"ConnectTimeout": 2, "ServerAliveInterval": 1, "ServerAliveCountMax": 2}
    others = [option for option in ssh_shell._OPTIONS if option.partition("=")[0] not in quick]
    monkeypatch.setattr(
        ssh_shell, "_OPTIONS", (*others, *(f"{key}={value}" for key, value in quick.items()))
    )


@pytest.mark.parametrize("where", [1_000, 70_000], ids=["login", "executable"])
def test_a_link_that_breaks_early(
    where: int, bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    link = lab.link(board)
    link.cut_after(where)
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    assert ended.code == 0, ended.err
    assert link.cuts == 1
    assert installed(board.home / "edgepress/first") == digests(bundles.first)
    assert remains(board.home / "edgepress/.edgepress") == []


@pytest.mark.parametrize("breaks_at", [[1_000_000], [1_000_000, 2_000_000, 3_500_000]])
def test_an_upload_goes_on_where_the_link_broke(
    breaks_at: list[int], bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    link = lab.link(board)
    link.throttle(2_000_000)
    sent_before_last = []

    def break_it() -> None:
        for size in breaks_at:
            wait_for(lambda: arrived_bytes(board) >= size, "weights")  # noqa: B023
            link.cut()
        sent_before_last.append(link.sent_bytes)
        link.throttle(None)

    breaks = in_background(break_it)
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    breaks.join()
    assert ended.code == 0, ended.err
    assert link.cuts == len(breaks_at)
    assert installed(board.home / "edgepress/first") == digests(bundles.first)
    missing = sent_size(bundles.first) - breaks_at[-1]
    assert link.sent_bytes - sent_before_last[0] < missing + SSH_OVERHEAD_BYTES


def slow_after_the_first(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> tuple[Path, tuple[object, ...], Link]:
    """Deploy the first bundle, then slow the link down: its place, the options, and the link."""
    place = board.home / "edgepress/net"
    to = ("-d", board.name, "--to", place)
    edgepress("deploy", bundles.first, *to)
    link = lab.link(board)
    link.throttle(2_000_000)
    return place, to, link


def test_where_it_gives_up_the_next_deployment_goes_on(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    place, to, link = slow_after_the_first(bundles, lab, board, edgepress)
    link.cut_after(600_000, times=1000)
    ended = edgepress("deploy", bundles.second, *to)
    assert ended.code == 5
    assert "broke" in ended.err
    assert installed(place) == digests(bundles.first)

    board.wait_until_idle()
    arrived = arrived_bytes(board)
    assert arrived > 0
    link.cut_after(0, times=0)
    link.throttle(None)
    before = link.sent_bytes
    assert edgepress("deploy", bundles.second, *to).code == 0
    missing = sent_size(bundles.second) - arrived
    assert link.sent_bytes - before < missing + SSH_OVERHEAD_BYTES
    assert installed(place) == digests(bundles.second)


def test_a_link_that_is_gone_for_good(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    place, to, link = slow_after_the_first(bundles, lab, board, edgepress)
    gone = when(lambda: arrived_bytes(board) > 500_000, "weights", link.close)
    ended = edgepress("deploy", bundles.second, *to)
    gone.join()
    assert ended.code == 5
    assert "refuses the connection" in ended.err or "broke" in ended.err
    assert installed(place) == digests(bundles.first)
    board.wait_until_idle()


@pytest.mark.usefixtures("impatient_ssh")
def test_a_link_that_stalls_for_good_is_given_up(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    place, to, link = slow_after_the_first(bundles, lab, board, edgepress)
    stalls = when(lambda: arrived_bytes(board) > 500_000, "weights", link.stall)
    ended = edgepress("deploy", bundles.second, *to)
    stalls.join()
    assert ended.code == 5
    assert board.name in ended.err
    assert installed(place) == digests(bundles.first)


def test_a_stall_that_ends_does_no_harm(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    link = lab.link(board)
    link.throttle(2_000_000)

    def pause() -> None:
        wait_for(lambda: arrived_bytes(board) > 500_000, "weights")
        link.stall()
        time.sleep(2)
        link.throttle(None)
        link.resume()

    pauses = in_background(pause)
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    pauses.join()
    assert ended.code == 0, ended.err
    assert link.cuts == 0
    assert installed(board.home / "edgepress/first") == digests(bundles.first)
    assert link.sent_bytes < sent_size(bundles.first) + SSH_OVERHEAD_BYTES


def test_a_slow_link_takes_long_and_is_right(
    bundles: Bundles,
    copy: Callable[[Path], Path],
    lab: Lab,
    board: Board,
    edgepress: Edgepress,
) -> None:
    link = lab.link(board)
    link.throttle(1_500_000)
    ended = edgepress("deploy", bundles.first, "-d", board.name)
    assert ended.code == 0, ended.err
    assert installed(board.home / "edgepress/first") == digests(bundles.first)
    assert edgepress("verify", copy(bundles.first), "-d", board.name).code == 0


def test_a_link_that_breaks_while_it_verifies(
    bundles: Bundles, lab: Lab, board: Board, edgepress: Edgepress
) -> None:
    edgepress("deploy", bundles.first, "-d", board.name)
    with gate(board, lab, "--selftest") as held:
        link = lab.link(board)
        cuts = when(held.exists, "the selftest", link.cut)
        ended = edgepress("verify", bundles.first, "-d", board.name)
        cuts.join()
        assert ended.code == 5
        assert "broke" in ended.err
        board.wait_until_idle()  # though nobody lets the model go on
    assert installed(board.home / "edgepress/first") == digests(bundles.first)
