"""What moves bytes: each transport is the only importer of its dependency, and knows no algorithm."""
