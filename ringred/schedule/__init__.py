"""Schedules as data: the operations, the proof, the lowering, the price and the drawing. No torch."""
