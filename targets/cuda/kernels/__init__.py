"""CUDA C++ of the kernels: templates that generated text instantiates."""
