"""Thin entry points that one submits to a cluster."""
