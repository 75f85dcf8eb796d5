"""How exporters write attention, as ONNX text, and some graphs that only look like it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepress.targets.program import Array
from tests.graphs import net, random
from tests.targets.qdq import shaped

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 7, 3, 4
ALL = HEADS * WIDTH
INF = np.float32(np.inf)


@dataclass(frozen=True)
class Form:
    """A graph: what the parser needs, and constants beside the usual ones."""

    signature: str
    body: str
    constants: dict[str, Array] = field(default_factory=dict)
    opset: int = 17

    def model(self) -> ir.Model:
        """The model, with all shapes."""
        constants = {k: v for k, v in {**USUAL, **self.constants}.items() if k in self.body}
        return shaped(net(self.signature, self.body, constants, opset=self.opset))


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


USUAL: dict[str, Array] = {
    "split_q": ints(0, 0, HEADS, WIDTH),
    "split_k": ints(BATCH, KEYS, HEADS, -1),
    "joined": ints(0, 0, -1),
    "two": np.array(2, np.float32),
    "half": np.array(0.5, np.float32),
    "root_half": np.array([np.sqrt(0.5)], np.float32),
}
OPERANDS = f"float[{BATCH},{QUERIES},{ALL}] q, float[{BATCH},{KEYS},{ALL}] k"
OPERANDS += f", float[{BATCH},{KEYS},{ALL}] v"
SPLIT = """
    q1 = Reshape(q, split_q) k1 = Reshape(k, split_k) v1 = Reshape(v, split_k)
    qh = Transpose <perm=[0,2,1,3]> (q1) vh = Transpose <perm=[0,2,1,3]> (v1)
    kt = Transpose <perm=[0,2,3,1]> (k1)
