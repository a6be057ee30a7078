"""Whole models over the fused ops."""
