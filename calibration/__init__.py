"""What text says of a model: its forward pass a layer at a time, statistics of inputs, calibrated quantization, evaluation."""
