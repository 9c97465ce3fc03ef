"""The subjects' answers to questions, for people to rate."""

from collections.abc import Sequence

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.conversations import Conversation
from lorakit.data.rows import RowError
from lorakit.errors import UserError
from lorakit.evaluate.generate import decode_answer
from lorakit.evaluate.inference import EvalModel, ModelLoader, generate_answers, loading_order
from lorakit.evaluate.models import EvalModelSpec, ModelSet
from lorakit.evaluate.rating.questions import Question
from lorakit.evaluate.rendering import RenderedRows, load_tokenizers, prompt_template
from lorakit.evaluate.results import EvalSettings
from lorakit.model.tokenizer import stop_token_ids
from lorakit.progress import Progress


def answer_questions(
    model_set: ModelSet, questions: Sequence[Question], settings: EvalSettings, progress: Progress
) -> dict[str, list[str]]:
    """Each subject's greedy answer to each question, asked with its own chat template and its run's system prompt.

    Raises:
        UserError: a chat template does not take a question, or a model cannot be had.
    """
    device, loaded = model_set.machine.device, ModelLoader(model_set.machine.device)
    tokenizers, found = load_tokenizers(model_set, progress), {}
    for at in loading_order(model_set.specs):
        spec = model_set.specs[at]
        if not tokenizers[at].chat_template:
            raise UserError(
                f"--questions: {spec.given}: has no chat template to ask with. Leave it out, or give a run whose "
                "recipe names one beside it."
            )
        template = prompt_template(spec, tokenizers[at], model_set)
        rendered = RenderedRows(tokenizers[at], _stop_ids(spec, template), [], [])
        eval_model = EvalModel(spec, rendered, spec.identity(device), loaded, settings.cache, progress)
        prompts = [_prompt(question, template) for question in questions]
        for question in questions:
            for what, field in template.controls.spelled(Conversation(question.messages)):
                progress.warn(f"{spec.name}: question {question.id}, {field}: {what}")
        said = generate_answers(eval_model, prompts, settings.max_new_tokens)
        found[spec.name] = [decode_answer(answer.tokens, rendered.tokenizer) for answer in said]
    return {spec.name: found[spec.name] for spec in model_set.specs}


def _stop_ids(spec: EvalModelSpec, template: ChatTemplate) -> tuple[int, ...]:
    own = spec.prepared.stop_ids if spec.prepared else stop_token_ids(spec.base, template.tokenizer)
    return tuple(sorted({*own, *template.tokenizer.convert_tokens_to_ids(sorted(template.stops))}))


def _prompt(question: Question, template: ChatTemplate) -> list[int]:
    messages = question.messages
    if template.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    spelled = [mark for mark in sorted(template.marks) for message in messages if mark in message["content"]]
    if spelled:
        raise UserError(
            f"--questions: question {question.id} contains the text {spelled[0]!r}, which the model does not read as "
            "words. Give the question without the chat template's marks."
        )
    try:
        text = template.write([template.adapt(message) for message in messages], ask=True)
    except RowError as error:
        raise UserError(f"--questions: question {question.id}: {error}.") from error
    return list(template.tokenizer(text, add_special_tokens=False)["input_ids"])
