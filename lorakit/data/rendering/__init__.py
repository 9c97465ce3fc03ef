"""Rendering: what a row says -> the chat template's text, and the stretches of it that are trained."""

from lorakit.data.rendering.render import Rendered as Rendered
from lorakit.data.rendering.render import render as render
from lorakit.data.rendering.renderer import NoChatTemplate as NoChatTemplate
from lorakit.data.rendering.template import ChatTemplate as ChatTemplate
from lorakit.data.rendering.turns import Span as Span
