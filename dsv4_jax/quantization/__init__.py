"""Precision policies: which tensor role is rounded how."""
