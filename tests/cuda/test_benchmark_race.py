"""The race on a GPU, as far as it needs none: everybody takes turns, and nobody stops it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cuda.benchmark_scripts import Load, a_row, fake_bundle, scripts


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    with scripts() as load_script:
        yield load_script


# Contenders ------------------------------------------------------------------------------------

ECHO = """
import json, sys, time
print(json.dumps({"event": "mode", "mode": "eager"}), flush=True)
print(json.dumps({"event": "ready", "modes": {"eager": {}}, "skipped": {}, "macs": 7}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["mode"] == "gone":
        sys.exit(3)
    if request["mode"] == "bad":
        print(json.dumps({"failed": "it broke"}), flush=True)
    else:
        print(json.dumps({"events_ms": [request["seconds"]] * request["runs"]}), flush=True)
"""


def test_a_worker_answers_until_it_fails(load: Load, tmp_path: Path) -> None:
    contenders = load("contenders")
    worker = contenders.Worker([sys.executable, "-c", ECHO], {}, tmp_path / "log")
    try:
        assert worker.wait_ready(time.monotonic() + 30)
        assert worker.ready["macs"] == 7
        assert [told["mode"] for told in worker.told] == ["eager"]
        assert worker.visit("eager", 0.5, 3, 0) == {"events_ms": [0.5] * 3}
        with pytest.raises(contenders.ContenderFailed, match="it broke"):
            worker.visit("bad", 0.5, 3, 0)
        with pytest.raises(contenders.ContenderFailed, match="ended early"):
            worker.visit("gone", 0.5, 3, 0)
    finally:
        worker.close()


def test_a_worker_that_is_late_is_not_ready(load: Load, tmp_path: Path) -> None:
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    worker = load("contenders").Worker(sleeps, {}, tmp_path / "log")
    start = time.monotonic()
    assert not worker.wait_ready(start + 0.2)
    worker.close()
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("#!/bin/sh\necho no GPU >&2\nexit 3\n", "ended with 3: no GPU"),
        ("#!/bin/sh\necho hello\n", "printed no JSON"),
        ("not a program", "--bench:"),
    ],
)
def test_a_bundle_that_cannot_run_says_why(
    load: Load, tmp_path: Path, script: str, why: str
) -> None:
    contenders = load("contenders")
    fake_bundle(tmp_path / "a", script)
    with pytest.raises(contenders.ContenderFailed, match=why):
        contenders.visit_bundle(tmp_path / "a", 0.1, 3, 0.1)


# The race --------------------------------------------------------------------------------------


ROWS = [a_row("one-float16"), a_row("two-float16"), a_row("one-int8"), a_row("one-float32")]


def test_waves_share_pytorch_between_int8_and_float16(load: Load) -> None:
    race = load("race")
    assert race.peer_key(a_row("one-int8", 32)) == ("one", "float16", 32)
    names = [[row["name"] for row in wave] for wave in race.waves(ROWS, 2)]
    assert names == [["one-float16-b1", "two-float16-b1", "one-int8-b1"], ["one-float32-b1"]]
    assert [len(wave) for wave in race.waves(ROWS, 8)] == [4]
    assert [len(wave) for wave in race.waves(ROWS, 1)] == [1, 1, 1, 1]


def test_everybody_takes_turns_and_failures_drop_out(load: Load) -> None:
    race, failed = load("race"), load("contenders").ContenderFailed
    order = ""

    def visit(name: str) -> dict[str, Any]:
        nonlocal order
        order += name
        if name == "b" and order.count("b") == 2:
            raise failed("it broke")
        return {"events_ms": [1.0]}

    visits = {name: lambda name=name: visit(name) for name in "abc"}
    done, why = race.interleave(visits, 3)
    assert order == "abcabcac"
    assert {name: len(found) for name, found in done.items()} == {"a": 3, "c": 3}
    assert why == {"b": "it broke"}


def test_a_summary_keeps_rounds_and_quartiles(load: Load) -> None:
    found = load("race").summary([[1.0, 2.0, 9.0], [3.0, 4.0]])
    assert found == {"rounds": [2.0, 3.5], "q1": 2.0, "p50": 3.0, "q3": 4.0, "count": 5}
    assert load("race").summary([[2.0]])["p50"] == 2.0


class FakeWorker:
    """Ready or not, and takes note of what it is asked."""

    def __init__(self, key: str, events: list[str], state: str, macs: int = 1000) -> None:
        self.key, self.events, self.state = key, events, state
        modes: dict[str, Any] = {"eager": {}, "compiled": {}}
        self.ready: dict[str, Any] = {"modes": modes, "skipped": {"graph": "no"}, "macs": macs}

    def wait_ready(self, _: float) -> bool:
        if self.state == "crashes":
            raise sys.modules["contenders"].ContenderFailed("it crashed")
        return self.state == "ready"

    def visit(self, mode: str, *_: float) -> dict[str, Any]:
        self.events.append(f"{self.key} {mode}")
        time = 2.0 if mode == "eager" else 0.5
        return {"events_ms": [time] * 4, "wall_ms": [3.0] * 4, "queued_ms": 1.5}

    def close(self) -> None:
        self.events.append(f"{self.key} closed")


def test_what_compiles_for_too_long_goes_on_with_a_cheaper_mode(
    load: Load,
) -> None:
    race, events = load("race"), list[str]()
    load("contenders")

    def start(row: dict[str, Any], mode: str) -> FakeWorker:
        name = f"{row['model']} {mode}"
        events.append(f"{name} started")
        states = {"one max-autotune": "late", "two max-autotune": "crashes"}
        states |= {"two reduce-overhead": "crashes", "two none": "crashes"}
        return FakeWorker(name, events, states.get(name, "ready"))

    options = race.Options(deadline=time.monotonic() + 100)
    rows = [*ROWS[:3], a_row("three-float16")]
    ready, modes, why = race.prepared(rows, start, options)
    one, two, three = ((model, "float16", 1) for model in ("one", "two", "three"))
    assert modes == {one: "reduce-overhead", three: "max-autotune"}
    assert set(ready) == {one, three}
    assert why[two] == "it crashed"
    assert "not ready in time" in why[one]
    assert events.count("one max-autotune started") == 1  # int8 and float16 share it
    closed = [event for event in events if event.endswith("closed")]
    assert closed == [
        "one max-autotune closed",
        "two max-autotune closed",
        "two reduce-overhead closed",
        "two none closed",
    ]


BENCH = "#!/bin/sh\nsleep 0.01; echo '{\"samples_ms\": [1.0, 1.0, 1.0, 1.5]}'\n"


def raced(
    load: Load, monkeypatch: pytest.MonkeyPatch, folder: Path, **how: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """Race all ROWS with bundles that are scripts, and PyTorch processes that are none."""
    race, events, results = load("race"), list[str](), list[dict[str, Any]]()
    load("contenders")
    for row in ROWS:
        fake_bundle(folder / row["name"], BENCH if row["model"] == "one" else "#!/bin/sh\nexit 2\n")
    seen = race.visit_bundle

    def visit_bundle(path: Path, *arguments: Any) -> Any:
        events.append(f"ours {path.name}")
        return seen(path, *arguments)

    def torch_worker(row: dict[str, Any], precision: str, *_: Any) -> FakeWorker:
        macs = 2000 if precision == "float32" else 1000
        return FakeWorker(f"{row['model']} {precision}", events, "ready", macs)

    monkeypatch.setattr(race, "visit_bundle", visit_bundle)
    monkeypatch.setattr(race, "torch_worker", torch_worker)
    options = race.Options(**{"deadline": time.monotonic() + 100, "rounds": 2, **how})
    race.race(ROWS, folder, folder / "work", options, results.append, lambda _: None)
    return results, events


def test_a_race_reports_every_row(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results, events = raced(load, monkeypatch, tmp_path)
    assert events[:6] == ["ours one-float16-b1", "one float16 eager", "one float16 compiled"] * 2
    assert [row["name"] for row in results] == [row["name"] for row in ROWS]
    first, broken, int8, other = results
    assert list(first["contenders"]) == ["edgepress", "eager", "compiled"]
    assert first["contenders"]["edgepress"]["events_ms"]["rounds"] == [1.0, 1.0]
    assert first["contenders"]["eager"]["queued_ms"] == 1.5
    assert first["skipped"] == {"graph": "no"}
    assert first["torch_mode"] == "max-autotune"
    assert "edgepress" not in broken["contenders"]
    assert "ended with 2" in broken["skipped"]["edgepress"]
    assert int8["peer_precision"] == "float16"
    assert list(other["contenders"]) == ["edgepress"]  # PyTorch's model is another
    assert "does other work" in other["skipped"]["eager"]
    assert sum(event.endswith("closed") for event in events) == 3


def test_a_row_says_which_mode_it_lacks(load: Load, tmp_path: Path) -> None:
    race = load("race")
    fake_bundle(tmp_path / "one-float16-b1", BENCH)
    worker, options = FakeWorker("one", [], "ready"), race.Options(deadline=0.0, rounds=1)
    del worker.ready["modes"]["compiled"]
    found = race.race_row(ROWS[0], worker, "it was late", tmp_path / ROWS[0]["name"], options)
    assert found["skipped"] == {"graph": "no", "compiled": "it was late"}
    alone = race.race_row(ROWS[0], None, "it crashed", tmp_path / ROWS[0]["name"], options)
    assert list(alone["contenders"]) == ["edgepress"]
    assert set(alone["skipped"].values()) == {"it crashed"}


def test_rows_that_time_does_not_reach_are_named(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results, events = raced(load, monkeypatch, tmp_path, deadline=time.monotonic() + 1)
    assert [row["kind"] for row in results] == ["left out"] * 4
    assert events == []


# PyTorch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet18", 11_689_512, 1_814_073_344),
        ("mobilenetv2", 3_504_872, 300_774_272),
        ("efficientnet-lite0", 4_652_008, 385_187_552),
    ],
)
def test_pytorch_has_the_same_networks(load: Load, name: str, parameters: int, macs: int) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    networks = load("networks")
    model = networks.network(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    image = torch.randn(1, 3, 224, 224)
    assert networks.macs(model, (image,)) == macs
    with torch.no_grad():
        before = model(image)
        after = networks.folded(model)(image)
    assert 0.05 < before.std() < 5  # halves neither overflow nor vanish
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_a_peer_prepares_and_times_its_modes(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    peer, networks = load("torch_peer"), load("networks")
    tiny = {"tiny": lambda: torch.nn.Sequential(networks.conv_norm(3, 4, 3), torch.nn.Flatten())}
    monkeypatch.setattr(networks, "NETWORKS", tiny)
    image = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
    (tmp_path / "0.in").write_bytes(image.tobytes())
    task = peer.Task(
        "tiny", "float32", 2, [{"name": "x", "dtype": "float32", "shape": [2, 3, 224, 224]}],
        data=str(tmp_path / "0.in"), device="cpu", compile="none",
    )  # fmt: skip
    said: list[dict[str, Any]] = []
    how = {"seconds": 0.0, "runs": 3, "warm_up_seconds": 0.0}
    requests = [json.dumps({"mode": mode, **how}) for mode in ("eager", "graph")]
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        with torch.inference_mode():
            np.testing.assert_array_equal(peer.read_inputs(task)[0].numpy(), image)
            peer.serve(task, said.append, iter(requests))
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32
    ready, eager, graph = said[-3:]
    assert ready["event"] == "ready"
    assert list(ready["modes"]) == ["eager"]
    assert ready["modes"]["eager"]["error"] == 0
    assert ready["skipped"]["compiled"] == "RuntimeError: not compiled"
    assert ready["macs"] == 2 * 4 * 3 * 9 * 224 * 224
    assert len(eager["events_ms"]) == len(eager["wall_ms"]) == 3
    assert eager["queued_ms"] > 0
    assert "KeyError" in graph["failed"]


def test_inputs_lie_one_behind_the_other(load: Load, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peer = load("torch_peer")
    ids, image = np.arange(6).reshape(2, 3), np.ones((2, 3, 4, 4), np.float32)
    (tmp_path / "0.in").write_bytes(ids.tobytes() + image.tobytes())
    ends = [("ids", "int64", [2, 3]), ("x", "float32", [2, 3, 4, 4])]
    inputs = [dict(zip(("name", "dtype", "shape"), end, strict=True)) for end in ends]
    found = peer.read_inputs(
        peer.Task("minilm", "float16", 2, inputs, data=str(tmp_path / "0.in"), device="cpu")
    )
    assert [tensor.dtype for tensor in found] == [torch.int64, torch.float16]
    np.testing.assert_array_equal(found[0].numpy(), ids)
    np.testing.assert_array_equal(found[1].numpy(), image)
    assert found[1].is_contiguous(memory_format=torch.channels_last)


def test_only_one_process_measures_kernels_at_a_time(load: Load, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import fcntl

    peer, lock = load("torch_peer"), str(tmp_path / "lock")

    def held() -> bool:
        with Path(lock).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    inner = peer._locked(held, lock)
    outer = peer._locked(lambda: (inner(), held()), lock)  # what measures may call another
    for _ in range(2):
        assert outer() == (True, True)
        assert not held()
