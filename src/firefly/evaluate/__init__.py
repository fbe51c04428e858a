"""Evaluation: held-out bits per byte, form checks, chrF and BLEU, the report."""
