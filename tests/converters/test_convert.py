"""The converters as they are called: from HF and back, bit for bit, and one line for what cannot be done."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.converters import hf
from farspan.converters.command import main_from, main_to
from farspan.converters.hf import ConvertError, export_hf, import_hf
from farspan.modules.shards import ShardError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

REPO = Path(__file__).resolve().parents[2]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "vocab_size": 31}),
    "gptneox": ("gpt_neox", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "llama": ("llama", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
}


def make(family: str, **changes: Any) -> PreTrainedModel:  # noqa: ANN401
    model_type, shape = SHAPES[family]
    common = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 1}
    if family != "gptj":
        common["intermediate_size"] = 24
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **shape, **changes}))


def assert_same_weights(folder: Path, model: PreTrainedModel) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, tied: bool, dtype: torch.dtype
) -> None:
    model = make(family, tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "some-model")
    (tmp_path / "some-model" / "tokenizer.json").write_text("{}")
    shards, back = tmp_path / "shards", tmp_path / "back"
    assert main_from(family, ["--model-name", str(tmp_path / "some-model"), "--save-dir", str(shards)]) == 0
    assert capsys.readouterr().out.strip() == str(shards / "some-model")
    assert_same_weights(shards / "some-model", model)

    # As a training checkpoint would be: optimizer state and notes beside the layers.
    (shards / "some-model" / "optimizer").mkdir()
    save_file({"moment": torch.ones(3)}, shards / "some-model" / "optimizer" / "state-00004-of-00004.safetensors")
    (shards / "some-model" / "trainer.json").write_text("{}")
    flags = ["--n-stages", "2", "--n-layer-per-stage", "1"]
    assert main_to(family, ["--ckpt-path", str(shards / "some-model"), "--save-path", str(back), *flags]) == 0
    assert_same_weights(back, model)
    allowed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in back.iterdir()} == allowed
    original, returned = load_file(tmp_path / "some-model" / "model.safetensors"), load_file(back / "model.safetensors")
    assert original.keys() == returned.keys()
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_large_models_come_back_in_several_files(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path / "hf")
    export_hf("llama", tmp_path / "hf", tmp_path / "back", max_file_bytes=4000)
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "back" / file).stat().st_size < 6000 for file in files)
    assert_same_weights(tmp_path / "back", model)


@pytest.mark.parametrize(("flag", "dtype"), [("--fp16", torch.float16), ("--bf16", torch.bfloat16)])
def test_export_in_half_precision(tmp_path: Path, flag: str, dtype: torch.dtype) -> None:
    model = make("gptneox")
    model.save_pretrained(tmp_path / "hf")
    arguments = ["--ckpt-path", str(tmp_path / "hf"), "--save-path", str(tmp_path / "back"), flag]
    assert main_to("gptneox", arguments) == 0
    assert_same_weights(tmp_path / "back", model.to(dtype))


def test_fp16_does_not_overflow_in_silence(tmp_path: Path) -> None:
    model = make("llama")
    torch.nn.init.constant_(model.lm_head.weight, 1e5)
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConvertError, match=r"lm_head\.weight has values beyond fp16"):
        export_hf("llama", tmp_path / "hf", tmp_path / "back", torch.float16)
    assert not list(tmp_path.glob("*back*"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("files", [1, 2])
def test_pickled_weights_of_old_checkpoints(tmp_path: Path, files: int, legacy: bool) -> None:
    model = make("gptj")
    state = dict(model.state_dict())
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # a mask that old releases saved
    source = tmp_path / "old"
    source.mkdir()
    model.config.save_pretrained(source)
    names = list(state)
    parts = [names[i::files] for i in range(files)]
    paths = [f"pytorch_model-{i}.bin" for i in range(files)] if files > 1 else ["pytorch_model.bin"]
    for path, part in zip(paths, parts, strict=True):
        held = {name: state[name] for name in part}
        torch.save(held, source / path, _use_new_zipfile_serialization=not legacy)
    if files > 1:
        index = {"weight_map": {name: path for path, part in zip(paths, parts, strict=True) for name in part}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_weights(import_hf("gptj", str(source), tmp_path / "out"), model)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil-was-here",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("gptj").config.save_pretrained("old")
    torch.save({"transformer.wte.weight": Evil()}, "old/pytorch_model.bin")
    with pytest.raises(ShardError, match="cannot be read as tensors"):
        import_hf("gptj", "old", tmp_path / "out")
    assert not Path("evil-was-here").exists()


def test_a_finished_conversion_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("llama").save_pretrained(tmp_path / "hf")
    target = import_hf("llama", str(tmp_path / "hf"), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert import_hf("llama", str(tmp_path / "hf"), tmp_path / "out") == target
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert "is a finished conversion already" in caplog.text
    next(target.glob("model-00002-*")).unlink()
    with pytest.raises(ConvertError, match="is there already, and it is not a finished conversion"):
        import_hf("llama", str(tmp_path / "hf"), tmp_path / "out")


def test_an_interrupted_conversion_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama").save_pretrained(tmp_path / "hf")
    write = hf.write_unit

    def disk_full(folder: Path, spec: Any, unit: int, tensors: Any) -> Path:  # noqa: ANN401
        if unit == 2:
            raise OSError(28, "No space left on device")
        return write(folder, spec, unit, tensors)

    monkeypatch.setattr(hf, "write_unit", disk_full)
    arguments = ["--model-name", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out")]
    assert main_from("llama", arguments) == 1
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out" / ".hf.partial").mkdir()  # what a kill leaves behind
    assert main_from("llama", arguments) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 100), "cannot be read as safetensors"),
        (lambda folder: None, "is a llama model, not gptj: use the llama script"),
    ],
)
@pytest.mark.parametrize("direction", ["from", "to"])
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], direction: str, spoil: Callable[[Path], object], says: str
) -> None:
    source = tmp_path / "hf"
    make("llama").save_pretrained(source)
    capsys.readouterr()
    spoil(source)
    if direction == "from":
        status = main_from("gptj", ["--model-name", str(source), "--save-dir", str(tmp_path / "out")])
    else:
        status = main_to("gptj", ["--ckpt-path", str(source), "--save-path", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert status == 1
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", ["no/such/folder", "./gone", "farspan-tests/no-such-model"])
def test_a_model_that_is_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConvertError, match=r"is not a folder|is no folder here"):
        import_hf("gptj", name, tmp_path)


def test_export_refuses_a_filled_folder(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "hf")
    with pytest.raises(ConvertError, match="is there already"):
        export_hf("llama", tmp_path / "hf", tmp_path / "hf")


@pytest.mark.parametrize("family", SHAPES)
def test_scripts_run_as_scripts(tmp_path: Path, family: str) -> None:
    """From anywhere, with nothing but the package installed; no traceback for a model that is not there."""
    script = REPO / "converters" / f"convert_to_hf_{family}.py"
    arguments = ["--ckpt-path", "gone", "--save-path", "out"]
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: gone is not a folder")
    assert done.stderr.count("\n") == 1
    helped = subprocess.run(
        [sys.executable, REPO / "converters" / f"convert_from_hf_{family}.py", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert helped.returncode == 0
    assert "--save-dir" in helped.stdout
