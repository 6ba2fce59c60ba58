"""Measure what a refresh sends, adds in noise and takes, for vectors of which something is known.

    python benchmarks/refreshes.py
    python benchmarks/refreshes.py --repeats 20 --json

Vectors of zeros are refreshed from level 1 to the highest, at ring degree 2^14, and divided by 2^8. Noise
is the standard deviation in the real part of a slot, next to that of a rescaling. Milliseconds of unmasking
are those of the fastest run, on all cores.
"""

import argparse
import json
import time

import numpy as np

from cipherlm.engine import Evaluator, Parameters, SecretKey, Subring
from cipherlm.nn.clear import Noise

LEVEL, SHIFT = 1, 8
SUBRINGS = [Subring(copies, real) for copies in (1, 2, 4, 8) for real in (False, True)]


def main() -> None:
    """Print a line for each subring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10, help="refreshes of each kind (default: 10)")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    options = parser.parse_args()
    parameters = Parameters.preset(14)
    secret_key = SecretKey.generate(parameters)
    steps = [parameters.slots >> k for k in range(1, 4)]
    evaluator = Evaluator(parameters, secret_key.evaluation_keys(steps, conjugation=True))
    public_key = secret_key.public_key()
    rounding = Noise.of(parameters.degree, np.log2(parameters.scale)).rounding
    figures = []
    for subring in SUBRINGS:
        errors, seconds = [], []
        for _ in range(options.repeats):
            zero = evaluator.multiply(secret_key.encrypt(np.zeros(parameters.slots), LEVEL), 2**SHIFT)
            request, mask = evaluator.mask([zero], public_key, level=LEVEL, shift=SHIFT, held=[(subring,)])
            reply = secret_key.refresh(request)
            time.sleep(0.05)  # what is made ahead of time is not measured
            began = time.perf_counter()
            (fresh,) = evaluator.unmask(reply, mask)
            seconds.append(time.perf_counter() - began)
            errors.append(secret_key.decrypt(evaluator.set_scale(fresh, parameters.scale)).real)
        figures.append(
            {
                "copies": subring.copies,
                "real": subring.real,
                "down_bytes": len(request.to_bytes()),
                "up_bytes": len(reply.to_bytes()),
                "noise": float(np.std(errors)) / rounding,
                "unmask_ms": 1e3 * min(seconds),
            }
        )
    if options.json:
        print(json.dumps(figures))
        return
    print("copies  slots       down      up   noise  unmasking")
    for row in figures:
        kind = "real" if row["real"] else "complex"
        sizes = f"{row['down_bytes'] / 1e6:.2f} MB {row['up_bytes'] / 1e6:.2f} MB"
        print(f"{row['copies']:6}  {kind:8} {sizes} {row['noise']:6.1f} {row['unmask_ms']:7.1f} ms")


if __name__ == "__main__":
    main()
