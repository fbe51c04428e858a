"""Importers of labelled corpora."""
