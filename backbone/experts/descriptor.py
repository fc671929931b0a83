"""Distribution-shift detectors: tiny autoencoders on a layer's mean token (SEMA, Wang et al. 2025, section 3.3).

Shapes: B batch, D width, H code size, S record size, E descriptors of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Descriptor(nn.Module):
    """Linear encoder and decoder of the mean token; how badly it reconstructs says how new an input is.

    Holds the newest reconstruction losses of its training in a buffer `record` [S], so the statistics are saved with
    the weights; `count` says how many entries are filled. `forward` never writes to them, `observe` does.
    """

    record: Tensor
    count: Tensor

    def __init__(self, width: int, code: int, record_size: int):
        super().__init__()
        self.encoder = nn.Linear(width, code)
        self.decoder = nn.Linear(code, width)
        self.register_buffer("record", torch.zeros(record_size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for linear in (self.encoder, self.decoder):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, mean_token: Tensor) -> Tensor:
        """Mean squared error over channels of each sample's reconstruction: [B, D] -> [B]."""
        return (self.decoder(self.encoder(mean_token)) - mean_token).square().mean(dim=1)

    @torch.no_grad()
    def observe(self, batches: Iterable[Tensor]) -> None:
        """Appends losses [B], batch by batch, and forgets the oldest beyond the record size.

        As the original does, a batch that would overfill a record not yet full only tops it up: its surplus is dropped."""
        filled, size = int(self.count), len(self.record)
        record = self.record
        for losses in batches:
            if filled < size:
                taken = losses[: size - filled]
                record = torch.cat([record[:filled], taken, record[filled + len(taken) :]])
                filled += len(taken)
            else:
                record = torch.cat([record, losses])[-size:]
        self.record.copy_(record)
        self.count.fill_(filled)

    def z_scores(self, losses: Tensor, std_floor: float = 0.0, filled: int | None = None) -> Tensor:
        """(loss - mean) / std of the record: [B] -> [B], signed, zeros while 2 or fewer losses are recorded.

        The deviation is unbiased and at least `std_floor` times the mean; without a floor a constant record divides by
        zero, as in the original. `filled`: the value of `count`, for who has read it already: on a GPU reading waits.
        With a floor, a record of zeros counts rounding as its deviation."""
        filled = int(self.count) if filled is None else filled
        if filled <= 2:
            return torch.zeros_like(losses)
        known = self.record[:filled]
        mean = known.mean()
        deviation = torch.maximum(known.std(), std_floor * mean)
        if std_floor:
            deviation = deviation.clamp(min=torch.finfo(deviation.dtype).eps)
        return (losses - mean) / deviation


def losses_of(descriptors: Sequence[Descriptor], mean_token: Tensor) -> Tensor:
    """Every descriptor's losses [E, B] of mean tokens [B, D], their encoders as one product and their decoders as one."""
    if len(descriptors) == 1:
        return descriptors[0](mean_token).unsqueeze(0)
    encoders, decoders = [d.encoder for d in descriptors], [d.decoder for d in descriptors]
    codes = F.linear(mean_token, torch.cat([e.weight for e in encoders]), torch.cat([e.bias for e in encoders]))
    codes = codes.unflatten(1, (len(descriptors), -1)).transpose(0, 1)  # [E, B, H]
    weights = torch.stack([d.weight.T for d in decoders])  # [E, H, D]
    rebuilt = torch.baddbmm(torch.stack([d.bias for d in decoders]).unsqueeze(1), codes, weights)  # [E, B, D]
    return (rebuilt - mean_token).square().mean(dim=2)


def shift_scores(
    descriptors: Sequence[Sequence[Descriptor]], mean_tokens: Sequence[Tensor], std_floor: float
) -> Tensor:
    """Signed shift scores [B, E of all layers] of mean tokens [B, D] of each layer, by that layer's descriptors.

    On a GPU one read waits for it, of the records' sizes, whatever the number of layers."""
    filled = iter(torch.stack([d.count for of_layer in descriptors for d in of_layer]).tolist())
    scores = []
    for of_layer, mean_token in zip(descriptors, mean_tokens, strict=True):
        losses = losses_of(of_layer, mean_token)  # [E, B]
        scores += [d.z_scores(loss, std_floor, next(filled)) for d, loss in zip(of_layer, losses, strict=True)]
    return torch.stack(scores).T


def lowest(scores: Tensor) -> float:
    """The smallest of scores [E]; below everything where one is not a number."""
    return float(scores.min().nan_to_num(nan=float("-inf"), posinf=float("inf")))


def finite(scores: Tensor) -> list[float | None]:
    """Scores [E] for the log; None where a record without deviation gave an infinite one or none."""
    return [s if math.isfinite(s) else None for s in scores.tolist()]
