"""More chat templates in the manner of the published families: those whose answers think, or call tools."""

_SYSTEM_WITH_TOOLS = """\
{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}
{%- else -%}{%- set system = DEFAULT -%}{%- endif -%}
{%- if system or tools -%}
  {{- '<|im_start|>system\\n' + system -}}
  {%- if tools -%}
    {{- '\\n\\n# Tools\\n\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object within <tool_call></tool_call>.' -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}"""

_CALLS = """\
{%- macro calls(m) -%}
  {%- for call in m.tool_calls or [] -%}
    {{- '\\n' if said or not loop.first -}}
    {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
    {{- call.function.arguments | tojson + '}\\n</tool_call>' -}}
  {%- endfor -%}
{%- endmacro -%}"""

_OTHERS = """\
  {%- elif m.role == 'tool' -%}
    {{- '<|im_start|>user' if loop.previtem.role != 'tool' -}}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
    {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' -}}
  {%- elif m.role == 'user' or not loop.first -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- endif -%}"""

QWEN_2_5 = (
    _SYSTEM_WITH_TOOLS.replace("DEFAULT", "'You are Qwen, a helpful assistant.'")
    + _CALLS.replace("calls(m)", "calls(m, said)")
    + """
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' + m.content + calls(m, m.content) + '<|im_end|>\\n' -}}
"""
    + _OTHERS
    + """
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
)

# Thoughts stand behind the last question only, and an empty one in the last answer; THOUGHT: where they begin.
_QWEN_3 = (
    _SYSTEM_WITH_TOOLS.replace("DEFAULT", "''")
    + _CALLS.replace("calls(m)", "calls(m, said)")
    + """
{%- set ns = namespace(question=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought, said = m.reasoning_content or '', m.content -%}
    {%- if not thought and '</think>' in said -%}
      {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > ns.question and (ALWAYS or loop.last or thought) -%}
      {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') -}}
    {%- else -%}
      {{- said -}}
    {%- endif -%}
    {{- calls(m, said) + '<|im_end|>\\n' -}}
"""
    + _OTHERS
    + """
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' + OPENING -}}{%- endif -%}"""
)
QWEN_3 = _QWEN_3.replace("ALWAYS", "false").replace("OPENING", "''")
# Later ones and QwQ: the prompt begins the thought.
QWEN_3_5 = _QWEN_3.replace("ALWAYS", "true").replace("OPENING", "'<think>\\n'")

# Arguments are JSON text. A result needs no prompt behind it: the answer follows at once.
DEEPSEEK_3 = """\
{{- bos_token -}}
{%- set ns = namespace(after_tool=false) -%}
{%- for m in messages -%}{%- if m.role == 'system' -%}{{- m.content -}}{%- endif -%}{%- endfor -%}
{%- for tool in tools or [] -%}{{- '\\n\\n' + tool | tojson -}}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{%- set ns.after_tool = false -%}{{- '<｜User｜>' + m.content -}}{%- endif -%}
  {%- if m.role == 'tool' -%}
    {%- set ns.after_tool = true -%}
    {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}
  {%- endif -%}
  {%- if m.role == 'assistant' -%}
    {{- ('' if ns.after_tool else '<｜Assistant｜>') + m.content -}}
    {%- set ns.after_tool = false -%}
    {%- for call in m.tool_calls or [] -%}
      {{- '<｜tool▁calls▁begin｜>' if loop.first -}}
      {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' -}}
      {{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' -}}
      {{- '<｜tool▁calls▁end｜>' if loop.last -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.after_tool -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"""

# Thoughts are taken out of every answer, of the last one too.
DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for m in messages -%}{%- if m.role == 'system' -%}{{- m.content -}}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{- '<｜User｜>' + m.content -}}{%- endif -%}
  {%- if m.role == 'assistant' -%}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"""

# Channels; thoughts before a call are gone once a final answer follows; one call an answer, whose text is a thought.
HARMONY = """\
{%- macro channel(name, text) -%}{{- '<|start|>assistant<|channel|>' + name + '<|message|>' + text -}}{%- endmacro -%}
{{- '<|start|>system<|message|>You are a helpful assistant.<|end|>' -}}
{%- set rules = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if rules or tools -%}
  {{- '<|start|>developer<|message|>' + rules -}}
  {%- for tool in tools or [] -%}{{- '\\n\\n' + tool.function | tojson -}}{%- endfor -%}
  {{- '<|end|>' -}}
{%- endif -%}
{%- set ns = namespace(called=none, final=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and not 'tool_calls' in m -%}{%- set ns.final = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and 'tool_calls' in m -%}
    {%- if m.content and m.thinking -%}{{- raise_exception('Cannot pass both content and thinking') -}}{%- endif -%}
    {%- if (m.content or m.thinking) and ns.final < loop.index0 -%}
      {{- channel('analysis', m.content or m.thinking) + '<|end|>' -}}
    {%- endif -%}
    {%- set ns.called = m.tool_calls[0].function.name -%}
    {{- '<|start|>assistant to=functions.' + ns.called + '<|channel|>commentary json<|message|>' -}}
    {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' -}}
  {%- elif m.role == 'assistant' and loop.last and not add_generation_prompt -%}
    {%- if m.thinking -%}{{- channel('analysis', m.thinking) + '<|end|>' -}}{%- endif -%}
    {{- channel('final', m.content) + '<|return|>' -}}
  {%- elif m.role == 'assistant' -%}
    {{- channel('final', m.content) + '<|end|>' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<|start|>functions.' + ns.called + ' to=assistant<|channel|>commentary<|message|>' -}}
    {{- m.content | tojson + '<|end|>' -}}
  {%- elif m.role == 'user' -%}
    {{- '<|start|>user<|message|>' + m.content + '<|end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""

# Nothing ends an answer: the model stops at the header of what follows.
GLM_4 = """\
{{- '[gMASK]<sop>' -}}
{%- for tool in tools or [] -%}
  {{- ('<|system|>\\n# Tools' if loop.first else '') + '\\n' + tool | tojson -}}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {{- ('<|observation|>' if loop.previtem.role != 'tool' else '') + '\\n' + m.content -}}
  {%- else -%}
    {{- '<|' + m.role + '|>\\n' + m.content -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '\\n<tool_call>' + call.function.name -}}
      {%- for key, value in call.function.arguments.items() -%}{{- '\\n' + key + '=' + value | tojson -}}{%- endfor -%}
      {{- '\\n</tool_call>' -}}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""

# Forced alternation, a call as an action; the result is the system's.
COMMAND_R = """\
{{- bos_token -}}
{%- set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT', 'tool': 'SYSTEM'} -%}
{%- for tool in tools or [] -%}
  {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + tool | tojson + '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- for m in messages -%}
  {{- '<|START_OF_TURN_TOKEN|><|' + names[m.role] + '_TOKEN|>' + m.content.strip() -}}
  {%- for call in m.tool_calls or [] -%}
    {{- '\\nAction: ```json\\n[' if loop.first else ', ' -}}
    {{- '{"tool_name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + '}' -}}
    {{- ']\\n```' if loop.last -}}
  {%- endfor -%}
  {{- '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}"""
