from edgepress.passes._reads import reads
from tests.graphs import net


def test_what_branches_capture_is_read_too() -> None:
    body = """a = Relu(x) b = Neg(x) c = Abs(x)
        y = If (flag) <
            then_branch = inside () => (float[2] t) { s = Add(a, b) t = Exp(s) },
            else_branch = outside () => (float[2] c) {}
        >"""
    model = net("(float[2] x, bool flag) => (float[2] y)", body)
    names = [value.name for value in reads(list(model.graph)[-1])]
    assert {"flag", "a", "b", "c"} <= set(names)
    assert "x" not in names


def test_an_input_left_out_is_not_read() -> None:
    model = net("(float[1,2,4] x, float[4] m) => (float[1,2,4] y)", "y = Clip(x, , m)")
    assert [value.name for value in reads(next(iter(model.graph)))] == ["x", "m"]
