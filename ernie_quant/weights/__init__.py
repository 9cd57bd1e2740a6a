"""Which weights the stored tensors are: plain, quantized, per rank; and the layouts of their names."""
