"""Contracts: what alike calls agree on, whatever a transport makes of the bits."""

from __future__ import annotations

from ringred.runtime.recall import contract
from ringred.transports.base import mixed


def test_calls_that_collide_in_few_bits_do_not_collide_again() -> None:
    """A transport may compare the top bits only. Digests that are alike there once must not be alike for ever."""
    bits = 12
    seen: dict[int, int] = {}
    repeated = collided = 0
    for digest in range(1, 400):
        key = mixed(contract(digest, 7)) >> (64 - bits)
        if key in seen:
            collided += 1
            repeated += mixed(contract(digest, 8)) >> (64 - bits) == mixed(contract(seen[key], 8)) >> (64 - bits)
        seen[key] = digest
    assert collided > 5
    assert repeated <= 1


def test_a_contract_has_62_bits_and_depends_on_the_number() -> None:
    contracts = {contract(digest, number) for digest in range(50) for number in range(50)}
    assert len(contracts) == 2500
    assert all(0 <= value < 1 << 62 for value in contracts)
