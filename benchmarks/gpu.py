"""Check and measure this machine's GPU: the same as `anyflow bench`, without an installation.

python benchmarks/gpu.py                    # nine minutes at most
python benchmarks/gpu.py rehearse=true      # tiny sizes, also on a CPU
"""

from __future__ import annotations

import sys

from anyflow_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
