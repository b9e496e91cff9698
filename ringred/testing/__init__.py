"""Tools to test programs and transports with: public, and what ringred's own tests use."""

from ringred.testing.ranks import Faulty, run_ranks

__all__ = ["Faulty", "run_ranks"]
