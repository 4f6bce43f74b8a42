"""torch_npu's fused operators on the emulator: values and gradients of plain PyTorch, through the real host code."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pangu.device.cann_emulator import Emulator, emulated_npu

pytestmark = pytest.mark.ascend


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    if find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    with emulated_npu() as installed:
        yield installed


@pytest.fixture(scope="module")
def npu(emulator: Emulator) -> ModuleType:
    import torch_npu

    return torch_npu


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def causal_template() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)


def assert_same(
    emulator: Emulator,
    operator: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    reached: tuple[str, ...],
) -> None:
    """Equal values and gradients, and the aclnn functions in `reached` among those called."""
    on_npu = [tensor.npu().requires_grad_() for tensor in inputs]
    on_cpu = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = reference(*on_cpu)
    grad = randn(*expected.shape)
    expected.backward(grad)
    with emulator.record() as calls:
        output = operator(*on_npu)
        output.backward(grad.to(output.device, output.dtype))
    torch.testing.assert_close(output.cpu(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(on_npu, on_cpu, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, atol=1e-5, rtol=1e-5)
    assert set(reached) <= {call.name for call in calls}


def test_rms_norm(emulator: Emulator, npu: ModuleType) -> None:
    assert_same(
        emulator,
        lambda x, weight: npu.npu_rms_norm(x, weight, 1e-6)[0],
        lambda x, weight: F.rms_norm(x, (32,), weight, 1e-6),
        (randn(5, 3, 32), randn(32)),
        ("aclnnRmsNorm", "aclnnRmsNormGrad"),
    )


def test_rms_norm_in_bfloat16(npu: ModuleType) -> None:
    x, weight, grad = randn(6, 32).bfloat16(), randn(32).bfloat16(), randn(6, 32).bfloat16()
    y, rstd = npu.npu_rms_norm(x.npu(), weight.npu(), 1e-6)
    assert (y.dtype, rstd.dtype, rstd.shape) == (torch.bfloat16, torch.float32, (6, 1))
    expected = F.rms_norm(x.float(), (32,), weight.float(), 1e-6).bfloat16()
    assert torch.equal(y.cpu(), expected)
    dx, dweight = npu.npu_rms_norm_backward(grad.npu(), x.npu(), weight.npu(), rstd)
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)


def test_add_rms_norm_has_values_and_no_derivative(emulator: Emulator, npu: ModuleType) -> None:
    x, y, weight = randn(6, 32), randn(32, 6).t(), randn(32)
    with emulator.record() as calls:
        normed, _, total = npu.npu_add_rms_norm(x.npu(), y.contiguous().npu(), weight.npu(), 1e-6)
    torch.testing.assert_close(normed.cpu(), F.rms_norm(x + y, (32,), weight, 1e-6))
    assert torch.equal(total.cpu(), x + y)
    assert [call.name for call in calls] == ["aclnnAddRmsNorm"]
    with pytest.raises(RuntimeError, match="derivative for npu::npu_add_rms_norm is not implemented"):
        npu.npu_add_rms_norm(x.npu().requires_grad_(), x.npu(), weight.npu(), 1e-6)[0].sum().backward()


def test_swiglu(emulator: Emulator, npu: ModuleType) -> None:
    assert_same(
        emulator,
        lambda x: npu.npu_swiglu(x, dim=-1),
        lambda x: F.silu(x[:, :12]) * x[:, 12:],
        (randn(7, 24),),
        ("aclnnSwiGlu", "aclnnSwiGluGrad"),
    )


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


@pytest.mark.parametrize(("mode", "rotate"), [("half", rotate_half), ("interleave", rotate_pairs)])
def test_rotary_mul(emulator: Emulator, npu: ModuleType, mode: str, rotate: Callable[[Tensor], Tensor]) -> None:
    assert_same(
        emulator,
        lambda x, cos, sin: npu.npu_rotary_mul(x, cos, sin, mode),
        lambda x, cos, sin: x * cos + rotate(x) * sin,
        (randn(1, 6, 4, 16), randn(1, 6, 1, 16), randn(1, 6, 1, 16)),
        ("aclnnRotaryPositionEmbeddingV2", "aclnnRotaryPositionEmbeddingGrad"),
    )


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """[length, heads, dim] each, with fewer heads in k and v."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, allowed, scale=0.3, enable_gqa=True)[0].transpose(0, 1)


