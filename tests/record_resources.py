"""Rewrite ``kernels/resources.json``: the registers that each kernel may use on each architecture.

Run ``python tests/record_resources.py`` after a change that is meant to use more, or for a new linker, and look at the
difference. It names every spill, which the suite does not accept.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cuda.bindings import nvjitlink
from nbvision_kernels.catalog import all_kernels

from nbvision.runtime.compile import CompiledKernel, compile_kernel

ARCHITECTURES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
KERNELS = list(all_kernels())


def compile_everywhere(index: int) -> dict[str, CompiledKernel]:
    return {f"sm_{cc[0]}{cc[1]}": compile_kernel(KERNELS[index], cc) for cc in ARCHITECTURES}


def main() -> None:
    table: dict[str, dict[str, int]] = {}
    with ProcessPoolExecutor() as processes:
        for kernel, compiled in zip(KERNELS, processes.map(compile_everywhere, range(len(KERNELS))), strict=True):
            table[kernel.name] = {architecture: code.registers for architecture, code in compiled.items()}
            spills = {architecture: code.spill_bytes for architecture, code in compiled.items() if code.spill_bytes}
            print(kernel.name, table[kernel.name], f"SPILLS {spills}" if spills else "", flush=True)
    written = {"nvjitlink": list(nvjitlink.version()), "registers": table}
    (Path(__file__).parent.parent / "kernels" / "resources.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
