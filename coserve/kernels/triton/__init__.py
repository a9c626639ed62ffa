"""The kernels for CUDA. `_op_reference` of kernels/file.py is here as `op` in a file of the same name.

This package imports without triton; its kernel files don't. dispatch.py picks among them.
"""
