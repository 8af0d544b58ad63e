"""Weights on disk: HF's folders read by unit, ours loaded by HF, and what does not fit refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from farspan.modules.layers import hf_names
from farspan.modules.shards import (
    ShardError,
    ShardStore,
    copy_generation_config,
    copy_tokenizer,
    unit_file,
    write_index,
    write_unit,
)
from safetensors.torch import load_file, save_file
from tiny import spell_as_before
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

Make = Callable[..., PreTrainedModel]
FAMILIES = ("gptj", "gpt_neox", "llama")


def write_shards(source: Path, target: Path) -> ShardStore:
    store = ShardStore(source)
    target.mkdir()
    for unit in range(store.spec.unit_count):
        write_unit(target, store.spec, unit, store.read_unit(unit))
    write_index(target, store.spec, torch.float32)
    return store


@pytest.fixture
def plain(tiny_hf: Make, tmp_path: Path) -> Path:
    """A Llama in one model.safetensors."""
    tiny_hf("llama").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_round_trip(tiny_hf: Make, tmp_path: Path, model_type: str, tied: bool) -> None:
    """HF → layer files → from_pretrained, bit for bit; and through our own reading."""
    hf = tiny_hf(model_type, tie_word_embeddings=tied)
    hf.save_pretrained(tmp_path / "hf")
    store = write_shards(tmp_path / "hf", tmp_path / "shards")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in hf.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    again = ShardStore(tmp_path / "shards")
    assert again.spec == store.spec
    for unit in range(store.spec.unit_count):
        expected, found = store.read_unit(unit), again.read_unit(unit)
        assert expected.keys() == found.keys() == hf_names(store.spec, unit).keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_index_counts_the_bytes_and_names_what_is_there(plain: Path, tmp_path: Path) -> None:
    write_shards(plain, tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "shards").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == size


def test_other_tools_find_the_weights(plain: Path, tmp_path: Path) -> None:
    """Those that never read the index: llama.cpp's converter (names), mlx_lm (a glob)."""
    shards = tmp_path / "shards"
    write_shards(plain, shards)
    whole = load_file(plain / "model.safetensors").keys()
    by_llama_cpp = [n for n in os.listdir(shards) if n.startswith("model") and n.endswith(".safetensors")]
    by_mlx = [path.name for path in shards.glob("model*.safetensors")]
    assert sorted(by_llama_cpp) == sorted(by_mlx) == sorted(path.name for path in shards.glob("*.safetensors"))
    assert {name for file in by_mlx for name in load_file(shards / file)} == whole


@pytest.mark.parametrize("with_index", [True, False])
def test_folders_of_before_are_read_alike(plain: Path, tmp_path: Path, with_index: bool) -> None:
    store = write_shards(plain, tmp_path / "old")
    spell_as_before(tmp_path / "old")
    assert (tmp_path / "old" / "block-00001.safetensors").is_file()
    if not with_index:
        (tmp_path / "old" / "model.safetensors.index.json").unlink()
    old = ShardStore(tmp_path / "old")
    for unit in range(store.spec.unit_count):
        expected, found = store.read_unit(unit), old.read_unit(unit)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_in_several_files(tiny_hf: Make, plain: Path, tmp_path: Path) -> None:
    tiny_hf("llama").save_pretrained(tmp_path / "several", max_shard_size="10KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = ShardStore(plain), ShardStore(tmp_path / "several")
    for unit in range(one.spec.unit_count):
        expected, found = one.read_unit(unit), several.read_unit(unit)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_site_needs_only_its_own_layers(plain: Path, tmp_path: Path, with_index: bool) -> None:
    store = write_shards(plain, tmp_path / "shards")
    (tmp_path / "shards" / "model-00002-of-00004.safetensors").unlink()
    if not with_index:
        (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    here = ShardStore(tmp_path / "shards")
    assert here.missing_units() == [1]
    assert here.has_unit(2)
    assert here.read_unit(2).keys() == store.read_unit(2).keys()
    with pytest.raises(ShardError, match=r"model-00002-of-00004\.safetensors is missing and block-00000 lies in it"):
        here.read_unit(1)


def test_a_tied_head_needs_the_embedding(tiny_hf: Make, tmp_path: Path) -> None:
    tiny_hf("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    write_shards(tmp_path / "hf", tmp_path / "shards")
    assert load_file(tmp_path / "shards" / "model-00004-of-00004.safetensors").keys() == {"model.norm.weight"}
    here = ShardStore(tmp_path / "shards")
    assert torch.equal(here.read_unit(3)["out.weight"], here.read_unit(0)["tokens.weight"])
    (tmp_path / "shards" / "model-00001-of-00004.safetensors").unlink()
    assert here.missing_units() == [0, 3]


def test_the_dtype_on_disk_stays(tiny_hf: Make, tmp_path: Path) -> None:
    tiny_hf("gptj").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in ShardStore(tmp_path).read_unit(1).values()} == {torch.bfloat16}


def test_buffers_of_old_checkpoints_are_passed_over(tiny_hf: Make, tmp_path: Path) -> None:
    tiny_hf("gptj").save_pretrained(tmp_path)
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e9),
    }
    edit(tmp_path, lambda tensors: tensors.update(masks))
    assert "attn.q.weight" in ShardStore(tmp_path).read_unit(1)


