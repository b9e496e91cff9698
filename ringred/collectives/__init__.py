"""Collective algorithms, one small file each. Every file here registers what it holds."""
