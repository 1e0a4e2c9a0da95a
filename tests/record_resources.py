"""Rewrite ``kernels/resources.json``: the registers that each kernel may use on each architecture.

Run ``python tests/record_resources.py`` after a change that is meant to use more, and look at the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

from nbvision_kernels.catalog import all_kernels

from nbvision.runtime.compile import compile_kernel

ARCHITECTURES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def main() -> None:
    table: dict[str, dict[str, int]] = {}
    for kernel in all_kernels():
        compiled = {f"sm_{cc[0]}{cc[1]}": compile_kernel(kernel, cc) for cc in ARCHITECTURES}
        table[kernel.name] = {architecture: code.registers for architecture, code in compiled.items()}
        spills = {architecture: code.spill_bytes for architecture, code in compiled.items() if code.spill_bytes}
        print(kernel.name, table[kernel.name], f"SPILLS {spills}" if spills else "", flush=True)
    (Path(__file__).parent.parent / "kernels" / "resources.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