def test_a_missing_tensor_is_named(plain: Path) -> None:
    edit(plain, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ShardError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        ShardStore(plain)


def test_a_tensor_that_the_index_promises_is_named(plain: Path, tmp_path: Path) -> None:
    write_shards(plain, tmp_path / "shards")
    edit(tmp_path / "shards", lambda tensors: tensors.pop("model.norm.weight"), "model-00004-of-00004.safetensors")
    with pytest.raises(ShardError, match=r"model-00004-of-00004\.safetensors has no tensor model\.norm\.weight"):
        ShardStore(tmp_path / "shards").read_unit(3)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_tensor_too_many_is_named(plain: Path, name: str) -> None:
    edit(plain, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(ShardError, match=f"{name} in model.safetensors is no part of the model"):
        ShardStore(plain)


def test_a_wrong_shape_is_named(plain: Path) -> None:
    edit(plain, lambda tensors: tensors.update({"lm_head.weight": torch.ones(60, 32)}))
    expected = r"model\.safetensors: lm_head\.weight is \[60, 32\], config\.json makes it \[61, 32\]"
    with pytest.raises(ShardError, match=expected):
        ShardStore(plain).read_unit(3)


def test_a_bare_model_is_explained(tiny_hf: Make, tmp_path: Path) -> None:
    model = tiny_hf("gpt_neox")
    model.save_pretrained(tmp_path)
    model.gpt_neox.save_pretrained(tmp_path)
    with pytest.raises(ShardError, match=r"was saved from the bare model .* save it again from GPTNeoXForCausalLM"):
        ShardStore(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "convert_from_hf_llama"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"), "cannot be read as"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    ],
)
def test_spoiled_folders(plain: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(plain)
    with pytest.raises(ShardError, match=says) as caught:
        ShardStore(plain)
    assert "\n" not in str(caught.value)


def test_a_cut_off_file(plain: Path, tmp_path: Path) -> None:
    write_shards(plain, tmp_path / "shards")
    path = tmp_path / "shards" / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ShardError, match=r"model-00003-of-00004\.safetensors cannot be read as safetensors"):
        ShardStore(tmp_path / "shards").read_unit(2)


def test_writing_refuses_another_unit(plain: Path, tmp_path: Path) -> None:
    store = ShardStore(plain)
    block = store.read_unit(1)
    with pytest.raises(ShardError, match="head has parameters"):
        write_unit(tmp_path, store.spec, 3, block)
    with pytest.raises(ShardError, match=r"mlp\.up\.weight is \[1, 32\], not \[48, 32\]"):
        write_unit(tmp_path, store.spec, 1, {**block, "mlp.up.weight": block["mlp.up.weight"][:1]})
    assert not (tmp_path / unit_file(store.spec, 1)).exists()


def test_files_are_for_all_to_read(plain: Path, tmp_path: Path) -> None:
    store = ShardStore(plain)
    path = write_unit(tmp_path, store.spec, 1, store.read_unit(1))
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model-00002-of-00004.safetensors", "plain", "usual"]


def test_the_tokenizer_goes_along(plain: Path, tmp_path: Path) -> None:
    (plain / "tokenizer.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(plain, tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]
    copy_generation_config(plain, tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["generation_config.json", "tokenizer.json"]


def test_a_folder_that_cannot_be_written_is_named(plain: Path, tmp_path: Path) -> None:
    store = ShardStore(plain)
    with pytest.raises(ShardError, match=r"gone/model-00002-of-00004\.safetensors cannot be written: .*No such file"):
        write_unit(tmp_path / "gone", store.spec, 1, store.read_unit(1))
