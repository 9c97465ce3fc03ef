"""Rendering: what a row says -> the chat template's text, and the stretches of it that are trained."""

from lorakit.data.chat_template.render import Rendered as Rendered
from lorakit.data.chat_template.render import render as render
from lorakit.data.chat_template.renderer import NoChatTemplate as NoChatTemplate
from lorakit.data.chat_template.spans import Span as Span
from lorakit.data.chat_template.template import ChatTemplate as ChatTemplate
