"""`edgepress inspect`: nodes, channel groups, and the sensitivity of channel groups."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.pipeline import layer_timer, sensitivity
from edgepress.pipeline.ledger_table import HEADINGS
from edgepress.targets.command_device import CommandDevice
from tests.graphs import Array, net, random
from tests.pipeline.conftest import Edgepress, World
from tests.pipeline.sensitivities import ElementTimer, attention


def residual() -> ir.Model:
    """A dynamic batch; 32 channels through a residual connection, 64 inside, one unknown operator.

    Wide enough to be cut for any vector width.
    """
    return net(
        "(float[N,3,8,8] x) => (float[N,10] y)",
        """a = Conv(x, w0)
           b = Conv(a, w1)
           c = Conv<group=64, pads=[1,1,1,1]>(b, w2)
           r = Relu(c)
           d = Conv(r, w4)
           e = Add(d, a)
           p = GlobalAveragePool(e)
           f = Flatten(p)
           h = Gemm(f, w8)
           n = LpNormalization<axis=1>(h)
           y = Gemm(n, w10)""",
        {
            "w0": random(32, 3, 1, 1),
            "w1": random(64, 32, 1, 1),
            "w2": random(64, 1, 3, 3),
            "w4": random(32, 64, 1, 1),
            "w8": random(32, 12),
            "w10": random(12, 10),
        },
    )


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `net.onnx` and its samples `x.npz`, more than are used."""
    folder = tmp_path_factory.mktemp("inspect")
    ir.save(residual(), folder / "net.onnx")
    np.savez(folder / "x.npz", x=random(100, 3, 8, 8))
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let layers cost what they hold; return how the timers were made."""
    made: list[dict[str, Any]] = []

    def timer(**options: Any) -> ElementTimer:
        made.append(options)
        return ElementTimer()

    monkeypatch.setattr(sensitivity, "DeviceTimer", timer)
    return made


def cells(text: str) -> list[list[str]]:
    lines = (line for line in text.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_channels_are_a_row_per_group(edgepress: Edgepress, files: Path) -> None:
    code, out, _ = edgepress("inspect", files / "net.onnx", "--channels")
    assert code == 0
    rows = cells(out)
    assert rows[0] == ["Conv_0", "32", "all", "Conv_4", "Conv_1"]
    assert rows[1] == ["", "", "", "", "Gemm_8"]
    assert rows[2] == ["Conv_1", "64", "all", "Conv_2", "Conv_4"]
    assert rows[3][:2] == ["Gemm_8", "12"]
    why = " ".join(row[2] for row in rows[3:])
    assert "none: LpNormalization_9 is a LpNormalization" in why
    assert "none: y is an output of the model" in why
    assert "4 groups, 2 of which may lose channels" in out
    assert "LpNormalization_9: LpNormalization has no rule" in out
    assert "parameters" not in out


def test_heads_show_their_width(edgepress: Edgepress, tmp_path: Path) -> None:
    ir.save(attention(), tmp_path / "net.onnx")
    _, out, _ = edgepress("inspect", tmp_path / "net.onnx", "--channels")
    assert cells(out)[0][:3] == ["MatMul_0", "2 × 8", "all"]


def test_channels_as_json_are_part_of_the_document(edgepress: Edgepress, files: Path) -> None:
    document = json.loads(edgepress("inspect", files / "net.onnx", "--channels", "--json")[1])
    assert document["kind"] == "model"
    assert document["channels"]["unknown"] == [["LpNormalization_9", "LpNormalization"]]
    assert document["channels"]["groups"][1] == {
        "name": "Conv_1",
        "channels": 64,
        "free": 64,
        "width": 1,
        "layers": ["Conv_1", "Conv_2"],
        "readers": ["Conv_4"],
        "why": "",
    }
    document = json.loads(edgepress("inspect", files / "net.onnx", "--json")[1])
    assert document["channels"] is None


def test_a_bundle_has_channels_too(edgepress: Edgepress, world: World) -> None:
    document = json.loads(edgepress("inspect", world.request.output, "--channels", "--json")[1])
    assert document["kind"] == "bundle"
    assert [(g["channels"], g["free"]) for g in document["channels"]["groups"]] == [(8, 8), (10, 0)]


def test_a_bundle_has_its_size_ledger(edgepress: Edgepress, world: World) -> None:
    code, out, _ = edgepress("inspect", world.request.output)
    assert code == 0
    rows = {row[0]: row[1:] for row in cells(out) if len(row) == len(HEADINGS)}
    assert rows["all weights"][0] == "314"
    assert {"Conv_0", "Gemm_4"} <= rows.keys()
    document = json.loads(edgepress("inspect", world.request.output, "--json")[1])
    assert document["ledger"] == world.result.bundle.manifest.ledger


def test_channels_need_fixed_shapes(edgepress: Edgepress, tmp_path: Path) -> None:
    text = "(float[1,3,H,W] x) => (float[1,4,H,W] y)"
    ir.save(net(text, "y = Conv(x, w)", {"w": random(4, 3, 1, 1)}), tmp_path / "net.onnx")
    code, _, err = edgepress("inspect", tmp_path / "net.onnx", "--channels")
    assert code == 3
    assert "--input-shape" in err
    assert edgepress("inspect", tmp_path / "net.onnx")[0] == 0
    fixed = ("--input-shape", "x:1x3x8x8")
    assert edgepress("inspect", tmp_path / "net.onnx", "--channels", *fixed)[0] == 0


def quantized(body: str, shape: str = "1,4,4,6") -> ir.Model:
    """A quantized input `d`, whatever `body` makes of it as `e`, and `e` quantized."""
    text = f"q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {body} "
    text += "r = QuantizeLinear(e, s, z) y = DequantizeLinear(r, s, z)"
    weights: dict[str, Array] = {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}
    weights["k"] = np.ones(6, np.float32)
    return net(f"(float[{shape}] x) => (float[{shape}] y)", text, weights)


ISLANDS = """n = LayerNormalization(d, k) p = Greater(n, d) w = Where(p, n, d)
e0 = Softmax<axis=1>(w) u = QuantizeLinear(e0, s, z) v = DequantizeLinear(u, s, z)
t = Cos(v) e = Transpose(t)"""


def test_float_islands_are_named(edgepress: Edgepress, tmp_path: Path) -> None:
    model = quantized(ISLANDS, "6,6,6,6")
    next(node for node in model.graph if node.op_type == "Where").name = "choice"
    ir.save(model, tmp_path / "net.onnx")
    document = json.loads(edgepress("inspect", tmp_path / "net.onnx", "--json")[1])
    assert document["float_islands"] == [
        [
            {"name": "LayerNormalization_2", "operator": "LayerNormalization"},
            {"name": "choice", "operator": "Where"},
            {"name": "Softmax_5", "operator": "Softmax"},
        ],
        [{"name": "Cos_8", "operator": "Cos"}],
    ]
    _, out, _ = edgepress("inspect", tmp_path / "net.onnx")
    (first,) = (line for line in out.splitlines() if line.startswith("float islands"))
    assert first.split(maxsplit=2)[2].rstrip() == "LayerNormalization_2, choice (Where), Softmax_5"
    assert out.splitlines()[-1].strip() == "Cos_8"


def test_integers_have_no_islands(edgepress: Edgepress, tmp_path: Path) -> None:
    for body in ("s1 = Sigmoid(d) e = Mul(s1, d)", "e = Softmax(d)", "e = Softmax<axis=1>(d)"):
        ir.save(quantized(body), tmp_path / "net.onnx")
        document = json.loads(edgepress("inspect", tmp_path / "net.onnx", "--json")[1])
        assert document["float_islands"] == []
    _, out, _ = edgepress("inspect", tmp_path / "net.onnx")
    assert out.splitlines()[-1].split() == ["float", "islands", "none"]


def test_many_islands_are_cut_short(edgepress: Edgepress, tmp_path: Path) -> None:
    body = " ".join(["a0 = Cos(d)", *(f"a{i + 1} = Cos(a{i})" for i in range(8)), "e = Cos(a8)"])
    ir.save(quantized(body), tmp_path / "net.onnx")
    _, out, _ = edgepress("inspect", tmp_path / "net.onnx")
    assert "Cos_2, Cos_3, Cos_4, Cos_5, Cos_6, Cos_7 and 4 more" in out


def test_islands_need_fixed_shapes(edgepress: Edgepress, tmp_path: Path) -> None:
    ir.save(quantized("e = Cos(d)", "1,3,H,6"), tmp_path / "net.onnx")
    code, out, _ = edgepress("inspect", tmp_path / "net.onnx", "--json")
    assert code == 0
    assert json.loads(out)["float_islands"] is None
    assert "float islands may be unknown" in json.loads(out)["note"]
    fixed = ("--input-shape", "x:1x3x8x6", "--json")
    document = json.loads(edgepress("inspect", tmp_path / "net.onnx", *fixed)[1])
    assert document["float_islands"] == [[{"name": "Cos_2", "operator": "Cos"}]]


# Sensitivity ------------------------------------------------------------------------------------


def test_sensitivity_is_measured_on_this_machine(
    edgepress: Edgepress, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_timer, "SECONDS", 0.01)
    arguments = ("inspect", files / "net.onnx", "--sensitivity", "--calib", files / "x.npz")
    plot = tmp_path / "plot.svg"
    code, out, err = edgepress(*arguments, "-t", "native", "--plot", plot, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert set(document) == {
        "kind", "target", "device", "unit", "cost", "macs", "samples", "groups", "kept", "unknown",
        "unmeasured", "plot",
    }  # fmt: skip
    assert (document["kind"], document["target"], document["device"]) == (
        "sensitivity", "native", "local",
    )  # fmt: skip
    assert (document["unit"], document["samples"]) == ("ms", 64)
    assert document["cost"] > 0
    assert document["unmeasured"] == []
    assert document["unknown"] == [["LpNormalization_9", "LpNormalization"]]
    assert [name for name, _ in document["kept"]] == ["Gemm_8", "Gemm_10"]
    groups = {group["name"]: group for group in document["groups"]}
    assert set(groups) == {"Conv_0", "Conv_1"}
    for group in groups.values():
        widths = [cut["channels"] for cut in group["cuts"]]
        assert widths == sorted(set(widths))
        for cut in group["cuts"]:
            assert cut["macs_saved"] > 0
            assert 0 <= cut["agreement"] <= 100
            assert cut["saved_share"] == pytest.approx(cut["saved"] / document["cost"])
            assert abs(cut["saved"]) < document["cost"]
    assert plot.read_bytes().startswith(b"<?xml")
    assert document["plot"] == str(plot)
    code, out, err = edgepress(*arguments, "-t", "native", "--json")  # out of the cache
    assert json.loads(out) == document | {"plot": None}
    assert "cut 4 groups" in err  # progress is no part of the document


def test_sensitivity_as_a_table(
    edgepress: Edgepress,
    files: Path,
    counted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensitivity, "open_device", lambda _spec, _target: CommandDevice("qemu"))
    arguments = ("inspect", files / "net.onnx", "--sensitivity", "--calib", files / "x.npz")
    code, out, _ = edgepress(*arguments, "-t", "x86-64-v4")
    assert code == 0
    (options,) = counted
    assert options["target"].name == "x86-64-v4"
    assert options["device"].name == "qemu"
    rows = {row[0]: row for row in cells(out) if row[0]}
    assert set(rows) == {"Conv_0", "Conv_1"}
    assert "16 of 32, 50 %" in rows["Conv_0"]  # vectors of 16 floats
    total = 32 * 3 + 64 * 32 + 64 * 9 + 32 * 64 + 32 * 12 + 12 * 10
    saved = 16 * (32 + 9 + 32)
    assert rows["Conv_1"][1] == "16 of 64, 25 %"
    assert rows["Conv_1"][-2:] == [f"{saved:.3g}", f"{100 * saved / total:.1f} %"]
    assert "Gemm_8 stays whole: LpNormalization_9" in out
    assert "LpNormalization_9: LpNormalization has no rule" in out
    assert f"{total:.3g} ms for x86-64-v4, measured on qemu" in out


def test_sensitivity_without_a_target(edgepress: Edgepress, files: Path) -> None:
    arguments = ("inspect", files / "net.onnx", "--sensitivity", "--calib", files / "x.npz")
    shape = ("--input-shape", "x:1x3x8x8")
    document = json.loads(edgepress(*arguments, *shape, "--json")[1])
    assert (document["target"], document["device"], document["unit"]) == (None, None, None)
    assert document["cost"] is None
    assert {cut["saved"] for group in document["groups"] for cut in group["cuts"]} == {None}
    code, out, _ = edgepress(*arguments)
    assert code == 0
    assert "No latency was measured" in out


def save(folder: Path, kind: str) -> Path:
    """Write a model that has no sensitivity."""
    path = folder / f"{kind}.onnx"
    if kind == "integers":
        body = "h = MatMul(x, w) y = ArgMax<axis=1, keepdims=0>(h)"
        ir.save(net("(float[1,3] x) => (int64[1] y)", body, {"w": random(3, 8)}), path)
    else:
        body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)"
        scale, zero = np.array(0.1, np.float32), np.array(0, np.int8)
        weights: dict[str, Array] = {"w": random(3, 8), "s": scale, "z": zero}
        ir.save(net("(float[1,3] x) => (float[1,8] y)", body, weights), path)
    return path


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"--calib": None}, 2, "give some with --calib DATA.npz"),
        ({"--calib": "."}, 2, "is a folder"),
        ({"--calib": "missing.npz"}, 2, "no such file"),
        ({"--sensitivity": None}, 2, "--calib is for --sensitivity"),
        ({"--sensitivity": None, "--calib": None, "-t": "native"}, 2, "-t is for --sensitivity"),
        ({"--channels": ""}, 2, "give one of them"),
        ({"-d": "local"}, 2, "say with -t"),
        ({"-d": "qemo", "-t": "native"}, 5, "Did you mean qemu"),
        ({"-t": "raspbery-pi-4"}, 2, "Did you mean raspberry-pi-4"),
        ({"--plot": "plot.gif"}, 2, ".png, .svg or .pdf"),
        ({"--plot": "old.png"}, 2, "--overwrite"),
        ({"MODEL": "bundle"}, 2, "name the .onnx file"),
        ({"MODEL": "integers"}, 3, "no float output"),
        ({"MODEL": "quantized"}, 3, "quantized already"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    edgepress: Edgepress,
    world: World,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str | None],
    code: int,
    words: str,
) -> None:
    def measure(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the work begins")

    monkeypatch.setattr(sensitivity, "measure_sensitivity", measure)
    monkeypatch.chdir(tmp_path)
    Path("old.png").write_text("mine")
    options: dict[str, object] = {
        "MODEL": files / "net.onnx",
        "--sensitivity": "",
        "--calib": files / "x.npz",
        **change,
    }
    model = {
        "bundle": world.request.output,
        "integers": save(tmp_path, "integers"),
        "quantized": save(tmp_path, "quantized"),
    }.get(str(options["MODEL"]), options["MODEL"])
    del options["MODEL"]
    given = ((name, value) for name, value in options.items() if value is not None)
    flat = [word for name, value in given for word in ((name, value) if value else (name,))]
    got, out, err = edgepress("inspect", model, *flat, "--json")
    assert got == code, err
    assert words in err
    assert "Traceback" not in err
    assert json.loads(out)["error"]["code"] == code
    assert Path("old.png").read_text() == "mine"


def test_a_plot_needs_matplotlib(
    edgepress: Edgepress, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ("inspect", files / "net.onnx", "--sensitivity", "--calib", files / "x.npz")
    code, _, err = edgepress(*arguments, "--plot", tmp_path / "plot.png")
    assert code == 2
    assert "pip install 'edgepress[plots]'" in err
    assert edgepress(*arguments)[0] == 0  # all the rest does without


def test_a_plot_is_replaced_where_that_is_asked_for(
    edgepress: Edgepress, files: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "plot.png"
    plot.write_text("old")
    arguments = ("inspect", files / "net.onnx", "--sensitivity", "--calib", files / "x.npz")
    assert edgepress(*arguments, "--plot", plot, "--overwrite")[0] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_of_many_layers_only_the_first_are_shown(edgepress: Edgepress, tmp_path: Path) -> None:
    blocks = [f"r{i} = Conv(v{i}, b) v{i + 1} = Add(v{i}, r{i})" for i in range(9)]
    body = " ".join(["v0 = Conv(x, a)", *blocks, "y = Conv(v9, c)"])
    weights = {"a": random(8, 3, 1, 1), "b": random(8, 8, 1, 1), "c": random(2, 8, 1, 1)}
    model = net("(float[1,3,4,4] x) => (float[1,2,4,4] y)", body, weights)
    ir.save(model, tmp_path / "deep.onnx")
    code, out, _ = edgepress("inspect", tmp_path / "deep.onnx", "--channels")
    assert code == 0
    # nine layers are cut with the first, and as many and the last one read them
    assert "… and 4 more" in out
    assert "… and 5 more" in out
    assert "Conv_9" in out
    assert "Conv_13" not in out
