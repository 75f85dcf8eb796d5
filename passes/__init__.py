"""Graph passes: ONNX model in, ONNX model out. One pass per file."""
