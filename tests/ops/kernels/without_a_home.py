"""What test_without_a_home.py runs in a process of its own: HOME is the first argument, the user the second."""

import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton

import tritonmoe as tm
from tritonmoe.ops.backends import triton as triton_backend  # noqa: F401  # read before the user is another one
from tritonmoe.ops.kernels.compiled import compiled_kernels

home, user, *_ = sys.argv[1:]
os.environ.pop("TRITON_CACHE_DIR", None)
os.environ.pop("TRITONMOE_CACHE_DIR", None)
if home == "none":
    os.environ.pop("HOME", None)
else:
    os.environ["HOME"] = home
if int(user):
    os.setuid(int(user))
triton.knobs.cache.home_dir = os.path.expanduser("~/")  # as where Triton is imported only now

x, weights = torch.randn(8, 32, requires_grad=True), torch.full((8, 2), 0.5)
gate_up, down = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
ids = torch.arange(16).view(8, 2) % 4
found = tm.moe_mlp(x, ids, weights, gate_up, down, backend="triton")
found.sum().backward()
expected = tm.moe_mlp(x.detach(), ids, weights, gate_up, down, backend="torch")
torch.testing.assert_close(found.detach(), expected, rtol=1e-3, atol=1e-3)

# What a GPU's first launch does: Triton is asked for a kernel, and keeps what it compiles.
compiled_kernels(SimpleNamespace(params=[], _do_compile=None, create_binder=None, device_caches={}))
path = Path(triton.runtime.cache.get_cache_manager("00").put(b"code", "kernel"))
folder = Path(triton.knobs.cache.dir)
assert folder.is_absolute()
assert path.is_relative_to(folder)
about = folder.stat()
print("cache", stat.S_IMODE(about.st_mode) == 0o700, about.st_uid == os.getuid(), folder)
