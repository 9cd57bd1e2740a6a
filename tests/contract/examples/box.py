"""A file format whose tensors begin at multiples of 32, behind a header of lines."""

from ernie_quant.writers import FileLayout

VERSION, EXTENSION, INDEX, SELF_CONTAINED = 1, ".box", "", False


def order(specs):
    return dict(sorted(specs.items()))


def metadata_of(metadata, files, number):
    return metadata


def lay_out(specs, metadata):
    lines = [f"{name} {spec.dtype} {','.join(map(str, spec.shape))}" for name, spec in specs.items()]
    head = "\n".join(["BOX", *lines, "", ""]).encode()
    starts, at = {}, len(head)
    for name, spec in specs.items():
        at += -at % 32
        starts[name], at = at, at + spec.nbytes
    return FileLayout(head, starts, at + -at % 32)
