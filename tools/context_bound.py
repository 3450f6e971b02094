"""Which base of RoPE carries which context (arXiv 2405.14591): the table, for any head width.

    python -m tools.context_bound --head-dim 128 1024 2048 4096
    python -m tools.context_bound --head-dim 64 --base 10000 500000

With contexts it prints the smallest base that carries each and the one from which on all larger bases do; with --base, the
context that each base carries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rotary import context_bound, safe_base, smallest_base

LIMIT = 2**21


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Which base of RoPE carries which context.")
    parser.add_argument("contexts", nargs="*", type=int, metavar="TOKENS", help="contexts to find bases for")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head (128)")
    parser.add_argument("--base", nargs="+", type=float, default=[], help="bases to find contexts for")
    options = parser.parse_args(arguments)
    if not options.contexts and not options.base:
        parser.error("name a context in tokens, or --base")
    try:
        if options.contexts:
            print("| context | smallest base | safe base |\n| ---: | ---: | ---: |")
        for context in options.contexts:
            found = (search(context, options.head_dim) for search in (smallest_base, safe_base))
            print(f"| {context} | " + " | ".join(f"{base:.4g}" for base in found) + " |", flush=True)
        if options.contexts and options.base:
            print()
        if options.base:
            print("| base | context |\n| ---: | ---: |")
        for base in options.base:
            bound = context_bound(base, options.head_dim, LIMIT)
            print(f"| {base:.6g} | {bound if bound < LIMIT else f'≥ {LIMIT}'} |")
    except ValueError as error:
        sys.exit(f"context_bound: {error}")


if __name__ == "__main__":
    main()
