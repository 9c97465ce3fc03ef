"""Run by the Python of vLLM's environment: answers of a model and of adapters on it, as JSON in a file."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Read from standard input what to answer, and where the answers go."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given = json.load(sys.stdin)
    adapters = given.get("adapters", {})
    lora = {"enable_lora": True, "max_lora_rank": given["max_lora_rank"]} if adapters else {}
    model = LLM(given["model"], dtype="float32", enforce_eager=True, max_model_len=512, **lora)
    greedy = SamplingParams(temperature=0, max_tokens=given["max_tokens"])
    requests = {name: LoRARequest(name, at, folder) for at, (name, folder) in enumerate(adapters.items(), start=1)}
    answers = {}
    for name, request in requests.items() or {"": None}.items():
        outputs = model.chat(given["conversations"], greedy, use_tqdm=False, lora_request=request)
        answers[name] = [[one.outputs[0].text, one.outputs[0].finish_reason] for one in outputs]
    Path(given["output"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
