"""What frames a document, what a conversation becomes, and tokens that the model did not know."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import psutil
import pytest
import torch
from farspan.modules.spec import ModelSpec
from farspan.modules.vocabulary import grow_rows
from farspan.runtime.data.mixture import TaskMixture
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.preprocess import main as preprocess
from farspan.runtime.data.task_spec import DataError, TaskSpec
from farspan.runtime.data.tokenizer import Vocabulary, unescape
from farspan.runtime.flags.config import Config, ConfigError
from farspan.runtime.setup.prepare import open_vocabulary
from launch import RESUMABLE, Run, read_metrics
from safetensors.torch import load_file
from tiny import make_model, make_task, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

Flags = Callable[..., dict[str, Any]]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make(folder: Path, post: str = "", chat: str = "") -> str:
    """A tokenizer of words; `post` as its template for one text, e.g. "<s> $A </s>"."""
    words = ["<unk>", "<s>", "</s>", "hello", "you", "there", "<user>", "<assistant>", "<end>", "<system>", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(post, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = chat
    fast.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("post", "bos", "eos", "want"),
    [
        ("", "auto", "auto", ([], [])),
        ("", "yes", "yes", ([1], [2])),
        ("<s> $A", "auto", "auto", ([1], [])),
        ("<s> $A </s>", "auto", "auto", ([1], [2])),
        ("<s> $A </s>", "no", "auto", ([], [2])),
        ("<s> $A", "no", "yes", ([], [2])),
    ],
)
def test_what_frames_a_document(tmp_path: Path, post: str, bos: str, eos: str, want: tuple[list, list]) -> None:
    vocabulary = Vocabulary(Config(tokenizer_name=make(tmp_path, post), bos=bos, eos=eos))
    begin, end = want
    tokens = vocabulary.recipe(TaskSpec("a", text="text"))([b'{"text": "hello you"}', b'{"text": "there"}']).tokens
    assert tokens.tolist() == [*begin, 3, 4, *end, *begin, 5, *end]
    if (bos, eos) == ("auto", "auto"):  # then it is what the tokenizer makes of a text itself
        texts = ["\nhello you", "\nthere"]
        own = AutoTokenizer.from_pretrained(tmp_path)
        assert tokens.tolist() == [token for text in texts for token in own(text).input_ids]


def test_a_template_ends_with_a_token_to_be_learned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """--eos auto puts the tokenizer's end token after each template, also where it puts none itself; and says so."""
    caplog.set_level(logging.INFO)
    text = TaskSpec("a", text="q")
    pair = TaskSpec("b.jsonl", template="{q} {a}", loss_on="completion")
    row = [b'{"q": "hello", "a": "you"}']
    ended = Vocabulary(Config(tokenizer_name=make(tmp_path, "<s> $A")))
    block = ended.recipe(pair)(row)
    assert block.targets is not None
    assert (block.tokens.tolist(), block.targets.tolist()) == ([1, 3, 4, 2], [False, False, True, True])
    assert ended.recipe(text)(row).tokens.tolist() == [1, 3]
    assert ended.recipe(TaskSpec("b.jsonl", template="{a}"))(row).tokens.tolist() == [1, 4, 2]
    assert caplog.text.count("b.jsonl: each document ends with </s>, to be learned too") == 1
    caplog.clear()
    for eos, post, end in (("no", "", []), ("yes", "", [2]), ("auto", "$A </s>", [2])):
        told = Vocabulary(Config(tokenizer_name=make(tmp_path, post), eos=eos))
        assert told.recipe(pair)(row).tokens.tolist() == [3, 4, *end]
    assert caplog.text == ""
    make_tokenizer(tmp_path / "none")
    assert len(Vocabulary(Config(tokenizer_name=str(tmp_path / "none"))).recipe(pair)(row).tokens) == 2
    assert "b.jsonl: the tokenizer has no end token, and so none is learned" in caplog.text


