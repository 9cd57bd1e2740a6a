"""The few inner loops that torch operations make too slow, each beside the plain torch version that tests hold it to.

Both do the same float32 operations in the same order, without fused multiply-add and without reordered sums, so
they agree to the bit and a file does not depend on the machine that wrote it.
"""
