"""What all training scripts have in common."""

import argparse

import torch


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--threads`` and ``--seed``."""
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)


def begin(args: argparse.Namespace) -> None:
    """Use so many threads, and begin with the seed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
