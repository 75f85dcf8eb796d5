"""A sample of onnx's own node tests; benchmarks/operator_conformance.py runs them all."""

from __future__ import annotations

import onnx
import pytest

from edgepress.targets.load import load_target
from edgepress.targets.lowering.decompose import EXPANDED, RULES
from edgepress.targets.lowering.operators import REFUSED, SUPPORTED, unsupported
from tests.targets.conformance import check, node_tests

X86 = load_target("x86-64-v3")

RIGHT = [
    "test_argmax_keepdims_example",
    "test_attention_4d",
    "test_averagepool_2d_pads_count_include_pad",
    "test_col2im_dilations",
    "test_conv_with_autopad_same",
    "test_convtranspose_output_shape",
    "test_cumsum_2d_int32",
    "test_dequantizelinear_blocked",
    "test_dft_inverse",
    "test_gelu_default_1",
    "test_gridsample_bicubic_align_corners_1_additional_1",
    "test_gru_seq_length",
    "test_layer_normalization_3d_axis1_epsilon",
    "test_lstm_bidirectional",
    "test_mish",
    "test_mod_mixed_sign_int32",
    "test_qlinearconv",
    "test_reduce_log_sum_default",
    "test_resize_downsample_scales_cubic_antialias",
    "test_resize_tf_crop_and_resize_extrapolation_value",
    "test_rotary_embedding_interleaved",
    "test_scatternd_add",
    "test_sce_mean_weight_ii_4d",
    "test_spacetodepth_crd_mode_example",
    "test_top_k_smallest",
]
WRONG_IN_TVM = {
    "test_batchnorm_example_training_mode": "training mode",
    "test_bitshift_left_int32_shift_ge_width": "exceeds the width",
    "test_maxpool_with_argmax_2d_precomputed_pads": "indices",
    "test_mod_float_edge_cases_fmod_0_float32": "floored remainder",
    "test_roialign_mode_max": "mode max",
    "test_training_dropout_mask": "training mode",
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_node_test_is_right(name: str) -> None:
    result = check(node_tests()[name], X86)
    assert (result.status, result.why) == ("right", "")


@pytest.mark.parametrize("name", WRONG_IN_TVM)
def test_what_tvm_gets_wrong_is_refused(name: str) -> None:
    result = check(node_tests()[name], X86)
    assert result.status == "refused"
    assert WRONG_IN_TVM[name] in result.why


@pytest.mark.parametrize("name", ["test_softmax_axis_1", "test_gemm_all_attributes"])
def test_a_node_between_others_is_right(name: str) -> None:
    assert check(node_tests("inside")[name], X86).status == "right"


def test_every_operator_of_onnx_is_either_supported_or_refused() -> None:
    assert not SUPPORTED & REFUSED.keys()
    assert (RULES.keys() | EXPANDED) <= SUPPORTED | {"If"}
    known = {
        schema.name
        for schema in onnx.defs.get_all_schemas()
        if schema.domain == "" and not schema.deprecated
    }
    assert known - SUPPORTED - REFUSED.keys() == set()


def test_an_unknown_operator_is_refused_by_name() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["":17, "mine":1]> '
        "g (float[2] x) => (float[2] y) { a = mine.Twist(x) [late] y = Later(a) }"
    )
    assert unsupported(model) == [
        ("a (Twist)", "the domain mine is not supported"),
        ("late (Later)", "the operator is unknown"),
    ]
