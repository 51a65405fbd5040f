"""Figures and tables, made from JSON lines alone."""
