"""ONNX graph to a Program: integers, layout, fusion, kernels."""
