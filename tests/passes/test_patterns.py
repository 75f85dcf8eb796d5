import pytest

from edgepress.passes._patterns import chosen_nodes, demand_match, demand_regular_expressions
from edgepress.passes.base import PassRefused
from tests.graphs import net

NAMES = ["conv_1", "conv_12", "head"]


def test_a_pattern_matches_whole_names() -> None:
    assert demand_match("p", "skip", "conv_1", NAMES) == ["conv_1"]
    assert demand_match("p", "skip", "conv_1.*", NAMES) == ["conv_1", "conv_12"]


def test_a_pattern_without_a_match_is_refused_with_near_names() -> None:
    words = r"p: skip 'conf_1': it matches no node's whole name\. Near it: conv_1, conv_12\. Look\."
    with pytest.raises(PassRefused, match=words):
        demand_match("p", "skip", "conf_1", NAMES, what="node", hint="Look.")
    with pytest.raises(PassRefused, match=r"whole name\. `edgepress inspect` lists the names\."):
        demand_match("p", "skip", "xyz", NAMES)


def test_what_is_no_regular_expression_is_refused() -> None:
    demand_regular_expressions("p", "skip", NAMES)
    with pytest.raises(PassRefused, match=r"p: skip '\(': not a regular expression: "):
        demand_regular_expressions("p", "skip", ["a", "("])


def test_nodes_are_chosen_by_their_whole_names() -> None:
    model = net("(float[2] x) => (float[2] y)", "a = Relu(x) b = Neg(a) y = Abs(b)")
    nodes = list(model.graph)
    for node, name in zip(nodes, ("stem", "stem_2", "head"), strict=True):
        node.name = name
    assert chosen_nodes("p", "skip", ["stem", "he.*"], nodes) == {
        nodes[0]: "stem",
        nodes[2]: "he.*",
    }
    with pytest.raises(PassRefused, match="it matches no layer's whole name"):
        chosen_nodes("p", "skip", ["ste"], nodes, what="layer")
    with pytest.raises(PassRefused, match="not a regular expression"):
        chosen_nodes("p", "skip", ["stem", "("], nodes)