"""
JOIN = "yt = Transpose <perm=[0,2,1,3]> (yh) y = Reshape(yt, joined)"
MIX = f"p = Softmax <axis=-1> (s) yh = MatMul(p, vh) {JOIN}"


def with_mask(kind: str) -> str:
    return f"({OPERANDS}, {kind} m) => (float y)"


PLAIN = f"({OPERANDS}) => (float y)"
CAUSAL = np.tril(np.ones((QUERIES, KEYS), bool))
RAGGED = np.array([1, 1, 0, 1, 0, 1, 1], bool)

FORMS: dict[str, Form] = {
    "BERT": Form(
        with_mask(f"float[{BATCH},1,1,{KEYS}]"),
        f"{SPLIT} r = MatMul(qh, kt) t = Div(r, two) s = Add(t, m) {MIX}",
    ),
    "K transposed twice, mask first": Form(
        with_mask(f"float[1,1,{QUERIES},{KEYS}]"),
        f"""{SPLIT} kh = Transpose <perm=[0,1,3,2]> (kt) kx = Transpose <perm=[0,1,3,2]> (kh)
        r = MatMul(qh, kx) t = Mul(half, r) s = Add(m, t) {MIX}""",
    ),
    "scaled on both sides, no mask": Form(
        PLAIN,
        f"{SPLIT} qs = Mul(qh, root_half) ks = Mul(root_half, kt) s = MatMul(qs, ks) {MIX}",
    ),
    "query scaled before its heads are split": Form(
        f"(float[{BATCH},{QUERIES},{ALL}] q0, float[{BATCH},{KEYS},{ALL}] k"
        f", float[{BATCH},{KEYS},{ALL}] v) => (float y)",
        f"q = Div(q0, two) {SPLIT} s = MatMul(qh, kt) {MIX}",
    ),
    "tokens first": Form(
        f"(float[{QUERIES},{BATCH},{ALL}] q, float[{KEYS},{BATCH},{ALL}] k"
        f", float[{KEYS},{BATCH},{ALL}] v) => (float y)",
        """q1 = Reshape(q, heads) k1 = Reshape(k, heads_k) v1 = Reshape(v, heads_k)
        qh = Transpose <perm=[1,0,2]> (q1) kt = Transpose <perm=[1,2,0]> (k1)
        vh = Transpose <perm=[1,0,2]> (v1) r = MatMul(qh, kt) s = Mul(r, half)
        p = Softmax(s) yh = MatMul(p, vh) yt = Transpose <perm=[1,0,2]> (yh)
        y = Reshape(yt, back)""",
        {
            "heads": ints(QUERIES, BATCH * HEADS, WIDTH),
            "heads_k": ints(KEYS, BATCH * HEADS, WIDTH),
            "back": ints(QUERIES, BATCH, ALL),
        },
    ),
    "one projection, gathered": Form(
        f"(float[{BATCH},{QUERIES},{3 * ALL}] x) => (float y)",
        f"""x1 = Reshape(x, three) x2 = Transpose <perm=[2,0,3,1,4]> (x1)
        qh = Gather <axis=0> (x2, first) k1 = Gather <axis=0> (x2, second)
        vh = Gather <axis=0> (x2, last) kt = Transpose <perm=[0,1,3,2]> (k1)
        r = MatMul(qh, kt) s = Mul(r, half) {MIX}""",
        {
            "three": ints(BATCH, QUERIES, 3, HEADS, WIDTH),
            "first": np.array(0, np.int64),
            "second": np.array(1, np.int64),
            "last": np.array(-1, np.int64),
        },
    ),
    "one projection, split and sliced": Form(
        f"(float[{BATCH},{KEYS},{3 * ALL}] x) => (float y)",
        f"""q, kv = Split <axis=2> (x, parts) k = Slice(kv, zero, all, axis)
        v = Slice(kv, all, end, axis) {SPLIT} r = MatMul(qh, kt) s = Mul(r, half) {MIX}""",
        {
            "parts": ints(ALL, 2 * ALL),
            "zero": ints(0),
            "all": ints(ALL),
            "end": ints(2**31),
            "axis": ints(-1),
        },
    ),
    "causal by Where": Form(
        PLAIN,
        f"{SPLIT} r = MatMul(qh, kt) t = Div(r, two) s = Where(causal, t, fill) {MIX}",
        {"causal": CAUSAL, "fill": np.array(np.finfo(np.float32).min, np.float32)},
    ),
    "masked by an inverted Where": Form(
        with_mask(f"bool[{BATCH},1,1,{KEYS}]"),
        f"{SPLIT} r = MatMul(qh, kt) t = Div(r, two) s = Where(m, fill, t) {MIX}",
        {"fill": np.array([-np.inf], np.float32)},
    ),
    "two masks": Form(
        with_mask(f"float[{BATCH},1,1,{KEYS}]"),
        f"{SPLIT} r = MatMul(qh, kt) t = Add(r, bias) s = Add(t, m) {MIX}",
        {"bias": random(1, HEADS, QUERIES, KEYS)},
    ),
    "expanded mask": Form(
        with_mask(f"float[{BATCH},1,1,{KEYS}]"),
        f"{SPLIT} r = MatMul(qh, kt) w = Expand(m, size) s = Add(r, w) {MIX}",
        {"size": ints(BATCH, HEADS, QUERIES, KEYS)},
    ),
    "NaN of empty rows taken away": Form(
        with_mask(f"bool[{BATCH},1,{QUERIES},{KEYS}]"),
        f"""{SPLIT} r = MatMul(qh, kt) w = Where(m, zero, fill) s = Add(r, w)
        p0 = Softmax <axis=3> (s) n = IsNaN(p0) p = Where(n, zero, p0)
        yh = MatMul(p, vh) {JOIN}""",
        {"zero": np.array(0, np.float32), "fill": np.array(-np.inf, np.float32)},
    ),
    "no heads": Form(
        f"(float[{BATCH},{QUERIES},8] q, float[{BATCH},{KEYS},8] k, float[{BATCH},{KEYS},6] v)"
        " => (float y)",
        """kt = Transpose <perm=[0,2,1]> (k) r = MatMul(q, kt) s = Mul(r, half)
        p = Softmax(s) y = MatMul(p, v)""",
    ),
    "two axes": Form(
        f"(float[{QUERIES},8] q, float[8,{KEYS}] k, float[{KEYS},6] v) => (float y)",
        "s = MatMul(q, k) p = Softmax(s) y = MatMul(p, v)",
    ),
    "scores reshaped for the mask": Form(
        with_mask(f"float[{BATCH},1,{QUERIES},{KEYS}]"),
        f"""{SPLIT} q3 = Reshape(qh, flat_q) k3 = Reshape(kt, flat_k) v3 = Reshape(vh, flat_v)
        r = MatMul(q3, k3) r4 = Reshape(r, four) s4 = Add(r4, m) s = Reshape(s4, flat)
        p = Softmax(s) y3 = MatMul(p, v3) yh = Reshape(y3, heads) {JOIN}""",
        {
            "flat_q": ints(BATCH * HEADS, QUERIES, WIDTH),
            "flat_k": ints(BATCH * HEADS, WIDTH, KEYS),
            "flat_v": ints(BATCH * HEADS, KEYS, WIDTH),
            "four": ints(BATCH, HEADS, QUERIES, KEYS),
            "flat": ints(BATCH * HEADS, QUERIES, KEYS),
            "heads": ints(BATCH, HEADS, QUERIES, WIDTH),
        },
    ),
    "results by head": Form(
        f"({OPERANDS}) => (float yh)",
        f"{SPLIT} s = MatMul(qh, kt) p = Softmax(s) yh = MatMul(p, vh)",
    ),
    "results by head, and joined": Form(
        f"({OPERANDS}) => (float yh, float y)", f"{SPLIT} s = MatMul(qh, kt) {MIX}"
    ),
    "learned queries": Form(
        f"(float[{BATCH},{KEYS},{ALL}] k, float[{BATCH},{KEYS},{ALL}] v) => (float y)",
        f"{SPLIT} s = MatMul(qh, kt) {MIX}",
        {"q": random(BATCH, QUERIES, ALL)},
    ),
    "channels first": Form(
        "(float[2,8,9] q, float[2,8,9] k, float[2,6,9] v) => (float y)",
        """qt = Transpose <perm=[0,2,1]> (q) s = MatMul(qt, k) p = Softmax(s)
        vt = Transpose <perm=[0,2,1]> (v) yt = MatMul(p, vt) y = Transpose <perm=[0,2,1]> (yt)""",
    ),
    "one head of keys": Form(
        f"(float[{BATCH},{HEADS},{QUERIES},{WIDTH}] qh, float[{BATCH},1,{WIDTH},{KEYS}] kt"
        f", float[{BATCH},1,{KEYS},{WIDTH}] vh) => (float y)",
        f"s = MatMul(qh, kt) {MIX}",
    ),
    "Attention of opset 23": Form(
        with_mask(f"float[{QUERIES},{KEYS}]"),
        f"y = Attention <q_num_heads={HEADS}, kv_num_heads={HEADS}, scale=0.3> (q, k, v, m)",
        opset=23,
    ),
    "causal Attention of opset 23, fewer heads of keys": Form(
        f"(float[{BATCH},{QUERIES},{2 * ALL}] q, float[{BATCH},{KEYS},{ALL}] k"
        f", float[{BATCH},{KEYS},{ALL}] v) => (float y)",
        f"y = Attention <q_num_heads={2 * HEADS}, kv_num_heads={HEADS}, is_causal=1> (q, k, v)",
        opset=23,
    ),
    "opset 11": Form(
        PLAIN,
        f"{SPLIT} s = MatMul(qh, kt) p = Softmax <axis=3> (s) yh = MatMul(p, vh) {JOIN}",
        opset=11,
    ),
}

WANTED = f"{SPLIT} s = MatMul(qh, kt) {MIX}"
_SCORES = f"{SPLIT} r = MatMul(qh, kt) t = Div(r, two)"
OTHERS: dict[str, Form] = {
    "scores wanted": Form(f"({OPERANDS}) => (float y, float s)", WANTED),
    "shares wanted": Form(f"({OPERANDS}) => (float y, float p)", WANTED),
    "shares read twice": Form(f"({OPERANDS}) => (float y, float z)", f"{WANTED} z = Relu(p)"),
    "over the queries": Form(
        PLAIN, f"{_SCORES} p = Softmax <axis=2> (t) yh = MatMul(p, vh) {JOIN}"
    ),
    "scaled after the mask": Form(
        with_mask(f"float[{BATCH},1,1,{KEYS}]"),
        f"{SPLIT} r = MatMul(qh, kt) t = Add(r, m) s = Mul(t, half) {MIX}",
    ),
    "a Where that keeps a trace": Form(
        PLAIN, f"{_SCORES} s = Where(causal, t, fill) {MIX}",
        {"causal": CAUSAL, "fill": np.array(-10, np.float32)},
    ),
    "mask without keys": Form(
        with_mask(f"float[{BATCH},1,{QUERIES},1]"), f"{_SCORES} s = Add(t, m) {MIX}"
    ),
    "a scale per head": Form(
        PLAIN, f"{_SCORES} s = Mul(t, scales) {MIX}", {"scales": random(1, HEADS, 1, 1)}
    ),
    "three axes of matrices": Form(
        f"(float[2,3,2,{QUERIES},8] q, float[2,3,2,8,{KEYS}] k, float[2,3,2,{KEYS},6] v)"
        " => (float y)",
        "s = MatMul(q, k) p = Softmax(s) y = MatMul(p, v)",
    ),
    "another function": Form(PLAIN, f"{_SCORES} s = Tanh(t) {MIX}"),
    "shares masked": Form(
        with_mask(f"float[1,1,1,{KEYS}]"),
        f"{_SCORES} p0 = Softmax(t) p = Mul(p0, m) yh = MatMul(p, vh) {JOIN}",
    ),
    "shares on the right": Form(
        f"(float[{QUERIES},8] q, float[8,{KEYS}] k, float[6,{QUERIES}] v) => (float y)",
        "s = MatMul(q, k) p = Softmax(s) y = MatMul(v, p)",
    ),
    "only some NaN taken away": Form(
        with_mask(f"bool[{BATCH},1,{QUERIES},{KEYS}]"),
        f"{_SCORES} p0 = Softmax(t) p = Where(m, zero, p0) yh = MatMul(p, vh) {JOIN}",
        {"zero": np.array(0, np.float32)},
    ),
    "scores of another shape": Form(
        f"(float[2,{QUERIES},8] q, float[2,8,{KEYS}] k, float[2,{QUERIES},6] v) => (float y)",
        "r = MatMul(q, k) s = Reshape(r, other) p = Softmax(s) y = MatMul(p, v)",
        {"other": ints(2, KEYS, QUERIES)},
    ),
    "masks of scores of two shapes": Form(
        f"(float[6,{QUERIES},8] q, float[6,8,{KEYS}] k, float[6,{KEYS},6] v"
        f", float[6,1,{KEYS}] m, float[2,1,1,{KEYS}] n) => (float y)",
        """r = MatMul(q, k) t = Add(r, m) u = Reshape(t, four) w = Add(u, n)
        s = Reshape(w, three) p = Softmax(s) y = MatMul(p, v)""",
        {"four": ints(2, 3, QUERIES, KEYS), "three": ints(6, QUERIES, KEYS)},
    ),
    "empty by one of two masks": Form(
        with_mask(f"float[{BATCH},1,{QUERIES},{KEYS}]"),
        f"""{_SCORES} u = Add(t, m) s = Add(u, bias) p0 = Softmax(s)
        h = ReduceMax <axes=[-1]> (m) e = Equal(h, inf) p = Where(e, zero, p0)
        yh = MatMul(p, vh) {JOIN}""",
        {
            "bias": random(1, 1, 1, KEYS),
            "zero": np.array(0, np.float32),
            "inf": np.array(-np.inf, np.float32),
        },
    ),
    "opset 11, all heads together": Form(
        PLAIN, f"{_SCORES} p = Softmax <axis=1> (t) yh = MatMul(p, vh) {JOIN}", opset=11
    ),
    "a shape between that mixes": Form(
        PLAIN,
        f"{_SCORES} s0 = Reshape(t, other) p0 = Softmax(s0) p = Reshape(p0, four) "
        f"yh = MatMul(p, vh) {JOIN}",
        {
            "other": ints(BATCH, HEADS, KEYS, QUERIES),
            "four": ints(BATCH, HEADS, QUERIES, KEYS),
        },
    ),
}  # fmt: skip