def test_what_was_made_before_templates_had_an_end_goes_on_without(tmp_path: Path) -> None:
    """A checkpoint and a folder of tokens of that time are refused, and taken with --eos no."""
    (tmp_path / "a.jsonl").write_text('{"q": "hello", "a": "you"}\n' * 9)
    tokenizer = make(tmp_path / "tok", "<s> $A")

    def made(eos: str, path: str = "a.jsonl") -> TaskMixture:
        form = {} if path == "tokens" else {"template": "{q} {a}", "loss_on": "completion"}
        (tmp_path / "tasks.json").write_text(json.dumps([{"path": str(tmp_path / path), **form}]))
        tasks, cache = str(tmp_path / "tasks.json"), str(tmp_path / "cache")
        config = Config(tokenizer_name=tokenizer, task_config=tasks, data_cache=cache, seq_length=8, eos=eos)
        return open_tasks(config, Vocabulary(config))

    old, new = made("no"), made("auto")  # --eos auto made then what no makes now
    assert old.draw(1).tokens.tolist() == [[1, 3, 4] * 2 + [1, 3]]
    assert new.draw(1).tokens.tolist() == [[1, 3, 4, 2] * 2]
    with pytest.raises(DataError, match=r"a\.jsonl: its documents had no end token .*: go on with --eos no$"):
        made("auto").load_state(old.state())
    made("no").load_state(old.state())
    made("auto").load_state(new.state())
    with pytest.raises(DataError, match=r"a\.jsonl: its text, .* end token \(--eos\) .* is not what it was"):
        made("no").load_state(new.state())
    flags = ["--task-config", str(tmp_path / "tasks.json"), "--tokenizer-name", tokenizer, "--eos", "no"]
    assert preprocess([*flags, "--output", str(tmp_path / "tokens")]) == 0
    with pytest.raises(DataError, match=r"tokenised with --eos \[\], and this run says --eos \[2\]: say the same"):
        made("auto", "tokens")
    made("no", "tokens")


def test_a_token_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path)
    with pytest.raises(ConfigError, match=r"--eos yes, but the tokenizer .* has no eos token"):
        Vocabulary(Config(tokenizer_name=str(tmp_path), eos="yes"))


def test_a_tokenizer_with_holes_in_its_ids(tmp_path: Path) -> None:

    def holed(**words: int) -> None:
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **words}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)

    holed(hello=70)
    vocabulary = Vocabulary(Config(tokenizer_name=str(tmp_path)))
    assert (vocabulary.known, vocabulary.size) == (71, 71)
    model = make_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="has 71 tokens, more than the model's vocabulary of 64"):
        open_vocabulary(Config(model_name=str(model), tokenizer_name=str(tmp_path)), ModelSpec.from_folder(model))
    (tmp_path / "tokens.json").write_text('{"tokens": ["<a>", "<b>"]}')
    told = Config(tokenizer_name=str(tmp_path), special_tokens=str(tmp_path / "tokens.json"))
    assert Vocabulary(told).size == 71
    holed(hello=3)
    with pytest.raises(ConfigError, match=r"tokens\.json: .* gives new tokens the ids of others"):
        Vocabulary(told)


def test_separators_may_be_escaped() -> None:
    assert [unescape(t) for t in (r"\n", r"\n\n", r"a\tb", r"\\n", "")] == ["\n", "\n\n", "a\tb", r"\n", ""]


def test_a_conversation_is_rendered_by_the_template(tmp_path: Path) -> None:
    """Only what the assistant says, and the end that it must say too, is a target."""
    vocabulary = Vocabulary(Config(tokenizer_name=make(tmp_path, "<s> $A", CHAT)))
    spec = TaskSpec("a", messages="chat", loss_on="completion")
    roles = [("user", "hello"), ("assistant", "you there"), ("user", "you"), ("assistant", "hello")]
    row = json.dumps({"chat": [{"role": r, "content": c} for r, c in roles]}).encode()
    bad = [b'{"chat": []}', b'{"chat": "hello"}', b'{"chat": [{"role": "user"}]}']
    block = vocabulary.recipe(spec)([bad[0], row, *bad[1:]])
    assert sorted(block.faults) == [0, 2, 3]
    tokens, targets = block.tokens, block.targets
    assert targets is not None
    assert tokens.tolist() == [6, 3, 8, 7, 4, 5, 8, 6, 4, 8, 7, 3, 8]
    assert tokens[targets].tolist() == [4, 5, 8, 3, 8]
    assert vocabulary.recipe(TaskSpec("a", messages="chat"))([row]).targets is None
    plain = Vocabulary(Config(tokenizer_name=make(tmp_path / "plain")))
    with pytest.raises(DataError, match=r"messages need a chat template, and .*: --chat-template chatml, .* or a file"):
        plain.recipe(spec)


