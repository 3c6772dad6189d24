"""One rank of `farnear encode`: started by it as launch/train.py is by a launch, and of no use otherwise."""

from farnear.commands.encode import rank_command
from farnear.commands.rank import end_rank

if __name__ == "__main__":
    end_rank(rank_command)
