import pytest
import torch
from model_helpers import boundaries, documents, gradients, random_model, small_config, stream
from torch import Tensor
from torch.nn import functional as F

from pangu.model import Transformer
from pangu.model.rope import rotary_tables


def test_parameter_names_and_shapes() -> None:
    """What checkpoints hold and parallelism shards."""
    with torch.device("meta"):
        model = Transformer(small_config(num_layers=1, attention_bias=True))
        filtered = Transformer(small_config(num_layers=1, local_filter="two_convolutions_norm", tie_embeddings=True))
    layer = {
        "attention_norm.weight": (36,),
        "attention.q_proj.weight": (60, 36),
        "attention.q_proj.bias": (60,),
        "attention.kv_proj.weight": (2, 30, 36),
        "attention.kv_proj.bias": (2, 30),
        "attention.output_proj.weight": (36, 60),
        "attention.output_proj.bias": (36,),
        "post_attention_norm.weight": (36,),
        "feed_forward_norm.weight": (36,),
        "feed_forward.gate_up_proj.weight": (2, 52, 36),
        "feed_forward.down_proj.weight": (36, 52),
        "post_feed_forward_norm.weight": (36,),
    }
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "embedding.weight": (97, 36),
        **{f"layers.0.{name}": shape for name, shape in layer.items()},
        "norm.weight": (36,),
        "head.weight": (97, 36),
    }
    shapes = {name: tuple(p.shape) for name, p in filtered.named_parameters()}
    assert "head.weight" not in shapes
    assert {name: shape for name, shape in shapes.items() if "attention." in name} == {
        "layers.0.attention.qk_proj.weight": (6, 2, 10, 36),
        "layers.0.attention.v_proj.weight": (60, 36),
        "layers.0.attention.output_proj.weight": (36, 60),
        "layers.0.attention.local_filter.weight1": (18, 36, 2),
        "layers.0.attention.local_filter.bias1": (18,),
        "layers.0.attention.local_filter.weight2": (36, 18, 2),
        "layers.0.attention.local_filter.bias2": (36,),
        "layers.0.attention.local_filter.norm.weight": (36,),
    }


def test_packed_documents_equal_separate_runs() -> None:
    """Hidden states, loss and gradients of documents laid end to end are those of each alone, added up."""
    tokens, positions, cu_seqlens = stream([5, 1, 9, 2])
    labels = tokens.roll(-1)
    packed, alone = random_model(small_config()), random_model(small_config())
    hidden = packed(tokens, positions, cu_seqlens)
    packed.loss(tokens, labels, positions, cu_seqlens)[0].backward()
    for span in documents(cu_seqlens):
        one = boundaries([span.stop - span.start])
        torch.testing.assert_close(alone(tokens[span], positions[span], one), hidden[span], atol=1e-5, rtol=1e-5)
        alone.loss(tokens[span], labels[span], positions[span], one)[0].backward()
    wanted = gradients(alone)
    for name, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-4, msg=name)


def test_without_reset_attention_crosses_documents() -> None:
    """Yuan 2.0 resets positions at documents and nothing else."""
    model = random_model(small_config(local_filter="two_convolutions_norm"))
    tokens, positions, cu_seqlens = stream([6, 5])
    crossing = model(tokens, positions, boundaries([11]))
    separate = model(tokens, positions, cu_seqlens)
    torch.testing.assert_close(crossing[:6], separate[:6], atol=1e-5, rtol=1e-5)
    assert ((crossing[6:] - separate[6:]).abs().amax(-1) > 1e-3).all()
    unbroken = model(tokens, torch.arange(11), boundaries([11]))
    assert ((crossing[6:] - unbroken[6:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_cross_entropy_of_the_logits(tie_embeddings: bool, weighted: bool) -> None:
    config = small_config(tie_embeddings=tie_embeddings)
    chunked, plain = random_model(config), random_model(config)
    tokens, positions, cu_seqlens = stream([7, 6])
    labels = tokens.roll(-1)
    labels[[2, 6]] = -100
    weights = torch.rand(13, generator=torch.Generator().manual_seed(0)) if weighted else None

    loss, token_loss = chunked.loss(tokens, labels, positions, cu_seqlens, weights)
    loss.backward()
    logits = plain.logits(plain(tokens, positions, cu_seqlens))
    expected = F.cross_entropy(logits, labels, reduction="none")
    expected_sum = (expected if weights is None else expected * weights).sum()
    expected_sum.backward()

    torch.testing.assert_close(loss, expected_sum)
    torch.testing.assert_close(token_loss, expected.detach())
    assert not token_loss.requires_grad
    wanted = gradients(plain)
    for name, gradient in gradients(chunked).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("local_filter", ["none", "two_convolutions_norm", "exponential_moving_average"])
def test_bf16_compute_keeps_fp32_weights_and_stays_close(local_filter: str) -> None:
    model = random_model(small_config(local_filter=local_filter, attention_bias=True, feed_forward_bias=True))
    tokens, positions, cu_seqlens = stream([20, 9])
    labels = tokens.roll(-1)
    exact = model(tokens, positions, cu_seqlens)
    exact_loss, _ = model.loss(tokens, labels, positions, cu_seqlens)
    model.compute_dtype = torch.bfloat16
    hidden = model(tokens, positions, cu_seqlens)
    assert hidden.dtype == model.logits(hidden).dtype == torch.bfloat16
    assert ((hidden - exact).norm() / exact.norm()).item() < 0.03
    loss, token_loss = model.loss(tokens, labels, positions, cu_seqlens)
    assert loss.dtype == token_loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)
    loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.03)])
