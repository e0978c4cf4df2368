"""What `import jaxweights` costs beyond importing jax, in fresh processes.

Run: python benchmarks/bench_import.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

SCRIPT = """
import time
import jax, jax.numpy
start = time.perf_counter()
import jaxweights
print(time.perf_counter() - start)
"""


def main() -> None:
    """Prints the table."""
    command = [sys.executable, "-c", SCRIPT]
    seconds = [float(subprocess.check_output(command, text=True)) for _ in range(7)]
    median = statistics.median(seconds)
    print(f"import jaxweights after jax: median {median:.3f} s of {len(seconds)} runs")
    print(f"fastest {min(seconds):.3f} s, slowest {max(seconds):.3f} s")


if __name__ == "__main__":
    main()
