"""The commands that `farnear` has several of, each group in a file; `farnear.cli` puts them together."""
