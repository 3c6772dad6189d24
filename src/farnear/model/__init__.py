"""Models: from a checkpoint to a module that embeds, and back to a folder that others load."""
