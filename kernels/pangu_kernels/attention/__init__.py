import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    statistics_dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    outs, logsumexps = [], []
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_ends) - 1):
        qi = q[q_ends[i] : q_ends[i + 1]].transpose(0, 1).to(statistics_dtype)
        ki = k[k_ends[i] : k_ends[i + 1]].repeat_interleave(group, 1).transpose(0, 1).to(statistics_dtype)
        vi = v[k_ends[i] : k_ends[i + 1]].repeat_interleave(group, 1).transpose(0, 1).to(statistics_dtype)
        tq, tk = qi.shape[1], ki.shape[1]
        visible = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
        scores = (qi @ ki.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
        logsumexp = scores.logsumexp(-1)
        outs.append(((scores - logsumexp[..., None]).exp() @ vi).transpose(0, 1).to(q.dtype))
        logsumexps.append(logsumexp.T.detach())
    return torch.cat(outs), torch.cat(logsumexps)