def test_a_conversation_that_the_assistant_begins(tmp_path: Path) -> None:
    """Role and default system prompt before its words would be targets."""
    system = "{% if messages[0].role != 'system' %}<system> you {% endif %}"
    vocabulary = Vocabulary(Config(tokenizer_name=make(tmp_path, "", system + CHAT)))
    roles = ["assistant", "user", "assistant"]
    rows = [json.dumps({"m": [{"role": r, "content": "hello"} for r in said]}).encode() for said in (roles, roles[1:])]
    block = vocabulary.recipe(TaskSpec("a", messages="m", loss_on="completion"))(rows)
    assert "the assistant speaks first" in block.faults.pop(0)
    assert not block.faults
    assert block.targets is not None
    assert block.tokens.tolist() == [9, 4, 6, 3, 8, 7, 3, 8]
    assert block.tokens[block.targets].tolist() == [3, 8]
    assert not vocabulary.recipe(TaskSpec("a", messages="m"))(rows).faults


def test_spaces_of_a_completion_are_targets(tmp_path: Path) -> None:
    """Also with a tokenizer that cuts them off the characters of its tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    vocabulary = Vocabulary(Config(tokenizer_name=str(tmp_path)))
    recipe = vocabulary.recipe(TaskSpec("a", template="{q} {a}", loss_on="completion"))
    for answer in ("ok  ", "  ok", " ", "\n \n", "o  k"):
        block = recipe([json.dumps({"q": "what ", "a": answer}).encode()])
        assert block.targets is not None
        assert block.targets.tolist() == [False] * len("\nwhat  ") + [True] * len(answer), answer


def test_a_template_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    looks = "{{ messages|length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    vocabulary = Vocabulary(Config(tokenizer_name=make(tmp_path, "", looks)))
    row = json.dumps({"m": [{"role": r, "content": "hello"} for r in ("user", "assistant", "user")]}).encode()
    faults = vocabulary.recipe(TaskSpec("a", messages="m", loss_on="completion"))([row]).faults
    assert "does not render turn by turn" in faults[0]


def test_what_makes_the_tokens_may_not_change_on_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of all that makes tokens and their order, a run that goes on is told by name what has changed."""
    (tmp_path / "a.jsonl").write_text('{"m": [{"role": "user", "content": "hello"}], "t": "you", "u": "me"}\n' * 9)
    make(tmp_path / "tok", "<s> $A", CHAT)
    make(tmp_path / "other", "<s> $A", CHAT + " ")
    make(tmp_path / "longer", "<s> $A </s>", CHAT)
    for name, tokens in (("ab", ["<a>", "<b>"]), ("ba", ["<b>", "<a>"])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokens": tokens}))

    def made(tok: str = "tok", task: dict[str, str] | None = None, **flags: Any) -> TaskMixture:  # noqa: ANN401
        (tmp_path / "tasks.json").write_text(
            json.dumps([{"path": str(tmp_path / "a.jsonl"), **(task or {"text": "t"})}])
        )
        config = Config(
            tokenizer_name=str(tmp_path / tok), task_config=str(tmp_path / "tasks.json"),
            data_cache=str(tmp_path / "cache"), **{"seq_length": 8, **flags},
        )  # fmt: skip
        return open_tasks(config, Vocabulary(config))

    def goes_on(state: dict[str, Any], **changes: Any) -> TaskMixture:  # noqa: ANN401
        going = made(**changes)
        going.load_state(json.loads(json.dumps(state)))
        return going

    state = made().state()
    assert not goes_on(state).resized
    assert caplog.text == ""
    for changes, reason in (
        ({"seed": 2}, "--seed is 2 and was 1 when the checkpoint was saved"),
        ({"document_separator": " "}, r"--document-separator is ' ' and was '\\n'"),
        ({"bos": "no"}, r"--bos is \[\] and was \[1\]"),
        ({"eos": "yes"}, r"--eos is \[2\] and was \[\]"),
        ({"tok": "longer"}, "--tokenizer-name is another tokenizer than the one when"),
        (
            {"special_tokens": str(tmp_path / "ab.json")},
            r"\(or --chat-template\) adds other tokens, or in another order",
        ),
        ({"task": {"template": "{t}"}}, r"a\.jsonl: its text, template"),
        ({"task": {"text": "u"}}, r"a\.jsonl: its text, template"),
        ({"task": {"messages": "m"}}, r"a\.jsonl: its text, template"),
    ):
        with pytest.raises(DataError, match=reason):
            goes_on(state, **changes)
    added = made(special_tokens=str(tmp_path / "ab.json")).state()
    with pytest.raises(DataError, match=r"\(or --chat-template\) adds other tokens, or in another order"):
        goes_on(added, special_tokens=str(tmp_path / "ba.json"))
    chat = made(task={"messages": "m"}).state()
    goes_on(chat, task={"messages": "m"}, document_separator=" ")  # frames no conversation
    with pytest.raises(DataError, match=r"end token \(--eos\) or chat template is not what it was"):
        goes_on(chat, tok="other", task={"messages": "m"})
    for changes, line in (
        ({"seq_length": 16}, "--seq-length is 16 and was 8 when the checkpoint was saved"),
        ({"rows": "padded"}, "--rows is 'padded' and was 'packed'"),
    ):
        assert goes_on(state, **changes).resized
        assert line in caplog.text
    for task in state["tasks"].values():
        del task["made"]
    del state["made"]
    goes_on(state, seed=2)
    assert "the checkpoint is of an older version" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[", "is not JSON"),
        ("[]", "must hold"),
        ('{"tokens": []}', "must hold"),
        ('{"tokens": ["<a>", 5]}', "must hold"),
        ('{"tokens": ["<a>", "<a>"]}', "names a token twice"),
    ],
)
def test_bad_special_tokens_are_named(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(ConfigError, match=f"--special-tokens .*tokens.json.*{reason}"):
        Vocabulary(Config(tokenizer_name=make(tmp_path), special_tokens=str(tmp_path / "tokens.json")))


def test_new_rows_are_the_mean() -> None:
    weight = torch.randn(5, 3)
    grown = grow_rows(weight, 7)
    assert torch.equal(grown[:5], weight)
    torch.testing.assert_close(grown[5:], weight.mean(0).expand(2, 3))
    assert grow_rows(torch.arange(3.0), 4).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(("family", "tied"), [("gptj", False), ("llama", True)])
def test_special_tokens_are_added_trained_saved_and_exported(
    flags: Flags, tmp_path: Path, family: str, tied: bool
) -> None:
    """Also on resuming, on another grid, and where rank 0 alone knows of them."""
    model = make_model(tmp_path / "model", family, tie_word_embeddings=tied, vocab_size=24)
    (tmp_path / "tokens.json").write_text('{"tokens": ["<START_Q>", "<END_Q>"]}')
    task = tmp_path / "a.jsonl"
    make_task(task)
    task.write_text(task.read_text().replace('"text": "', '"text": "<START_Q>').replace('"}', '<END_Q>"}'))
    told = flags(model_name=model, task_name=task, total_steps=4, checkpoint_steps=2)
    own = {0: {"special_tokens": tmp_path / "tokens.json"}}
    with Run(2, 1, told, by_rank=own) as run:
        run.succeed()
    folder = tmp_path / "ck" / "checkpoint_4"
    before = ModelSpec.from_folder(model).vocab
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("<START_Q>red") == [23, 4]
    assert len(tokenizer) == before + 1 == 25  # the model had room for one of them
    trained, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]  # noqa: PT018
    assert trained.config.vocab_size == 25
    new = trained.get_input_embeddings().weight[24]
    old = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
    assert len(old) == 24
    assert 1e-4 < (new - old.mean(0)).abs().max() < 0.1  # began as the mean, and was trained
    end = load_file(tmp_path / "ck" / "checkpoint_4" / "model-00001-of-00007.safetensors")
    (tmp_path / "ck" / "latest").write_text("2")
    losses = [row["loss"] for row in read_metrics(tmp_path / "ck")]
    with Run(1, 1, told, by_rank=own) as run:
        run.succeed()
    torch.testing.assert_close([row["loss"] for row in read_metrics(tmp_path / "ck")], losses, rtol=1e-5, atol=0)
    for name, tensor in load_file(folder / "model-00001-of-00007.safetensors").items():
        torch.testing.assert_close(tensor, end[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_only_targets_count_on_every_grid(flags: Flags, tmp_path: Path, model: Path, rows: str) -> None:
    """The first loss is that of Hugging Face's model on the same rows and labels. Workers, replicas and stages change
    nothing, neither do stops; and what each task gave is told."""
    pairs = tmp_path / "pairs.jsonl"
    lines = [json.loads(line)["text"] for line in make_task(tmp_path / "b.jsonl", lines=90).read_text().splitlines()]
    pairs.write_text(
        "".join(json.dumps({"q": a, "a": b}) + "\n" for a, b in zip(lines, reversed(lines), strict=True)) + "bad\n"
    )
    tasks = [
        {"path": str(pairs), "template": "{q} {a}", "loss_on": "completion", "weight": 3},
        {"path": str(tmp_path / "b.jsonl")},
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    told = flags(
        task_name=None, task_config=tmp_path / "tasks.json", rows=rows, bad_lines="skip", total_steps=8,
        checkpoint_steps=4, gradient_accumulate_step=2,
    )  # fmt: skip
    curves = []
    for stages, replicas, workers in ((1, 1, 0), (2, 2, 2)):
        here = {
            **told,
            "checkpoint_path": tmp_path / f"{stages}{replicas}",
            "data_workers": workers,
            "batch_size": 4 // replicas,
        }
        with Run(stages, replicas, here) as run:
            run.succeed()
        curves.append(read_metrics(here["checkpoint_path"]))
        assert "skipping" in run.err(0) or rows == "padded"
        # Stopped halfway, and on with the other number of workers.
        (here["checkpoint_path"] / "latest").write_text("4")
        with Run(stages, replicas, {**here, "data_workers": 2 - workers}) as run:
            run.succeed()
        again = read_metrics(here["checkpoint_path"])
        assert [row["loss"] for row in again] == [row["loss"] for row in curves[-1]]
        assert [row["tasks"] for row in again] == [row["tasks"] for row in curves[-1]]
    assert [row["tasks"] for row in curves[0]] == [row["tasks"] for row in curves[1]]
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close([r[name] for r in curves[1]], [r[name] for r in curves[0]], rtol=1e-5, atol=0)
    given = curves[0][-1]["tasks"]
    assert sum(task["sequences"] for task in given.values()) == 8 * 4
    config = Config(
        model_name=str(model), task_config=told["task_config"], rows=rows, bad_lines="skip", seq_length=16,
        data_cache=str(tmp_path / "cache"),
    )  # fmt: skip
    drawn = open_tasks(config, Vocabulary(config)).draw(8)
    tokens, targets = torch.from_numpy(drawn.tokens), torch.from_numpy(drawn.targets)
    loss = AutoModelForCausalLM.from_pretrained(model)(tokens, labels=tokens.masked_fill(~targets, -100)).loss
    assert curves[0][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("number", [SIGKILL, SIGTERM])
def test_no_worker_is_left_behind(flags: Flags, number: int) -> None:
    """Not when rank 0 is killed, and not when a launcher's SIGTERM reaches the workers too: then the run ends well."""
    with Run(1, 1, flags(total_steps=100_000, lr=1e-3, data_workers=2)) as run:
        run.wait_for_step(5)
        rank = psutil.Process(run.processes[0].pid)
        workers = [p for p in rank.children() if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
        for process in (*workers, rank) if number == SIGTERM else (rank,):
            process.send_signal(number)
        if number == SIGTERM:
            run.succeed(30, status=RESUMABLE)
        deadline = time.monotonic() + 20
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers):
            assert time.monotonic() < deadline, "worker processes outlive the run"
            time.sleep(0.05)


def test_how_a_model_generates_is_not_its_tokenizers_to_say(flags: Flags, tmp_path: Path, model: Path) -> None:
    make_tokenizer(tmp_path / "tok")
    (tmp_path / "tok" / "generation_config.json").write_text('{"eos_token_id": 7}')
    with Run(1, 1, flags(tokenizer_name=tmp_path / "tok", total_steps=1)) as run:
        run.succeed()
    kept = tmp_path / "ck" / "checkpoint_1" / "generation_config.json"
    assert kept.read_bytes() == (model / "generation_config.json").read_bytes()
