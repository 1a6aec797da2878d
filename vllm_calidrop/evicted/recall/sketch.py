"""The sketch of evicted keys: a random rotation, 2 bits per channel, one scale per token. Estimates q . k, unbiased.

y = Rot (k - mu), mu the mean of the head's prompt keys; rms = |y| / sqrt(D'); u = y / rms looks like D' numbers of the
standard normal distribution, so each is coded by that distribution's 4-level Lloyd-Max quantiser; c = rms <u, u> /
<u, code> makes c <Rot q, code> an unbiased estimate of q . (k - mu). D: head_dim; D': the next power of two.

With a balance w (balance.py) the same is done with w (k - mu) and q / w, whose dot product is that of k - mu and q.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# The 4-level Lloyd-Max quantiser of the standard normal distribution: |u| below and above the threshold.
THRESHOLD = 0.9816
LEVELS = (0.4528, 1.5104)
CHANNELS_PER_BYTE = 4
WORD_BYTES = 4  # codes are stored in words of 16 channels
SEED = 0x9E3779B97F4A7C15
# The quantiser's mean squared error on the standard normal distribution (Max, 1960), and that of the unbiased code,
# which is the code divided by 1 - LLOYD_MAX_ERROR.
LLOYD_MAX_ERROR = 0.1175
UNBIASED_ERROR = LLOYD_MAX_ERROR / (1 - LLOYD_MAX_ERROR)

_MASK = 2**64 - 1


def padded_dim(head_dim: int) -> int:
    """D': the power of two the rotation works in, at least one word of codes."""
    return max(WORD_BYTES * CHANNELS_PER_BYTE, 1 << (head_dim - 1).bit_length())


@cache
def signs(size: int) -> Tensor:
    """float32 [size], +1 or -1: the rotation's first half."""
    return torch.tensor([1.0 if _splitmix64(channel) >> 63 else -1.0 for channel in range(size)])


@cache
def rotation(head_dim: int) -> Tensor:
    """float32 [D', D] with orthonormal columns: signs, then Hadamard (Sylvester's order). The same on every rank."""
    size = padded_dim(head_dim)
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < size:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)), 0)
    return (hadamard * signs(size) / size**0.5)[:, :head_dim].contiguous()


def encode(keys: Tensor, mu: Tensor, balance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sketch of keys [H, T, D] around mu [H, D]: codes uint8 [H, T, D' / 4], scales float16 [H, T].

    balance: float32 [H, D], the weights of the channels; None: all weigh the same. Two bits per channel, the first
    channel lowest: bit 0 the level, bit 1 the sign (set: not negative).
    """
    centred = keys.float() - mu.unsqueeze(1)
    rotated = (centred if balance is None else centred * balance.unsqueeze(1)) @ rotation(keys.shape[-1]).T
    rms = rotated.square().mean(-1).sqrt()
    u = torch.where(rms.unsqueeze(-1) > 0, rotated / rms.unsqueeze(-1), 0.0)
    large, levels = quantised(u)
    overlap = (u.abs() * levels).sum(-1)
    scales = torch.where(rms > 0, rms * u.square().sum(-1) / overlap, 0.0)
    return packed(large, u >= 0), scales.to(torch.float16)


def quantised(u: Tensor) -> tuple[Tensor, Tensor]:
    """Of u [..., D'], normal in each channel: whether the outer level is nearest, bool, and that level's magnitude."""
    large = u.abs() > THRESHOLD
    return large, torch.where(large, LEVELS[1], LEVELS[0])


def packed(large: Tensor, positive: Tensor) -> Tensor:
    """Codes uint8 [..., D' / 4] from the two bits of each channel, bool [..., D']."""
    bits = large.to(torch.uint8) | positive.to(torch.uint8) << 1
    bits = bits.unflatten(-1, (-1, CHANNELS_PER_BYTE))
    return bits[..., 0] | bits[..., 1] << 2 | bits[..., 2] << 4 | bits[..., 3] << 6


def estimate(query: Tensor, codes: Tensor, scales: Tensor, mu: Tensor, balance: Tensor | None = None) -> Tensor:
    """Estimates of q . k for queries [N, G, D] and sketched keys, codes [N, T, D' / 4], scales [N, T], mu [N, D].

    balance: [N, D], what the keys were encoded with. Returns float32 [N, G, T]; not yet scaled by 1 / sqrt(D).
    """
    query = query.float()
    balanced = query if balance is None else query / balance.unsqueeze(1)
    along_code = torch.matmul(balanced @ rotation(query.shape[-1]).T, decoded(codes).transpose(-1, -2))
    return (query * mu.unsqueeze(1)).sum(-1, keepdim=True) + along_code * scales.float().unsqueeze(1)


def inflation(query: Tensor, scales: Tensor, balance: Tensor, scale: float) -> Tensor:
    """By how much the sketch's noise raises the logarithm of a token's expected weight: float32 [N, G, T], nats.

    A logit s estimated with normal noise of variance v has E exp(s + n) = exp(s + v / 2). The rotated error of w (k -
    mu) has variance UNBIASED_ERROR rms^2 in each channel, and rms is (1 - LLOYD_MAX_ERROR) c on average, so that v =
    scale^2 |q / w|^2 UNBIASED_ERROR ((1 - LLOYD_MAX_ERROR) c)^2. Subtract v / 2 from the scaled estimate.
    query: [N, G, D]; scales: [N, T], the c of each token; balance: [N, D]; scale: what estimates are multiplied by.
    """
    length = (query.float() / balance.unsqueeze(1)).square().sum(-1, keepdim=True)
    rms = (1 - LLOYD_MAX_ERROR) * scales.float().unsqueeze(1)
    return 0.5 * scale**2 * UNBIASED_ERROR * length * rms.square()


def decoded(codes: Tensor) -> Tensor:
    """Levels of packed codes: uint8 [..., D' / 4] -> float32 [..., D']."""
    return _levels_of_bytes()[codes.int()].flatten(-2)


def token_bytes(head_dim: int) -> int:
    """Bytes of one token of one KV head in one layer."""
    return padded_dim(head_dim) // CHANNELS_PER_BYTE + torch.float16.itemsize


@cache
def _levels_of_bytes() -> Tensor:
    """float32 [256, 4]: what a byte of codes stands for."""
    channels = torch.arange(256).unsqueeze(-1) >> torch.tensor([0, 2, 4, 6]) & 3
    return torch.tensor([-LEVELS[0], -LEVELS[1], LEVELS[0], LEVELS[1]])[channels]


def _splitmix64(index: int) -> int:
    """The index-th number of the splitmix64 generator started at SEED: signs that any language can make again."""
    z = (SEED + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
