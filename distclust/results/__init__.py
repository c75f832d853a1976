"""Metrics, assignments, reports and the served model."""
