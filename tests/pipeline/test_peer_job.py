"""What peers get: a fixed model, samples, the float model's answers, what kind of network it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Array, CalibrationError, Samples
from edgepress.pipeline import snapshot
from edgepress.pipeline.oracle import MAX_SQNR_DB
from edgepress.pipeline.peer_job import MOST_TESTS, RANDOM_SAMPLES, fixed_model, make_task
from edgepress.pipeline.peers._worker import _outputs
from edgepress.pipeline.peers.base import read_job
from tests.graphs import net, random
from tests.pipeline import fake_peers


def test_a_model_gets_fixed_shapes_and_an_opset_that_peers_read(tmp_path: Path) -> None:
    model = net(
        "(float[N,S] x) => (float[N,S] y)", "y = Softmax<axis=1>(x)", {}, opset=11
    )  # fmt: skip
    ir.save(model, tmp_path / "m.onnx")
    fixed = fixed_model(tmp_path / "m.onnx", {"x": (1, 6)}).load()
    assert fixed.opset_imports[""] == 17
    assert [str(value.shape) for value in fixed.graph.inputs] == ["[1,6]"]
    assert [str(value.shape) for value in fixed.graph.outputs] == ["[1,6]"]
    assert [node.op_type for node in fixed.graph] == ["Softmax"]


def test_a_job_reads_back_as_it_was_written(tmp_path: Path) -> None:
    task = fake_peers.task(tmp_path / "job", fake_peers.samples())
    read = read_job(tmp_path / "job")
    assert read == task.job
    assert read.inputs == {"x": ((1, 4), "float32")}
    assert read.outputs == {"y": (1, 3)}
    assert [feed["x"].shape for feed in read.samples("calibration")] == [(1, 4)] * 7
    for given, kept in zip(task.feeds, read.samples("tests"), strict=True):
        np.testing.assert_array_equal(given["x"], kept["x"])
    assert onnx.load(read.model).graph.input[0].name == "x"
    assert task.notes == ()


def test_answers_are_held_to_those_of_the_float_model(tmp_path: Path) -> None:
    task = fake_peers.task(tmp_path / "job", fake_peers.samples())
    right = np.stack([feed["x"] @ fake_peers.WEIGHTS for feed in task.feeds])
    assert task.sqnr_db({"y": np.stack([answer["y"] for answer in task.wanted])}) == MAX_SQNR_DB
    assert task.sqnr_db({"y": 1.1 * right}) == pytest.approx(20, abs=1e-3)
    assert task.sqnr_db({"renamed": 1.1 * right}) == pytest.approx(20, abs=1e-3)


def test_random_samples_are_said_to_be_that(tmp_path: Path) -> None:
    task = fake_peers.task(tmp_path / "job")
    (note,) = task.notes
    assert "--calib" in note
    assert len(task.job.samples("calibration")) == RANDOM_SAMPLES


def test_few_of_many_tests_are_taken_from_all_over(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    x = np.arange(4.0 * 100, dtype=np.float32).reshape(100, 4)
    task = make_task(
        fake_peers.fixed(), tmp_path / "job", calibration=None, tests=Samples(inputs={"x": x})
    )
    assert len(task.feeds) == MOST_TESTS
    assert task.feeds[-1]["x"][0, 0] > 4 * 90


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    wrong = Samples(inputs={"x": random(5, 3)})
    with pytest.raises(CalibrationError, match="shape"):
        make_task(fake_peers.fixed(), tmp_path / "job", calibration=wrong, tests=wrong)


def test_the_key_tells_models_and_samples_apart(tmp_path: Path) -> None:
    keys = {
        fake_peers.task(tmp_path / str(seed), fake_peers.samples(seed)).key for seed in (1, 2, 3)
    }
    assert len(keys) == 3
    again = fake_peers.task(tmp_path / "again", fake_peers.samples(1)).key
    assert again in keys


@pytest.mark.parametrize(
    ("text", "attends", "convolves"),
    [
        ("y = MatMul(x, w)", False, False),
        ("t = Transpose<perm=[1,0]>(x) y = MatMul(x, t)", True, False),
        ("k = Constant<value_floats=[1.0]>() y = MatMul(x, k)", False, False),
        ("z = Unsqueeze(x, a) y = Conv(z, f)", False, True),
    ],
)
def test_what_kind_of_network_it_is(
    tmp_path: Path, text: str, attends: bool, convolves: bool
) -> None:
    constants: dict[str, Array] = {
        "w": random(4, 4),
        "a": np.array([0], np.int64),
        "f": random(2, 1, 1),
    }
    used = {name: array for name, array in constants.items() if f" {name})" in text}
    size = 1 if "Constant" in text else 4
    model = net(f"(float[1,{size}] x) => (float y)", text, used)
    (tmp_path / "job").mkdir()
    tests = Samples(inputs={"x": random(2, size)})
    task = make_task(snapshot.take(model), tmp_path / "job", calibration=None, tests=tests)
    assert (task.job.attends, task.job.convolves) == (attends, convolves)


def test_outputs_whose_channels_are_last_are_moved_back() -> None:
    image = random(1, 3, 5, 7)
    found = _outputs(
        {"a": (1, 3, 5, 7), "b": (1, 3, 5, 7), "c": (1, 6)},
        [np.moveaxis(image, 1, -1), image, random(6)],
    )
    np.testing.assert_array_equal(found["a"], image)
    np.testing.assert_array_equal(found["b"], image)
    assert found["c"].shape == (1, 6)
