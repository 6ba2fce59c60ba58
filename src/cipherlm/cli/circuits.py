"""What the verbs do with compiled circuits."""

from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import Any

from cipherlm.cli import CommandError

LENGTH_STEP = 4
KEYS = "keys"


def compiled_length(
    model: Any, prompt_tokens: int, new_tokens: int, given: int | None = None, *, step: int = LENGTH_STEP
) -> int:
    """Return the length to compile for, in steps, so that prompts of similar length share a circuit."""
    needed = prompt_tokens + new_tokens - 1  # the last token is generated, but never read
    longest = int(model.config.n_positions)
    if needed >= longest:
        raise CommandError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones are too long for this model, "
            f"which takes {longest}"
        )
    if given is None:
        return min(-(-needed // step) * step, longest)
    if given < needed:
        raise CommandError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones need --tokens {needed} or more, "
            f"not {given}"
        )
    return given


def compile_circuits(model: Any, tokens: int) -> dict[str, Any]:
    """Compile a calibrated model for ``tokens`` positions and return its circuits by module name."""
    # compile() announces the bit-width in the published words; here only results belong on stdout.
    with redirect_stdout(StringIO()):
        model.compile(tokens=tokens)
    return {name: module.circuit for name, module in model.encrypted_modules.items()}


def make_keys(circuits: dict[str, Any]) -> float:
    """Generate the keys of all circuits, or load them from the cache; return the seconds it took."""
    return float(sum(circuit.keygen() for circuit in circuits.values()))


def keys_cached(circuit: Any) -> bool:
    """Say whether ``make_keys`` would find the circuit's keys in the cache."""
    return circuit.folder is not None and (circuit.folder / KEYS).exists()


def circuit_figures(circuit: Any) -> dict[str, Any]:
    """Return a circuit's figures, ready for JSON. What only keys or a run can tell is None before them."""
    figures = {
        **circuit.statistics.to_dict(),
        "from_cache": circuit.from_cache,
        "evaluation_key_bytes": circuit.evaluation_key_bytes,
        "keygen_seconds": circuit.keygen_seconds,
    }
    if circuit.last_run is not None:  # serialized and compressed, where the statistics only have the bound
        figures.update(asdict(circuit.last_run))
    return figures


def table_ranges(attention: Any) -> dict[str, list[float]]:
    """Return the least and the most that each kind of table reaches to, over heads and channels."""
    ranges: dict[str, list[float]] = {}
    for name, array in attention.to_arrays().items():
        kind = name.rpartition(".")[2]
        if kind.endswith("_range"):
            low, high = ranges.get(kind, [float("inf"), 0.0])
            ranges[kind] = [min(low, float(array.min())), max(high, float(array.max()))]
    return {kind.removesuffix("_range"): limits for kind, limits in ranges.items()}
