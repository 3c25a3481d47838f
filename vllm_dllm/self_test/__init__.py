"""Kernels compared with plain torch on the device at hand, at a model's own shapes, before they serve anybody.

`attention` and `decoding` compare, `isolated` does so in a process of its own, since a kernel that is wrong may end the
one that it runs in. Imports torch and numpy alone.
"""
