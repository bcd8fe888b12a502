"""Figures, report pages and the comparison of models, drawn from summary tables and cells.

A figure or sentence states only numbers that it reads from a table.
Modules here may import from every room except `jobs` and `tools`.
"""
