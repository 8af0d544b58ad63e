"""What quickstart.sh needs around the training: `prepare` makes corpus, tokenizer and model, `report` reads the result.

Nothing is downloaded: the text is the documentation of Python's own standard library, the model is small and random.
"""

import argparse
import ast
import hashlib
import json
import math
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
SHORTEST_TEXT = 40  # characters
HELD_OUT_ONE_IN = 20  # modules
VOCAB_SIZE = 4096
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
EVAL_WINDOWS, EVAL_TOKENS = 64, 256
PROMPT = "Return a new list of"


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def comment_blocks(source: str) -> Iterator[str]:
    """Comments on lines of their own; those on neighbouring lines are one text."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        if line.lstrip().startswith("#"):
            block.append(line.lstrip().lstrip("#").removeprefix(" ").rstrip())
        elif block:
            yield "\n".join(block).strip()
            block = []


def unwrap(text: str) -> str:
    """Prose as one line a paragraph; lines that are indented, lists and examples among them, stay as they are."""
    return re.sub(r"(?<=\S)\n(?=[^\s>*-])", " ", text)


def read_standard_library() -> tuple[list[str], list[str], list[str]]:
    """Documentation strings, comments, and the held-out text of both: whole modules, none of which the others see."""
    docs: set[str] = set()
    comments: set[str] = set()
    held_out: set[str] = set()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(name.parts):
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
            texts = (list(docstrings(source)), list(comment_blocks(source)))
        except (SyntaxError, UnicodeDecodeError):
            continue
        is_held_out = int.from_bytes(sha(name.as_posix())[:4]) % HELD_OUT_ONE_IN == 0
        for kind, found in zip((docs, comments), texts, strict=True):
            (held_out if is_held_out else kind).update(unwrap(text) for text in found if len(text) >= SHORTEST_TEXT)
    # In the order of their hashes: as good as shuffled, and the same every time.
    return (
        sorted(docs - held_out, key=sha),
        sorted(comments - docs - held_out, key=sha),
        sorted(held_out, key=sha),
    )


def write_jsonl(path: Path, texts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def prepare(folder: Path) -> None:
    done = folder / "prepared.json"
    if done.exists():
        print(f"corpus, tokenizer and model are there: {done.read_text().strip()}")
        return
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of the library's own sources
        docs, comments, held_out = read_standard_library()
    if len(docs) + len(comments) < 1000:
        raise SystemExit(f"{sysconfig.get_path('stdlib')} has hardly any sources: take another Python (PYTHON=…)")
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, texts in (("docstrings", docs), ("source", comments), ("heldout", held_out)):
        write_jsonl(corpus / f"{name}.jsonl", texts)

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*docs, *comments],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT, PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=PADDING
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            intermediate_size=1024,
            max_position_embeddings=512,
            initializer_range=0.05,  # at this width the usual 0.02 costs a short run a fifth of its steps
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    checkpoint = folder / "hf-gptneox"
    tokenizer.save_pretrained(checkpoint)
    model.save_pretrained(checkpoint)
    facts = {
        "docstrings": len(docs),
        "source comments": len(comments),
        "held out": len(held_out),
        "characters": sum(map(len, docs + comments)),
        "vocabulary": len(tokenizer),
        "parameters": model.num_parameters(),
    }
    done.write_text(json.dumps(facts) + "\n")  # last: without it, everything is made again
    print(f"made corpus, tokenizer and model: {json.dumps(facts)}")


def report(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    start = folder / "hf-gptneox"
    checkpoints = folder / "checkpoints"
    trained = checkpoints / f"checkpoint_{(checkpoints / 'latest').read_text().strip()}"
    tokenizer = AutoTokenizer.from_pretrained(start)
    with (folder / "corpus" / "heldout.jsonl").open(encoding="utf-8") as lines:
        text = "".join("\n" + json.loads(line)["text"] for line in lines)  # joined as in training
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: EVAL_WINDOWS * EVAL_TOKENS])
    windows = tokens[: len(tokens) // EVAL_TOKENS * EVAL_TOKENS].view(-1, EVAL_TOKENS)

    @torch.inference_mode()
    def perplexity(model: PreTrainedModel) -> float:
        losses = [model(input_ids=rows, labels=rows).loss for rows in windows.split(8)]
        return math.exp(torch.stack(losses).mean())

    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (start, trained)]
    before, after = map(perplexity, models)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    sample = models[-1].generate(  # a model this young would go round in a circle: no three tokens twice
        **prompt, max_new_tokens=40, do_sample=False, no_repeat_ngram_size=3, pad_token_id=tokenizer.pad_token_id
    )
    updates = [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]
    first, last = updates[0], updates[-1]

    steps = f"steps {first['step']} to {last['step']}"
    print(f"training loss        {first['loss']:.3f} -> {last['loss']:.3f}  (first and last: {steps})")
    print(f"held-out perplexity  {before:.1f} -> {after:.1f}  ({windows.numel()} tokens of modules it never saw)")
    print(f"greedy sample        {tokenizer.decode(sample[0], skip_special_tokens=True)!r}")
    print(f"checkpoint           {trained}  (AutoModelForCausalLM.from_pretrained loads it)")
    print(f"metrics              {checkpoints / 'metrics.jsonl'}")
    print(f"logs of other ranks  {folder / 'logs'}")
    print(f"corpus               {folder / 'corpus'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("prepare", "report"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"prepare": prepare, "report": report}[arguments.command](arguments.folder)


if __name__ == "__main__":
    main()
