"""How long `import gemma_qat_kit` takes in a fresh interpreter, and that it brings in neither torch nor transformers.

    python bench/import_time.py

Target: under 50 ms.
"""

import statistics
import subprocess
import sys

CODE = """
import sys, time
started = time.perf_counter()
import gemma_qat_kit
print((time.perf_counter() - started) * 1000, *sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


def main() -> None:
    """Print the median of twenty runs."""
    runs = [subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(20)]  # fmt: skip
    heavy = sorted({name for run in runs for name in run[1:]})
    milliseconds = statistics.median(float(run[0]) for run in runs)
    print(f"import gemma_qat_kit: {milliseconds:.1f} ms; loads {heavy or 'nothing heavy'}")


if __name__ == "__main__":
    main()
