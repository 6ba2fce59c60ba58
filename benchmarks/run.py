"""Measure what the README's tables say, each row in a process of its own, and print the results.

    python benchmarks/run.py                  all rows
    python benchmarks/run.py --only head-6    one row
    python benchmarks/run.py --list           the commands, without running them

What each command printed goes to benchmarks/results/, one JSON file a row, with the machine it ran on.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

ROWS = {
    "head-6": "bench attention --scheme tfhe --tokens 6 --heads 1 --n-bits 4",
    "head-8": "bench attention --scheme tfhe --tokens 8 --heads 1 --n-bits 4",
    "tiny-8": "bench attention --scheme tfhe --geometry tiny --tokens 8 --heads 1 --n-bits 4",
    "tiny-all": "bench attention --scheme tfhe --geometry tiny --tokens 4 --heads all --n-bits 4",
    "ckks-attention": "bench attention --tokens 8",
    "ckks-block": "bench block --geometry gpt2 --prompt-tokens 8 --new-tokens 3",
    "ckks-tiny": "bench model --geometry tiny --prompt-tokens 7 --new-tokens 8 --runs 1",
    "ckks-gpt2": "bench model --geometry gpt2 --prompt-tokens 8 --new-tokens 2 --runs 1",
    "ckks-smollm2": "bench model --geometry smollm2 --prompt-tokens 8 --new-tokens 2 --runs 1 --context 256",
    "linear-gpt2": "bench linear --geometry gpt2",
    "linear-smollm2": "bench linear --geometry smollm2",
    "agreement-head": "evaluate --scheme tfhe --heads 0 --n-bits 4",
    "agreement-all": "evaluate --scheme tfhe --heads all --n-bits 7",
}


def main() -> int:
    """Run the chosen rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), metavar="ROW")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where JSON files go")
    options = parser.parse_args()
    if options.list:
        for name in options.only:
            print(f"{name:15} cipherlm {ROWS[name]}")
        return 0

    options.results.mkdir(parents=True, exist_ok=True)
    lines, failed = [], []
    for name in options.only:
        print(f"{name}: cipherlm {ROWS[name]}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "cipherlm.cli", *shlex.split(ROWS[name]), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(name)
            continue
        figures = json.loads(done.stdout)
        record = {"command": f"cipherlm {ROWS[name]}", "machine": machine(), "figures": figures}
        (options.results / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        lines.append(f"| {described(figures)} | `cipherlm {ROWS[name]}` |")
    print("| measured | command |\n|---|---|", *lines, sep="\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def described(figures: dict[str, Any]) -> str:
    """Return one row's figures in a few words."""
    if "results" in figures:
        (row,) = figures["results"]
        return (
            f"{row['heads_label']}, {row['n_bits']} bits: top-1 {row['top1']:.1%}, top-5 {row['top5']:.1%}, "
            f"top-10 {row['top10']:.1%} at {figures['positions']} positions"
        )
    if "layers" in figures:
        one, eight = figures["all_token"], figures["all_tokens_8"]
        traffic = (one["sent_bytes"] + one["received_bytes"]) / 1e6
        return (
            f"{figures['geometry']}, {figures['blocks']} blocks, linear layers: "
            f"a token {one['seconds']:.2f} s and {traffic:.1f} MB, 8 tokens {eight['seconds']:.1f} s; "
            f"keys {figures['keys_bytes'] / 1e6:.1f} MB, "
            f"matrices {figures['matrices_bytes'] / 1e6:.0f} MB"
        )
    if "prompt" in figures:
        return (
            f"{figures['geometry']}, {figures['blocks']} block(s), CKKS: {ckks(figures['prompt'])}; "
            f"each further token: {ckks(figures['next_tokens'] or figures['first_token'])}; "
            f"keys {figures['evaluation_key_bytes'] / 1e6:.0f} MB, "
            f"memory {figures['peak_memory_bytes'] / 1e9:.1f} GB; "
            f"error {figures['max_abs_error']:.2g} of {figures['max_abs_output']:.2g}"
        )
    if figures["scheme"] == "ckks":
        return (
            f"{figures['geometry']}, all heads, projection, {figures['tokens']} tokens, CKKS: "
            f"{figures['execute_seconds']:.1f} s, {figures['round_trips']} round trips, "
            f"{figures['refresh_bytes'] / 1e6:.0f} MB, keys {figures['evaluation_key_bytes'] / 1e6:.0f} MB; "
            f"error {figures['max_abs_error']:.2g} of {figures['max_abs_output']:.2g}"
        )
    heads = "all heads, projection" if figures["projection"] else f"{figures['heads']} head(s)"
    return (
        f"{figures['geometry']}, {heads}, {figures['tokens']} tokens, {figures['n_bits']} bits: "
        f"{figures['execute_seconds']:.1f} s, {figures['pbs']} PBS, "
        f"compile {figures['compile_seconds']:.0f} s, keys {figures['keygen_seconds']:.0f} s, "
        f"{figures['evaluation_key_bytes'] / 1e6:.0f} MB; error {figures['mean_abs_error']:.2g} of "
        f"{figures['max_abs_output']:.2g}; an 8-bit PBS {figures['pbs_8bit_seconds'] * 1e3:.1f} ms"
    )


def ckks(part: dict[str, Any]) -> str:
    """Return the figures of a prompt or a token in a few words."""
    traffic = (part["up_bytes"] + part["down_bytes"]) / 1e6
    return f"{part['seconds']:.1f} s, {part['round_trips']:.0f} round trips, {traffic:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
