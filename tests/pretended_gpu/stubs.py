"""Write `stubs.c`: functions that torch's CUDA libraries import and that `gpu.c` does not define. They return 0."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIBRARIES = (
    "torch_cuda",
    "c10_cuda",
    "torch_python",
    "torch_cuda_linalg",
    "caffe2_nvrtc",
    "torch_nvshmem",
    "torch_cpu",
)
DEFINED = re.compile(r"^(?:FAKE|cudaError_t|int|void|unsigned|void\*\*|const char\*)\s+\**(\w+)\s*\(", re.MULTILINE)
IMPORTED = re.compile(r"(cuda[A-Z]|__cuda|cublas|nccl[A-Z]|cu[A-Z])\w*")


def main(site: Path, source: Path) -> None:
    """Write the stubs for the torch in `site`, a `site-packages` folder."""
    libraries = [site / "torch" / "lib" / f"lib{name}.so" for name in LIBRARIES]
    listed = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=False)
    undefined = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines() if line.strip()}
    defined = set(DEFINED.findall(source.read_text()))
    names = sorted(name for name in undefined - defined if IMPORTED.fullmatch(name) and not name.startswith("cuFile"))
    lines = ["extern void fake_note(const char*);"]
    lines += [f'int {name}() {{ static int s; if (!s) {{ s = 1; fake_note("{name}"); }} return 0; }}' for name in names]
    Path("stubs.c").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
