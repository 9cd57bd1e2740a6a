"""Tensors that are not read yet: kinds of views, how they are built, and how they are read."""
