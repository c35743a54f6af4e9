"""Chat templates that have tools, in the forms of published families; and a model file that is given one of them."""

import hashlib
import struct
from pathlib import Path

#: As Hermes has it: functions and calls as JSON between tags, in ChatML, whose marks SmolLM2 knows, too.
HERMES = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}You can call these functions:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
To call one, write <tool_call>{"name": its name, "arguments": its arguments}</tool_call>.<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{{ message.content }}{% for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>tool
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

#: As Llama 3.1 has it: functions before the first question, calls as bare JSON with `parameters`, answers as `ipython`.
LLAMA = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- elif message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if tools and loop.first %}As of {{ strftime_now('%Y') }} these functions are yours:
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}{{ message.content | trim }}<|eot_id|>
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

#: As Mistral has it: functions before the last question, calls as a list after a mark of their own.
MISTRAL = """{{- bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif %}[INST] {{ message.content }}[/INST]
{%- elif message.role == 'tool' %}[TOOL_RESULTS] {"content": {{ message.content }}}[/TOOL_RESULTS]
{%- elif message.tool_calls %}[TOOL_CALLS] [{% for call in message.tool_calls %}
{{- call.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}
{%- else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""

_KEY, _TEXT, _ALIGNMENT = b"tokenizer.chat_template", 8, 32


def teach(source: Path, target: Path, template: str) -> str:
    """Write a copy of a GGUF file with another chat template (ggml's docs/gguf.md). Returns its SHA-256."""
    data = source.read_bytes()
    name = struct.pack("<Q", len(_KEY)) + _KEY + struct.pack("<I", _TEXT)
    assert data.count(name) == 1
    start = data.index(name) + len(name)
    (length,) = struct.unpack_from("<Q", data, start)
    # The weights stay aligned when the header grows by a multiple: a comment of Jinja's makes up for the rest.
    text = template.encode() + b"{##}"
    text = text[:-2] + b" " * ((length - len(text)) % _ALIGNMENT) + text[-2:]
    made = data[:start] + struct.pack("<Q", len(text)) + text + data[start + 8 + length :]
    target.write_bytes(made)
    return hashlib.sha256(made).hexdigest()
