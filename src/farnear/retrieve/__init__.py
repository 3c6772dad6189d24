"""Retrieval: encode pages and queries over ranks, search them exactly, and measure what was found."""
