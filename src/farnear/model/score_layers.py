"""The layers of a reranker's head as they train: what a score needs of them, in fp32 (`farnear.model.heads`)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear


class RowsLinear(nn.Linear):
    """A language-model head that computes some of its rows at the last position, in fp32.

    Attributes:
        rows: Which ones.
        sparse: Whether the gradient of its weight is a sparse tensor, of these rows; as `nn.Embedding` has it.
    """

    rows: tuple[int, ...]
    sparse: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """[n, L, D] of any float type to float32 [n, 1, rows]."""
        with torch.autocast(input.device.type, enabled=False):
            row_r = torch.tensor(self.rows, device=input.device)
            weight_rD = embedding(row_r, self.weight, sparse=self.sparse).float()
            bias_r = None if self.bias is None else self.bias[row_r].float()
            return linear(input[..., -1:, :].float(), weight_rD, bias_r)


class ScoreLinear(nn.Linear):
    """The last layer of a score, in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """[n, D] of any float type to float32 [n, 1]."""
        with torch.autocast(input.device.type, enabled=False):
            return linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())
