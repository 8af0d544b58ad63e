"""Conversations as text: by the tokenizer's chat template, or by one that --chat-template names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from ..flags.errors import ConfigError
from .recipe import Fault, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat(NamedTuple):
    """A chat template (Jinja, as transformers takes it), the tokens that it needs, and which of them ends a turn.

    Where `end` is empty, the tokenizer's own end token ends what the assistant says.
    """

    template: str
    tokens: tuple[str, ...] = ()
    end: str = ""


_ROLES = "{{ raise_exception('roles are system (the first alone), user and assistant') }}"
# Each renders turn by turn: a conversation's text begins with that of its first turns. After a turn of the user, what
# the generation prompt adds is how the assistant's turn begins.
NAMED = {
    "chatml": Chat(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama2": Chat(
        "{% set ns = namespace(system='') %}"
        "{% for m in messages %}"
        "{% if m.role == 'system' and loop.first %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'user' %}"
        "{{ bos_token }}{{ '[INST] ' + ns.system + m.content | trim + ' [/INST]' }}{% set ns.system = '' %}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
        "{% else %}" + _ROLES + "{% endif %}{% endfor %}"
    ),
    "llama3": Chat(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "alpaca": Chat(
        "{{ bos_token }}{% if messages[0].role != 'system' %}{{ 'Below is an instruction that describes a task. Write "
        "a response that appropriately completes the request.\n\n' }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'system' and loop.first %}{{ m.content + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
        "{% else %}" + _ROLES + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "vicuna": Chat(
        "{{ bos_token }}{% if messages[0].role != 'system' %}{{ 'A chat between a curious user and an artificial "
        "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions. '"
        " }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'system' and loop.first %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
        "{% else %}" + _ROLES + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "zephyr": Chat(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}


def find_chat(told: str) -> Chat:
    """What --chat-template says: a name, or a file. Raises `ConfigError`."""
    if told in NAMED:
        return NAMED[told]
    try:
        return Chat(Path(told).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "") or error
        raise ConfigError(
            f"--chat-template {told} is none of {', '.join(NAMED)}, and no file that can be read: {reason}"
        ) from error


def use_chat(told: str, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make it the tokenizer's, which has its tokens by now. Raises `ConfigError`."""
    if chat.end:
        tokenizer.eos_token = chat.end
    if told in NAMED and tokenizer.eos_token is None:
        raise ConfigError(f"--chat-template {told} ends with an end token, and the tokenizer has none: try chatml")
    tokenizer.chat_template = chat.template


class ChatRender:
    """A conversation by the tokenizer's chat template, and the spans of what the assistant says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spans: bool) -> None:
        self._tokenizer, self._spans = tokenizer, spans
        self.digest = hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()[:8]

    def __call__(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        text = self._render(messages, False)
        spans = []
        for number, message in enumerate(messages) if self._spans else []:
            if message["role"] == "assistant":
                if not number:
                    raise Fault("the assistant speaks first, and its words cannot be told from what the template adds")
                before = self._render(messages[:number], True)
                after = self._render(messages[: number + 1], False)
                if not (text.startswith(after) and after.startswith(before)):
                    raise Fault("the chat template does not render turn by turn, so completions cannot be told apart")
                spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: list[dict[str, str]], prompt: bool) -> str:
        try:
            made = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates raise what they like, to refuse an order of roles
            raise Fault(f"the chat template refuses it: {error}") from error
        return cast(str, made)  # as it is without `tokenize`