def test_far_positions_keep_their_distances(dtype: torch.dtype, tolerance: float) -> None:
    """Attention depends on distances only, so a shift to the end of a 128K context changes nothing but rounding."""
    model = random_model(small_config())
    model.compute_dtype = dtype
    tokens, positions, cu_seqlens = stream([24])
    near, far = model(tokens, positions, cu_seqlens), model(tokens, positions + 131_072 - 24, cu_seqlens)
    assert ((near - far).float().norm() / near.float().norm()).item() < tolerance


def test_rotary_tables_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    positions = torch.cat((torch.arange(20), torch.tensor([4095, 32_767, 131_071])))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=128, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1.6e6}
        )
    )
    expected = rotary(torch.zeros(1), positions[None])
    for table, other in zip(rotary_tables(positions, 128, 1.6e6), expected, strict=True):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, other[0], atol=1e-6, rtol=0)


def test_a_phase_may_change_the_rope_base() -> None:
    model = random_model(small_config())
    tokens, positions, cu_seqlens = stream([12])
    before = model(tokens, positions, cu_seqlens)
    model.rope_base = 1e6
    other = random_model(small_config(rope_base=1e6))
    after = model(tokens, positions, cu_seqlens)
    assert torch.equal(after, other(tokens, positions, cu_seqlens))
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("norm_placement", ["pre", "depth_scaled_sandwich"])
def test_sublayers_give_out_what_is_added_to_the_residual_stream(norm_placement: str) -> None:
    """What statistics hook into: the outputs of `attention` and `feed_forward` before any post-norm."""
    block = random_model(small_config(norm_placement=norm_placement)).layers["0"]
    outputs: dict[str, Tensor] = {}
    for name in ("attention", "feed_forward"):
        block.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.__setitem__(name, output)
        )
    h = torch.randn(8, 36, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(torch.arange(8), 10, 1e4)
    out = block(h, cos, sin, boundaries([8]))
    added = [outputs["attention"], outputs["feed_forward"]]
    if norm_placement != "pre":
        norms = (block.get_submodule("post_attention_norm"), block.get_submodule("post_feed_forward_norm"))
        added = [norm(y) for norm, y in zip(norms, added, strict=True)]
    torch.testing.assert_close(out, h + added[0] + added[1], atol=1e-5, rtol=1e-5)


def test_a_model_in_two_stages_equals_the_whole() -> None:
    """Missing parts are skipped: how pipeline stages use the same class."""
    whole, first, last = (random_model(small_config()) for _ in range(3))
    del first.layers["1"], first.layers["2"], last.layers["0"]
    first.norm = first.head = None
    last.embedding, last.reads_tokens = None, False
    tokens, positions, cu_seqlens = stream([7, 4])
    hidden = last(first(tokens, positions, cu_seqlens), positions, cu_seqlens)
    assert torch.equal(last.logits(hidden), whole.logits(whole(tokens, positions, cu_seqlens)))


@pytest.mark.parametrize("local_filter", ["none", "two_convolutions_norm"])
def test_compiles(local_filter: str) -> None:
    """Traced by torch.compile, another set of documents included, with the same loss and gradients."""
    eager = random_model(small_config(local_filter=local_filter, num_layers=1))
    traced = random_model(small_config(local_filter=local_filter, num_layers=1))
    compiled = torch.compile(traced.loss, backend="aot_eager")
    for lengths in ([5, 8], [6, 7]):
        tokens, positions, cu_seqlens = stream(lengths)
        labels = tokens.roll(-1)
        loss, _ = compiled(tokens, labels, positions, cu_seqlens)
        expected, _ = eager.loss(tokens, labels, positions, cu_seqlens)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
    wanted = gradients(eager)
    for name, gradient in gradients(traced).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)
