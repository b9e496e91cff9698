"""Schedules as data: their operations, verification, lowering, cost and drawing. Does not need torch."""
