"""Measurements of collectives and of training steps on the ranks that there are; `ringred bench` runs them."""
