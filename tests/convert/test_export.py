"""Exported folders, judged by transformers loading them, and by the promises made about the files."""

import json
import os
import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pangu.convert import export, safetensors_folder
from pangu.errors import ConversionError
from pangu.model import generate
from pangu.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

MODELS = {
    "llama": ("llama", {}),
    "llama_wide_heads": ("llama", {"head_dim": 16}),
    "llama_biases_tied": ("llama", {"attention_bias": True, "feed_forward_bias": True, "tie_embeddings": True}),
    "llama_multi_head": ("llama", {"num_key_value_heads": 6, "norm_eps": 1e-3}),
    "glm4": ("glm4", {"norm_placement": "depth_scaled_sandwich"}),
    "glm4_odd_width_tied": (
        "glm4",
        {"norm_placement": "sandwich", "hidden_size": 50, "head_dim": 16, "tie_embeddings": True},
    ),
    "glm4_one_key_head": ("glm4", {"norm_placement": "sandwich", "num_key_value_heads": 1, "norm_eps": 1e-3}),
    "hyperclovax": ("hyperclovax", {"norm_placement": "depth_scaled_sandwich", "head_dim": 16}),
    "hyperclovax_biases_tied": (
        "hyperclovax",
        {"norm_placement": "sandwich", "attention_bias": True, "feed_forward_bias": True, "tie_embeddings": True},
    ),
    "hyperclovax_pre_norm": ("hyperclovax", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits_and_the_same_greedy_text(
    name, model_config, random_model, our_logits, tokens, tmp_path
):
    target, changes = MODELS[name]
    config = model_config(**changes)
    model = random_model(config)
    assert export(model.state_dict(), config, tmp_path / "out", target=target) == target
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits = theirs(tokens[None]).logits[0]
    expected = our_logits(model, tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    text = theirs.generate(tokens[None], max_new_tokens=12, do_sample=False)[0, len(tokens) :]
    assert text.tolist() == generate(model, [tokens.tolist()], 12)[0]


@pytest.mark.parametrize("target", ["llama", "glm4", "hyperclovax"])
def test_loading_keeps_every_exported_tensor(target, model_config, random_model, tmp_path):
    config = model_config(norm_placement="pre" if target == "llama" else "sandwich")
    export(random_model(config).state_dict(), config, tmp_path / "out", target=target)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_bf16_rounds_once_and_loads_as_bf16(model_config, random_model, tmp_path):
    config = model_config(norm_placement="sandwich")
    state = random_model(config).state_dict()
    export(state, config, tmp_path / "out", dtype="bf16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, state["head.weight"].bfloat16())
    assert torch.equal(
        loaded.model.layers[1].mlp.gate_up_proj.weight.view(2, 80, 48),
        state["layers.1.feed_forward.gate_up_proj.weight"].bfloat16(),
    )


def test_the_rope_base_of_the_last_phase_replaces_the_models(model_config, random_model, our_logits, tokens, tmp_path):
    config = model_config()
    model = random_model(config)
    export(model.state_dict(), config, tmp_path / "out", rope_base=1.6e6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.rope_base = 1.6e6
    with torch.no_grad():
        logits = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits, our_logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_without_a_tokenizer_glm4_does_not_stop_at_tokens_of_its_own_vocabulary(model_config, random_model, tmp_path):
    config = model_config(
        norm_placement="sandwich", vocab_size=151_552, hidden_size=8, num_attention_heads=2, num_layers=1
    )
    state = random_model(config).state_dict()
    end_of_text = 151_329
    state["embedding.weight"] = torch.ones_like(state["embedding.weight"])
    state["norm.weight"] = torch.zeros_like(state["norm.weight"])
    state["head.weight"] = torch.zeros_like(state["head.weight"])
    state["norm.weight"][0] = 1
    state["layers.0.post_attention_norm.weight"].zero_()
    state["layers.0.post_feed_forward_norm.weight"].zero_()
    state["head.weight"][end_of_text, 0] = 1
    export(state, config, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text = theirs.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)
    assert text[0, 2:].tolist() == [end_of_text] * 3


@pytest.mark.parametrize("target", ["llama", "glm4", "hyperclovax"])
def test_from_text_to_text_with_the_exported_tokenizer(
    target, model_config, random_model, alphabet_tokenizer, tmp_path
):
    config = model_config(norm_placement="pre" if target == "llama" else "sandwich", vocab_size=400)
    model = random_model(config)
    export(model.state_dict(), config, tmp_path / "out", target=target, tokenizer=alphabet_tokenizer)
    tokenizer = Tokenizer(alphabet_tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for ids in (theirs.config, theirs.generation_config):
        assert (ids.eos_token_id, ids.pad_token_id, ids.bos_token_id) == (tokenizer.eod_id, tokenizer.pad_id, None)
    assert (their_tokenizer.eos_token_id, their_tokenizer.pad_token_id) == (tokenizer.eod_id, tokenizer.pad_id)
    text = "def f(x):\n\treturn 42"
    encoded = their_tokenizer(text, return_tensors="pt")
    prompt = tokenizer.encode(text)
    assert encoded["input_ids"][0].tolist() == prompt
    assert their_tokenizer.decode(prompt) == text
    continued = theirs.generate(**encoded, max_new_tokens=10, do_sample=False)[0, len(prompt) :]
    assert continued.tolist() == generate(model, [prompt], 10, eod_id=tokenizer.eod_id)[0]


def test_a_tokenizer_larger_than_the_model_is_refused(model_config, random_model, alphabet_tokenizer, tmp_path):
    config = model_config()
    with pytest.raises(ConversionError, match=r"has 361 pieces, but model\.vocab_size is 97"):
        export(random_model(config).state_dict(), config, tmp_path / "out", tokenizer=alphabet_tokenizer)
    assert not (tmp_path / "out").exists()


def test_shards_respect_their_size_and_load(model_config, random_model, our_logits, tokens, tmp_path):
    config = model_config(norm_placement="sandwich")
    model = random_model(config)
    export(model.state_dict(), config, tmp_path / "out", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    stored = {file: load_file(tmp_path / "out" / file) for file in files}
    assert {name: file for file, tensors in stored.items() for name in tensors} == index["weight_map"]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in stored.values()]
    assert max(sizes) <= 60_000
    assert sum(sizes) == index["metadata"]["total_size"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens[None]).logits[0], our_logits(model, tokens), rtol=1e-5, atol=1e-5)


class Watched(Mapping[str, Tensor]):
    """Makes each tensor when asked, and checks what is alive by then."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.made: list[weakref.ref[Tensor]] = []
        self.written: list[weakref.ref[Tensor]] = []

    def __getitem__(self, name: str) -> Tensor:
        assert sum(reference() is not None for reference in self.made) <= 1
        assert all(reference() is None for reference in self.written)
        tensor = self.state[name].clone()
        self.made.append(weakref.ref(tensor))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_memory_is_one_shard(model_config, random_model, tmp_path, monkeypatch):
    config = model_config(norm_placement="sandwich")
    state = Watched(random_model(config).state_dict())
    save_file = safetensors_folder.save_file

    def watch(tensors: dict[str, Tensor], *arguments: object, **options: object) -> None:
        state.written.extend(weakref.ref(tensor) for tensor in tensors.values())
        save_file(tensors, *arguments, **options)

    monkeypatch.setattr(safetensors_folder, "save_file", watch)
    export(state, config, tmp_path / "out", max_shard_bytes=60_000)
    assert len(state.written) > len(state)


def test_a_folder_that_holds_something_is_left_alone(model_config, random_model, tmp_path):
    config = model_config()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match=r"out exists and is not an empty folder; give another"):
        export(random_model(config).state_dict(), config, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_folder_is_filled(model_config, random_model, tmp_path):
    config = model_config()
    (tmp_path / "out").mkdir()
    export(random_model(config).state_dict(), config, tmp_path / "out")
    files = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"config.json", "generation_config.json", "model.safetensors"}
    assert len(set(files.values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_behind(model_config, random_model, tmp_path, monkeypatch):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(safetensors_folder, "save_file", full)
    config = model_config()
    with pytest.raises(ConversionError, match=r"out could not be written: .*No space left"):
        export(random_model(config).state_dict(), config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_another_model_are_refused_before_anything_is_written(model_config, random_model, tmp_path):
    state = random_model(model_config()).state_dict()
    with pytest.raises(ConversionError, match=r"lacks tensors .*layers\.2\.attention"):
        export(state, model_config(num_layers=3), tmp_path / "out")
    with pytest.raises(ConversionError, match=r"has unknown tensors .*layers\.1\.attention"):
        export(state, model_config(num_layers=1), tmp_path / "out")
    with pytest.raises(ConversionError, match=r"embedding\.weight of the model's state is \[97, 48\].*\[98, 48\]"):
        export(state, model_config(vocab_size=98), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
