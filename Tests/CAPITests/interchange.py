#!/usr/bin/env python3
"""interchange.py write|read FOLDER: the other side of interchange.c, by Python's own safetensors.

write: a layer's file without checksums.  read: the file that C wrote, its values and, if there is xxhash, its checksums.
Ends with 77 where the package is not installed."""
import struct
import sys

try:
    import numpy
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file
except ModuleNotFoundError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

E, D, H = 4, 6, 5



def shapes(optimizer):
    names = [("gate.weight", (E, D))]
    for e in range(E):
        names += [(f"experts.{e}.w1.weight", (H, D)), (f"experts.{e}.w1.bias", (H,)),
                  (f"experts.{e}.w2.weight", (D, H)), (f"experts.{e}.w2.bias", (D,))]
    if optimizer:
        names += [(f"optimizer.{what}.{name}", shape) for what in ("exp_avg", "exp_avg_sq") for name, shape in names[:]]
    return names


def tensor(number, shape):
    return (numpy.arange(numpy.prod(shape)) + number * 1000).astype(numpy.float32).reshape(shape)


command, folder = sys.argv[1:]
if command == "write":
    tensors = {name: tensor(i, shape) for i, (name, shape) in enumerate(shapes(False))}
    save_file(tensors, folder + "/python", metadata={"format": "pt"})
    tensors = {name: tensor(i, shape) for i, (name, shape) in enumerate(shapes(True))}
    tensors["optimizer.step"] = numpy.array(7, numpy.int64)
    save_file(tensors, folder + "/python-adamw")
    half = {name: tensor(i, shape).astype(numpy.float16) for i, (name, shape) in enumerate(shapes(False))}
    save_file(half, folder + "/python-half")
    transposed = {name: tensor(i, shape[::-1]) for i, (name, shape) in enumerate(shapes(False))}
    save_file(transposed, folder + "/python-transposed")
else:
    tensors = load_file(folder + "/c")
    wanted = shapes(True)
    assert set(tensors) == {name for name, _ in wanted} | {"optimizer.step"}, sorted(tensors)
    assert tensors["optimizer.step"] == 7 and tensors["optimizer.step"].dtype == numpy.int64
    for i, (name, shape) in enumerate(wanted):
        assert tensors[name].dtype == numpy.float32 and (tensors[name] == tensor(i, shape)).all(), name
    with safe_open(folder + "/c", "numpy") as file:
        metadata = file.metadata()
    assert metadata["fastermoe.format"] == "1"
    try:
        import xxhash
    except ImportError:
        print("no xxhash: checksums are not compared")
        sys.exit(0)
    for name, array in tensors.items():
        assert metadata["xxh64." + name] == xxhash.xxh64(array.tobytes()).hexdigest(), name
    with open(folder + "/c", "rb") as file:
        text = file.read(struct.unpack("<Q", file.read(8))[0])
    own = metadata["fastermoe.header"]
    assert own == xxhash.xxh64(text.replace(own.encode(), b"0" * 16)).hexdigest()
    print("checksums agree with xxhash")
