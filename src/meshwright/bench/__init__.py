"""Timed pieces, and the records that they leave."""