def test_attention_of_documents(emulator: Emulator, npu: ModuleType) -> None:
    """TND, grouped queries, documents with more keys than queries: what decoding and training with packing use."""
    q_ends, kv_ends = [3, 7, 12], [4, 10, 15]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for q0, q1, k0, k1 in zip([0, *q_ends], q_ends, [0, *kv_ends], kv_ends, strict=False):
            allowed = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - (q1 - q0)).bool()
            outputs.append(masked_attention(q[q0:q1], k[k0:k1], v[k0:k1], allowed))
        return torch.cat(outputs)

    assert_same(
        emulator,
        lambda q, k, v: npu.npu_fusion_attention(
            q,
            k,
            v,
            4,
            "TND",
            atten_mask=causal_template(),
            scale=0.3,
            sparse_mode=3,
            actual_seq_qlen=q_ends,
            actual_seq_kvlen=kv_ends,
        )[0],
        reference,
        (randn(12, 4, 16), randn(15, 2, 16), randn(15, 2, 16)),
        ("aclnnFlashAttentionVarLenScore", "aclnnFlashAttentionUnpaddingScoreGrad"),
    )


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "BNSD"])
@pytest.mark.parametrize(
    ("sparse_mode", "pre", "next_", "allowed"),
    [
        (0, 1, 0, torch.ones(5, 5).tril().triu(-1)),
        (1, 2**31 - 1, 2**31 - 1, torch.ones(5, 5).tril()),
        (2, 2**31 - 1, 2**31 - 1, torch.ones(5, 5).tril()),
        (4, 2, 1, torch.ones(5, 5).tril(1).triu(-2)),
    ],
)
def test_attention_layouts_and_masks(
    emulator: Emulator, npu: ModuleType, layout: str, sparse_mode: int, pre: int, next_: int, allowed: Tensor
) -> None:
    def arrange(x: Tensor) -> Tensor:  # from [batch, sequence, heads, dim]
        if layout in ("BSH", "SBH"):
            x = x.flatten(2)
        return {"SBH": x.transpose(0, 1), "BNSD": x.transpose(1, 2)}.get(layout, x).contiguous()

    def restore(x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if layout == "SBH" else x.transpose(1, 2) if layout == "BNSD" else x
        return x.unflatten(-1, (4, 8)) if layout in ("BSH", "SBH") else x

    mask = causal_template() if sparse_mode >= 2 else torch.ones(5, 5, dtype=torch.bool, device="npu").triu(1)
    assert_same(
        emulator,
        lambda q, k, v: restore(
            npu.npu_fusion_attention(
                *map(arrange, (q, k, v)),
                4,
                layout,
                atten_mask=mask,
                scale=0.3,
                pre_tockens=pre,
                next_tockens=next_,
                sparse_mode=sparse_mode,
            )[0]
        ),
        lambda q, k, v: torch.stack([masked_attention(*item, allowed.bool()) for item in zip(q, k, v, strict=True)]),
        (randn(2, 5, 4, 8), randn(2, 5, 2, 8), randn(2, 5, 2, 8)),
        ("aclnnFlashAttentionScore", "aclnnFlashAttentionScoreGrad"),
    )


def test_scaled_dot_product_attention_reaches_the_fused_operator(emulator: Emulator) -> None:
    shape = (2, 2, 4, 8)
    assert_same(
        emulator,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (randn(*shape), randn(*shape) + 1, randn(*shape) - 1),
        ("aclnnFlashAttentionScore",),
    )


def test_attention_over_two_halves_of_the_keys_can_be_merged(npu: ModuleType) -> None:
    q, k, v = (randn(4, 2, 8).npu(), randn(6, 2, 8).npu(), randn(6, 2, 8).npu() + 1)

    def attend(k: Tensor, v: Tensor) -> list[Tensor]:
        ends = {"actual_seq_qlen": [4], "actual_seq_kvlen": [k.shape[0]]}
        return npu.npu_fusion_attention(q, k, v, 2, "TND", scale=0.3, softmax_layout="TND", **ends)[:3]

    whole, first, second = attend(k, v), attend(k[:2], v[:2]), attend(k[2:], v[2:])
    ends = torch.tensor([4], device="npu")
    layouts = {"input_layout": "TND", "input_softmax_layout": "TND"}
    merged = npu.npu_ring_attention_update(*first, *second, actual_seq_qlen=ends, **layouts)
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_statistics_of_documents_lie_by_head_unless_asked_for_in_the_order_of_the_input(npu: ModuleType) -> None:
    q, ends, heads = randn(5, 2, 8).npu(), [2, 5], 2

    def largest(**options: str) -> Tensor:
        arguments = {"scale": 0.3, "actual_seq_qlen": ends, "actual_seq_kvlen": ends}
        return npu.npu_fusion_attention(q, q, q, heads, "TND", **arguments, **options)[1].cpu()[..., 0]

    by_token, by_head = largest(softmax_layout="TND"), largest()
    expected = torch.cat([document.T.flatten() for document in by_token.split([2, 3])])
    assert torch.equal(by_head.flatten(), expected)
    assert not torch.equal(by_head, by_token)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(emulator: Emulator, npu: ModuleType, reduction: str) -> None:
    labels = torch.tensor([1, 2, 7, 3, 4, 0])
    assert_same(
        emulator,
        lambda x: npu.npu_cross_entropy_loss(x, labels.npu(), reduction=reduction, ignore_index=7)[0],
        lambda x: F.cross_entropy(x, labels, reduction=reduction, ignore_index=7).reshape(-1),
        (randn(6, 11),),
        ("aclnnCrossEntropyLoss", "aclnnCrossEntropyLossGrad"),
    )


def test_fused_adamw(emulator: Emulator, npu: ModuleType) -> None:
    """aten's operator, over a list of tensors, and torch_npu's own, whose beta powers are those of the step before."""
    start, grad = randn(3, 5), randn(5, 3).t().contiguous()
    exp_avg, exp_avg_sq = randn(3, 5) + 1, randn(3, 5).abs()
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
    optimizer.state[parameter] = {
        "step": torch.tensor(4.0),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.clone(),
    }
    parameter.grad = grad
    optimizer.step()

    tensors = [tensor.npu() for tensor in (start, exp_avg, exp_avg_sq)]
    npu.npu_apply_adam_w(0.9**4, 0.999**4, 0.01, 0.1, 0.9, 0.999, 1e-8, grad.npu(), None, False, False, out=tensors)
    torch.testing.assert_close(tensors[0].cpu(), parameter.detach())

    tensors = [[tensor.npu()] for tensor in (start, grad, exp_avg, exp_avg_sq)]
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
    with emulator.record() as calls:
        step = [torch.tensor(5.0).npu()]
        torch._fused_adamw_(*tensors, [], step, **settings, amsgrad=False, maximize=False)
    torch.testing.assert_close(tensors[0][0].cpu(), parameter.detach())
    assert "aclnnApplyAdamWV2" in {call.name for call in calls}


def test_what_the_numerics_do_not_cover_is_an_error(npu: ModuleType) -> None:
    q = randn(4, 2, 8).npu()
    ends = {"actual_seq_qlen": [4], "actual_seq_kvlen": [4]}
    with pytest.raises(NotImplementedError, match=r"npu_fusion_attention.*no numerics for argument 'keep_prob'"):
        npu.npu_fusion_attention(q, q, q, 2, "TND", keep_prob=0.5, **ends)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda npu, x: npu.npu_rms_norm(x, x[0, 0, :2]), "gamma is not of the last dimensions"),
        (lambda npu, x: npu.npu_rotary_mul(x[..., :3], x[..., :3], x[..., :3]), "the last dimension is odd"),
        (
            lambda npu, x: npu.npu_fusion_attention(
                x,
                x,
                x,
                2,
                "TND",
                atten_mask=x[:, 0, :4].bool(),
                sparse_mode=3,
                actual_seq_qlen=[4],
                actual_seq_kvlen=[4],
            ),
            r"sparse_mode needs a mask of \(2048, 2048\)",
        ),
        (
            lambda npu, x: npu.npu_fusion_attention(x, x, x, 2, "TND", actual_seq_qlen=[3], actual_seq_kvlen=[3]),
            r"the last of actual_seq_len, \[3\], is not 4",
        ),
        (
            lambda npu, x: npu.npu_fusion_attention(x, x, x, 2, "TND", actual_seq_qlen=[1, 4], actual_seq_kvlen=[0, 4]),
            "a sequence has queries and no keys",
        ),
        (
            lambda npu, x: npu.npu_fusion_attention(
                *[x.repeat(1, 1, 97)] * 3, 2, "TND", actual_seq_qlen=[4], actual_seq_kvlen=[4]
            ),
            "head dimension 776 is over 768",
        ),
        (
            lambda npu, x: npu.npu_fusion_attention(
                *[x.repeat(1, 129, 1)] * 3, 258, "TND", actual_seq_qlen=[4], actual_seq_kvlen=[4]
            ),
            "258 heads are over 256",
        ),
        (
            lambda npu, x: npu.npu_cross_entropy_loss(x[:, 0], torch.tensor([0, -100, 1, 2]).npu(), reduction="none"),
            "a label is outside the vocabulary",
        ),
        (lambda npu, x: npu.npu_rms_norm(x, x[0, 0].half()), "gamma is neither fp32 nor of the input's dtype"),
        (lambda npu, x: npu.npu_add_rms_norm(x.half(), x.half(), x[0, 0]), "x1, x2 and gamma differ in dtype"),
        (lambda npu, x: npu.npu_add_rms_norm(x[:0], x[:0], x[0, 0]), "an empty tensor"),
    ],
)
def test_documented_limits_that_host_code_lets_through(
    npu: ModuleType, call: Callable[..., object], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(npu, randn(4, 2, 8).npu())


def test_host_code_still_checks_arguments(npu: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="world_size should be in"):
        npu.npu_all_gather_base_mm(
            torch.zeros(2, 256, dtype=torch.bfloat16).npu(), torch.zeros(256, 4, dtype=torch.bfloat16).npu(), "group", 3
        )
