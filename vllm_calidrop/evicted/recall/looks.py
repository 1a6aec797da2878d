"""A look: which pages of the evicted KV a KV head wants, from estimated logits. Nothing here reads KV.

Shapes: N pairs of (sequence, KV head), G query heads of each, T tokens in pages of PAGE_TOKENS, P pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_calidrop.evicted.layout import PAGE_TOKENS


def page_shares(logits: Tensor, tokens: Tensor, kept_lse: Tensor) -> Tensor:
    """Each page's estimated share of the whole attention: float32 [N, G, P].

    logits: [N, G, T], estimated and scaled; tokens: int64 [N], how many of T exist; kept_lse: [N, G] over the kept set.
    l_hp = logsumexp over page p; L_h = logaddexp(lse_R, logsumexp_p l_hp); share = exp(l_hp - L_h).
    """
    exists = torch.arange(logits.shape[-1]) < tokens.unsqueeze(-1)
    logits = torch.where(exists.unsqueeze(1), logits, -torch.inf)
    masses = torch.logsumexp(logits.unflatten(-1, (-1, PAGE_TOKENS)), dim=-1)
    whole = torch.logaddexp(kept_lse, torch.logsumexp(masses, dim=-1))
    return torch.exp(masses - whole.unsqueeze(-1))


def wanted_pages(shares: Tensor, eps: Tensor, top_p: Tensor, most: Tensor) -> Tensor:
    """The pages wanted, largest share first: int64 [N, K], -1 where there are fewer than K.

    shares: [N, G, P]; a page's share for the pair is its largest over the heads. eps, top_p: float [N]; most: int [N].
    top_p NaN: the `most` largest pages among those above eps. Otherwise: as many of the largest as leave each head an
    unread mass of at most 1 - top_p, and `most` at most. Ties go to the lower page.
    """
    share, order = torch.sort(shares.amax(1), dim=-1, descending=True, stable=True)
    in_order = shares.gather(-1, order.unsqueeze(1).expand_as(shares))
    left_unread = in_order.flip(-1).cumsum(-1).flip(-1).amax(1)  # by reading the pages before this one only
    wanted = torch.where(top_p.isnan().unsqueeze(-1), share > eps.unsqueeze(-1), left_unread > 1 - top_p.unsqueeze(-1))
    wanted &= torch.arange(wanted.shape[-1]) < most.unsqueeze(-1)
    columns = int(wanted.sum(-1).max()) if wanted.numel() else 0
    return torch.where(wanted, order, -1)[:, :columns]
