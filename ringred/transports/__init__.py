"""Transports move bytes. Each is the only module that imports its dependency, and knows no algorithm."""
