"""Numbers in the sentences that people read."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """``1 pair``, ``1,024 pairs``; ``several`` is for words that take more than an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"
