"""stub until merged"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Negatives:
    start_N1: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    teacher: npt.NDArray[np.float32]
    index: Any
    positive_teacher: npt.NDArray[np.float32]

    @classmethod
    def of_index(cls, index: Any) -> "Negatives":
        return cls(
            index.negative_start_N1,
            index.negatives,
            np.full(len(index.negatives), np.nan, np.float32),
            index,
            np.full(len(index.positives), np.nan, np.float32),
        )

    def with_teacher(self, teacher, positive_teacher):
        return Negatives(self.start_N1, self.rows, teacher, self.index, positive_teacher)

    def of(self, pair: int) -> npt.NDArray[np.int64]:
        return self.rows[self.start_N1[pair] : self.start_N1[pair + 1]]

    def teacher_of_positive(self, pair: int, document: int) -> float:
        first = int(self.index.positive_start_N1[pair])
        place = int(np.flatnonzero(self.index.positives_of(pair) == document)[0])
        return float(self.positive_teacher[first + place])
