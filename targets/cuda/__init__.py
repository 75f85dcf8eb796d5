"""CUDA targets: kernels in CUDA C++, how they are launched, and how they become machine code."""
