"""Rationales: facts in words, writers, filters, and reading traces back."""
