"""A run folder as one HTML page that anybody can open, keep and send on. It reads that folder's files only."""
