"""Chat templates in the manner of the published families, in our own words: their formats and their habits."""


def chatml(answer="{{ m.content + '<|im_end|>' }}", before=""):
    return (
        before
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        + "{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


GENERATION_MARKS = chatml("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}")

# A system prompt of its own, forced on conversations that have none.
SMOLLM_2 = chatml(
    before="""\
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}"""
)

# Two modes, which the system prompt switches; the date; marks around the header as well; no calls.
SMOLLM_3 = """\
{%- set ns = namespace(mode='/think', rules='') -%}
{%- if messages[0].role == 'system' -%}
  {%- set ns.mode = '/no_think' if '/no_think' in messages[0].content else '/think' -%}
  {%- set ns.rules = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() -%}
{%- endif -%}
{{- '<|im_start|>system\\nToday: ' + strftime_now('%d %B %Y') + '\\nMode: ' + ns.mode + '\\n\\n' + ns.rules -}}
{%- for tool in tools or [] -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- set opening = '<|im_start|>assistant\\n' + ('' if ns.mode == '/think' else '<think>\\n\\n</think>\\n') -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}{{- opening + m.content.lstrip('\\n') + '<|im_end|>\\n' -}}{%- endgeneration -%}
  {%- elif m.role != 'system' -%}
    {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- opening -}}{%- endif -%}"""

LLAMA_2 = """\
{%- if messages[0].role == 'system' -%}
  {%- set system, chat = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] -%}
{%- else -%}
  {%- set system, chat = '', messages -%}
{%- endif -%}
{%- for m in chat -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('after the system prompt the roles must alternate user/assistant') -}}
  {%- endif -%}
  {%- if m.role == 'user' -%}
    {{- bos_token + '[INST] ' + ((system if loop.first else '') + m.content).strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + m.content.strip() + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}"""

LLAMA_3 = """\
{%- for m in messages -%}
  {{- (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
  {{- m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

# A date line; tools in the first user message; one call an answer, whose text is not written.
LLAMA_3_1 = """\
{%- set ns = namespace(tools=tools) -%}
{%- macro header(role) -%}{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}{%- endmacro -%}
{%- set system = messages[0].role == 'system' -%}
{{- bos_token + header('system') + 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' -}}
{{- (messages[0].content | trim if system else '') + '<|eot_id|>' -}}
{%- for m in (messages[1:] if system else messages) -%}
  {%- if m.role == 'tool' -%}
    {{- header('ipython') + m.content | tojson + '<|eot_id|>' -}}
  {%- elif 'tool_calls' in m -%}
    {%- if m.tool_calls | length != 1 -%}{{- raise_exception('only single tool-calls at once') -}}{%- endif -%}
    {%- set f = m.tool_calls[0].function -%}
    {{- header('assistant') + '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}<|eot_id|>' -}}
  {%- else -%}
    {{- header(m.role) -}}
    {%- if ns.tools and m.role == 'user' -%}
      {{- 'Given the following functions, respond with JSON.\\n\\n' -}}
      {%- for tool in ns.tools -%}{{- tool | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}
      {%- set ns.tools = none -%}
    {%- endif -%}
    {{- m.content | trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header('assistant') -}}{%- endif -%}"""

MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}
    {%- set ns.system = m.content + '\\n\\n' -%}
  {%- elif m.role == 'user' -%}
    {{- '[INST] ' + ns.system + m.content + ' [/INST]' -}}{%- set ns.system = '' -%}
  {%- elif m.role == 'assistant' -%}
    {{- m.content + eos_token -}}
  {%- else -%}
    {{- raise_exception('only user, system and assistant are supported') -}}
  {%- endif -%}
{%- endfor -%}"""

# The system prompt and the tools move to the last question; a call needs an id of nine characters.
MISTRAL_3 = """\
{%- set system = messages[0].role == 'system' -%}
{%- set chat = messages[1:] if system else messages -%}
{%- set asked = chat | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in chat -%}
  {%- if m.role == 'user' -%}
    {%- if tools and m == asked[-1] -%}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
    {{- '[INST] ' + (messages[0].content + '\\n\\n' if system and loop.last else '') + m.content + '[/INST]' -}}
  {%- elif m.tool_calls is defined -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in m.tool_calls -%}
      {%- if not call.id is defined or call.id | length != 9 -%}{{- raise_exception('IDs of length 9!') -}}{%- endif -%}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif m.role == 'assistant' -%}
    {{- ' ' + m.content | trim + eos_token -}}
  {%- else -%}
    {{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' -}}
  {%- endif -%}
{%- endfor -%}"""


def gemma(system):
    return (
        "{{- bos_token -}}"
        + system
        + """
{%- for m in chat -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
  {{- (prefix if loop.first else '') + m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""
    )


GEMMA_2 = gemma("""
{%- set chat, prefix = messages, '' -%}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}""")

GEMMA_3 = gemma("""
{%- set chat, prefix = messages, '' -%}
{%- if messages[0].role == 'system' -%}
  {%- set chat, prefix = messages[1:], messages[0].content + '\\n\\n' -%}
{%- endif -%}""")

# The last answer is ended once more.
PHI_3 = """\
{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

PHI_4 = """\
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}"""

ZEPHYR = """\
{%- for m in messages -%}
  {{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""
