"""Rendering: what a row says -> the chat template's text, and the stretches of it that are trained."""

from lorakit.data.chat_template.controls import written_around as written_around
from lorakit.data.chat_template.render import render as render
from lorakit.data.chat_template.template import ChatTemplate as ChatTemplate
from lorakit.data.chat_template.template import NoChatTemplate as NoChatTemplate
from lorakit.data.chat_template.templated_row import RenderedText as RenderedText
from lorakit.data.chat_template.templated_row import TurnSpan as TurnSpan
