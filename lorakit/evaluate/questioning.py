"""The subjects' answers to questions, for people to rate."""

from collections.abc import Sequence

from lorakit.data.conversations import Conversation
from lorakit.data.rendering import ChatTemplate
from lorakit.data.rows import RowError
from lorakit.errors import UserError
from lorakit.evaluate.asked import Asked
from lorakit.evaluate.asking import Witness, answers_of
from lorakit.evaluate.evaluation import Request
from lorakit.evaluate.generate import text_of
from lorakit.evaluate.loaded import Loaded, in_loading_order
from lorakit.evaluate.questions import Question
from lorakit.evaluate.renderings import asking_template, tokenizers_of
from lorakit.evaluate.subjects import Lineup, Subject
from lorakit.model.load import stop_token_ids
from lorakit.progress import Progress


def answers_to_questions(
    lineup: Lineup, questions: Sequence[Question], request: Request, progress: Progress
) -> dict[str, list[str]]:
    """Each subject's greedy answer to each question, asked with its own chat template and its run's system prompt.

    Raises:
        UserError: a chat template does not take a question, or a model cannot be had.
    """
    device, loaded = lineup.machine.device, Loaded(lineup.machine.device)
    tokenizers, found = tokenizers_of(lineup, progress), {}
    for at in in_loading_order(lineup.subjects):
        subject = lineup.subjects[at]
        if not tokenizers[at].chat_template:
            raise UserError(
                f"--questions: {subject.given}: has no chat template to ask with. Leave it out, or give a run whose "
                "recipe names one beside it."
            )
        template = asking_template(subject, tokenizers[at], lineup)
        asked = Asked(tokenizers[at], _stop_ids(subject, template), [], [])
        witness = Witness(subject, asked, subject.facts(device), loaded, request.cache, progress)
        prompts = [_prompt(question, template) for question in questions]
        for question in questions:
            for what, field in template.controls.spelled(Conversation(question.messages)):
                progress.warn(f"{subject.name}: question {question.id}, {field}: {what}")
        said = answers_of(witness, prompts, request.max_new_tokens)
        found[subject.name] = [text_of(answer, asked.tokenizer) for answer in said]
    return {subject.name: found[subject.name] for subject in lineup.subjects}


def _stop_ids(subject: Subject, template: ChatTemplate) -> tuple[int, ...]:
    own = subject.prepared.stop_ids if subject.prepared else stop_token_ids(subject.base, template.tokenizer)
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
        text = template.write([template.told(message) for message in messages], ask=True)
    except RowError as error:
        raise UserError(f"--questions: question {question.id}: {error}.") from error
    return list(template.tokenizer(text, add_special_tokens=False)["input_ids"])
