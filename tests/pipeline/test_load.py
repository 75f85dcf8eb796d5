from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.pipeline.load import ModelError, load_model, model_sha256
from tests.graphs import answers, random


def proto(body: str, header: str = '<ir_version: 8, opset_import: ["" : 17]>') -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{header} g (float[1,4] x) => (float[1,4] y) {{ {body} }}")


def dense(weight: np.ndarray | None = None) -> onnx.ModelProto:
    model = proto("y = MatMul(x, w)")
    array = random(4, 4) if weight is None else weight
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    return model


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def external(folder: Path, location: str = "model.data", size: int = 64) -> Path:
    model = dense()
    tensor = model.graph.initializer[0]
    data, tensor.raw_data = tensor.raw_data, b""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "64"}.items():
        tensor.external_data.add(key=key, value=value)
    (folder / "model.data").write_bytes(data[:size])
    return saved(folder, model)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_loads_and_names_everything(tmp_path: Path) -> None:
    model = proto("a = Relu(x) b = Relu(a) c, m = Dropout(b) y = Add(c, a)")
    for node, name in zip(model.graph.node, ["same", "", "same", "Relu_1"], strict=True):
        node.name = name
    loaded = load_model(saved(tmp_path, model))
    assert [node.name for node in loaded.graph] == ["same", "Relu_1_1", "same_1", "Relu_1"]
    assert all(value.name for node in loaded.graph for value in node.outputs)


def test_an_output_that_was_left_out_stays_out_or_gets_a_name(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[5,1,4] x, float[1,16,4] w,'
        " float[1,16,4] r) => (float[1,1,4] c) { y, h, c = LSTM <hidden_size=4> (x, w, r) }"
    )
    model.graph.node[0].output[0] = ""
    assert [v.name for v in load_model(saved(tmp_path, model)).graph[0].outputs] == [
        "LSTM_0_output_0",
        "h",
        "c",
    ]
    model.graph.output[0].name = "h"
    model.graph.node[0].output[2] = ""
    assert [v.name for v in load_model(saved(tmp_path, model)).graph[0].outputs] == [
        "LSTM_0_output_0",
        "h",
    ]


def test_sorts_nodes_and_spells_the_standard_domain_one_way(tmp_path: Path) -> None:
    model = proto("a = Relu(x) y = Neg(a)")
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import[0].domain = "ai.onnx"
    model.opset_import.add(domain="com.unused", version=1)
    loaded = load_model(saved(tmp_path, model))
    assert [node.op_type for node in loaded.graph] == ["Relu", "Neg"]
    assert loaded.graph.opset_imports == {"": 17}


