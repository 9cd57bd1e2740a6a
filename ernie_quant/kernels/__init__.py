"""The few inner loops that torch operations make too slow, each beside the plain torch version that tests hold it to.

Both do the same float32 operations in the same order, without fused multiply-add and without reordered sums, so
they agree to the bit and a file does not depend on the machine that wrote it.

numba keeps what it compiled in __pycache__, and does not see that a function of another file has changed: after an edit in
_transpose, ccq_bytes or ccq_scores delete the *.nbi there, or the old code goes on in those who call it.
"""
