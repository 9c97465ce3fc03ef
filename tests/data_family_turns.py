"""What the families' templates make of an answer when it is the last: the text that its labels decode to."""

import json
from collections.abc import Callable

from lorakit.data.rows import Message


def as_given(stop: str) -> Callable[[Message], str]:
    return lambda message: message["content"] + stop


def stripped(stop: str) -> Callable[[Message], str]:
    return lambda message: message["content"].strip() + stop


def _functions(message: Message) -> list[tuple[str, str]]:
    """The names of the functions that an answer calls, and their arguments as JSON."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return [(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]


def hermes(said: str, message: Message) -> str:
    for name, arguments in _functions(message):
        said += "\n" if said else ""
        said += f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    return said + "<|im_end|>"


def qwen_3(message: Message) -> str:
    thought, said = message.get("thinking", "").strip("\n"), message["content"]
    if not thought.strip() and "</think>" in said:
        thought = said.split("</think>")[0].split("<think>")[-1].strip("\n")
        said = said.split("</think>")[-1].lstrip("\n")
    if thought.isspace():
        thought = ""
    calls = hermes(said, message).removeprefix(said)
    return f"<think>\n{thought}\n</think>\n\n" + said.lstrip("\n") + calls


def llama_3_1(message: Message) -> str:
    for name, arguments in _functions(message):
        return f'{{"name": "{name}", "parameters": {arguments}}}<|eot_id|>'
    return message["content"].strip() + "<|eot_id|>"


def mistral_3(message: Message) -> str:
    ids = [call["id"] for call in message.get("tool_calls", ())]
    calls = [
        f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}, "id": "{number}"}}'
        for number, (name, arguments) in zip(ids, _functions(message), strict=True)
    ]
    return (f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else f" {message['content'].strip()}") + "</s>"


def deepseek_3(message: Message) -> str:
    calls = "".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        for name, arguments in _functions(message)
    )
    if calls:
        calls = f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>"
    return message["content"] + calls + "<｜end▁of▁sentence｜>"


def harmony(message: Message) -> str:
    thought = message.get("thinking", "")
    thought = thought if thought.strip() else ""
    for name, arguments in _functions(message):
        thought = message["content"] or thought
        analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
        return f"{analysis} to=functions.{name}<|channel|>commentary json<|message|>{arguments}<|call|>"
    analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    return f"{analysis}<|channel|>final<|message|>{message['content']}<|return|>"


def glm_4(message: Message) -> str:
    calls = ""
    for call in message.get("tool_calls", ()):
        pairs = call["function"]["arguments"].items()
        lines = "".join(f"\n{key}={json.dumps(value, ensure_ascii=False)}" for key, value in pairs)
        calls += f"\n<tool_call>{call['function']['name']}{lines}\n</tool_call>"
    return "\n" + message["content"] + calls + ("<|observation|>" if calls else "<|user|>")


def command_r(message: Message) -> str:
    calls = [f'{{"tool_name": "{name}", "parameters": {arguments}}}' for name, arguments in _functions(message)]
    action = f"\nAction: ```json\n[{', '.join(calls)}]\n```" if calls else ""
    return message["content"].strip() + action + "<|END_OF_TURN_TOKEN|>"