def test_inlines_functions(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
    g (float[1,4] x) => (float[1,4] y) { a = f.twice(x) y = f.twice(a) }
    <domain: "f", opset_import: ["" : 17]> twice (v) => (w) { w = Add(v, v) }
    <domain: "f", opset_import: ["" : 17]> unused (v) => (w) { w = Neg(v) }"""
    loaded = load_model(saved(tmp_path, onnx.parser.parse_model(text)))
    assert [node.op_type for node in loaded.graph] == ["Add", "Add"]
    assert [value.name for value in loaded.graph.outputs] == ["y"]
    assert not loaded.functions
    x = random(1, 4)
    np.testing.assert_array_equal(answers(loaded, {"x": x})[0], 4 * x)


def test_external_data_is_in_memory(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load_model(path)
    (tmp_path / "model.data").unlink()
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), random(4, 4))


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    path = external(tmp_path, "link.data")
    (tmp_path / "link.data").symlink_to(tmp_path / "model.data")
    assert load_model(path).graph.num_nodes() == 1


@pytest.mark.parametrize("location", ["../model.data", "/etc/passwd", "a/../../model.data", ""])
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "model.data").write_bytes(bytes(64))
    assert "outside the model's own folder" in refused(external(folder, location))


def test_external_data_stays_in_the_folder_through_links(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    path = external(folder, "link.data")
    (folder / "model.data").rename(tmp_path / "model.data")
    (folder / "link.data").symlink_to(tmp_path / "model.data")
    assert "outside the model's own folder" in refused(path)
    with pytest.raises(ModelError, match="outside"):
        model_sha256(path)


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    path = external(tmp_path, size=60)
    assert "'w' needs bytes 0 to 64 of 'model.data', which has 60" in refused(path)
    (tmp_path / "model.data").unlink()
    assert "'model.data' is missing" in refused(path)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "absent.onnx")
    path = tmp_path / "x.onnx"
    path.write_bytes(b"")
    assert "is empty" in refused(path)
    path.write_bytes(b"<html>404</html>")
    assert "is not an ONNX model" in refused(path)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_model_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    content = dense().SerializeToString()
    path = tmp_path_factory.mktemp("cut") / "model.onnx"
    path.write_bytes(content[: int(cut * len(content))])
    refused(path)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_damage_never_gets_past_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(dense().SerializeToString())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    path.write_bytes(content)
    with contextlib.suppress(ModelError):
        assert isinstance(load_model(path), ir.Model)


@pytest.mark.parametrize(("opset", "words"), [(6, "oldest supported"), (99, "knows up to")])
def test_opsets_out_of_range(tmp_path: Path, opset: int, words: str) -> None:
    model = dense()
    model.opset_import[0].version = opset
    message = refused(saved(tmp_path, model))
    assert words in message
    assert str(opset) in message


def test_versions_that_onnxruntime_does_not_run(tmp_path: Path) -> None:
    """onnx may know newer ones than the reference that every answer is held to."""
    model = dense()
    model.ir_version = 999
    message = refused(saved(tmp_path, model))
    assert "IR version 999" in message
    assert "Upgrade onnxruntime" in message


def test_a_graph_without_inputs(tmp_path: Path) -> None:
    model = dense()
    while model.graph.input:
        name = model.graph.input.pop().name
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), name))
    assert "no inputs" in refused(saved(tmp_path, model))


def test_an_output_that_is_listed_twice(tmp_path: Path) -> None:
    model = dense()
    model.graph.output.append(model.graph.output[0])
    assert "listed more than once" in refused(saved(tmp_path, model))


def test_one_message_lists_all_that_is_unsupported(tmp_path: Path) -> None:
    body = """
    s = SequenceConstruct(x) e = SequenceAt(s, zero) u = my.Thing(e) n = NoSuchOp(u)
    t = Cast <to=8> (n) b = Constant <value_string="no"> () c = Cast <to=9> (x)
    i = If (c) <then_branch = g1 () => (float[1,4] a) { a = Identity(x) },
                else_branch = g2 () => (float[1,4] b2) { b2 = Identity(x) }>
    old = Upsample(x, x) y = Add(i, old)
    """
    header = '<ir_version: 8, opset_import: ["" : 17, "my" : 1]>'
    model = proto(body, header)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "zero"))
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("words", onnx.TensorProto.STRING, [1])
    )
    message = refused(saved(tmp_path, model))
    assert "9 parts" in message
    for part in (
        "words (STRING): only plain numeric tensors",
        "SequenceConstruct_0 (SequenceConstruct): it works on seq(",
        "SequenceAt_1",
        "Thing_2 (Thing): operators of the domain 'my'",
        "NoSuchOp_3 (NoSuchOp): there is no such operator in opset 17",
        "Cast_4 (Cast): STRING",
        "Constant_5 (Constant): STRING",
        "If_7 (If): control flow",
        "Upsample_8 (Upsample): opset 17 no longer has this operator",
    ):
        assert part in message


def _nan(model: onnx.ModelProto) -> None:
    array = random(4, 4)
    array[1, 2] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))


def _infinite(model: onnx.ModelProto) -> None:
    array = random(4, 4)
    array[0] = np.inf
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))


def _short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = bytes(60)


def _negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_nan, "1 of 16 elements are NaN"),
        (_infinite, "4 of 16 elements are infinite"),
        (_short, "'w'"),
        (_negative, "'w'"),
    ],
)
def test_bad_weights_are_named(
    tmp_path: Path, harm: Callable[[onnx.ModelProto], None], words: str
) -> None:
    model = dense()
    harm(model)
    message = refused(saved(tmp_path, model))
    assert "'w'" in message
    assert words in message


def test_infinity_is_fine_in_a_mask(tmp_path: Path) -> None:
    model = proto("y = Add(x, w)")
    mask = np.array([0, -np.inf, 0, 0], np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(mask, "w"))
    assert load_model(saved(tmp_path, model)).graph.num_nodes() == 1


def test_nan_in_a_constant_node(tmp_path: Path) -> None:
    model = proto("k = Constant <value = float[1] {1.0}> () y = Mul(x, k)")
    model.graph.node[0].attribute[0].t.CopyFrom(
        onnx.numpy_helper.from_array(np.array([np.nan], np.float32))
    )
    assert "'k': 1 of 1 elements are NaN" in refused(saved(tmp_path, model))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("y = Add(x, absent)", "nothing writes them: 'absent'"),
        ("y = Relu(x) y = Neg(x)", "written more than once: 'y'"),
        ("x = Relu(x) y = Neg(x)", "written more than once: 'x'"),
        ("a = Relu(b) b = Relu(a) y = Neg(x)", "inconsistent"),
        ("y = Relu <nonsense=1> (x)", "checker refuses"),
    ],
)
def test_inconsistent_graphs(tmp_path: Path, body: str, words: str) -> None:
    assert words in refused(saved(tmp_path, proto(body)))


def test_sha256(tmp_path: Path) -> None:
    path = saved(tmp_path, dense())
    assert model_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    path = external(tmp_path)
    before = model_sha256(path)
    data = tmp_path / "model.data"
    data.write_bytes(data.read_bytes()[::-1])
    assert model_sha256(path) != before
