"""What one owner may have of something that all owners share."""

from collections.abc import Mapping


def fair_share(total: int, owners: int) -> int:
    """Return how much of ``total`` each of ``owners`` can count on."""
    return max(1, total // max(1, owners))


def may_have_another(held: Mapping[str, int], owner: str, total: int, owners: int) -> bool:
    """Return whether an owner may take one more of ``total`` places, of which ``held`` are taken by owner.

    Up to its share an owner takes any free place. Beyond, it takes what is left when all the others could
    still have theirs.
    """
    share = fair_share(total, owners)
    free = total - sum(held.values())
    if held.get(owner, 0) < share:
        return free > 0
    others = sum(min(count, share) for name, count in held.items() if name != owner)
    return free > share * (owners - 1) - others
