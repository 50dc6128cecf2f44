# SPDX-License-Identifier: Apache-2.0
"""A chat template that uses every construct of DeepSeek's, conversations, and small templates for each
construct; what jinja2 makes of them, set up as transformers does."""

import json

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = """{% if not add_generation_prompt is defined %}
    {% set add_generation_prompt = false %}
{% endif %}
{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{% set ns = namespace(calls=0, in_tools=false, first_output=true, rules='', first_rule=true, user_last=false) %}
{#- All system messages come first, whatever their place. -#}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if ns.first_rule %}
            {% set ns.rules = ns.rules + message['content'] %}
            {%- set ns.first_rule = false %}
        {%- else %}
            {% set ns.rules = ns.rules + '\\n\\n' + message['content'] %}
        {%- endif %}
    {%- endif %}
{%- endfor %}

{% if tools is defined and tools is not none %}
    {% set tool_ns = namespace(text='You can call these functions. '
        'Answer with a call, in this form:\\n'
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n'
        '```json\\n{"key": "value"}\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>\\n') %}
    {% for tool in tools %}
        {% set tool_ns.text = tool_ns.text + '\\n```json\\n' + (tool | tojson) + '\\n```' %}
        {%- if not loop.last %}{% set tool_ns.text = tool_ns.text ~ ',' %}{% endif %}
    {% endfor %}
    {% set ns.rules = ns.rules + ('\\n\\n' if ns.rules | length > 0 else '') + tool_ns.text %}
{% endif %}

{{- bos_token }}{{ ns.rules | trim }}
{%- for message in messages %}
    {%- set content = message['content'] if 'content' in message else none %}
    {%- if content is not none and content is not string %}
        {{- raise_exception('message ' ~ loop.index0 ~ ': content must be text') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set ns.in_tools = false -%}
        {%- set ns.calls = 0 -%}
        {%- set ns.user_last = true -%}
        {{'<｜User｜>' + content}}
    {%- elif message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] is not none %}
        {%- if ns.user_last %}{{'<｜Assistant｜>'}}{%- if thinking %}{{'</think>'}}{%- endif %}{%- endif %}
        {%- if ns.in_tools %}
            {{- '<｜tool▁outputs▁end｜>'}}
        {%- endif %}
        {%- set ns.user_last = false -%}
        {%- set ns.in_tools = false -%}
        {%- set ns.first_output = true %}
        {%- set ns.calls = 0 %}
        {%- for tool in message['tool_calls'] %}
            {%- if ns.calls == 0 %}
                {%- if content %}{{ content }}{% endif %}
                {{- '<｜tool▁calls▁begin｜>' }}
            {%- else %}
                {{- '\\n' }}
            {%- endif %}
            {%- set arguments = tool['function']['arguments'] %}
            {{- '<｜tool▁call▁begin｜>' + tool.get('type', 'function') + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + (arguments if arguments is string else arguments|tojson) + '\\n' + '```' + '<｜tool▁call▁end｜>' }}
            {%- set ns.calls = ns.calls + 1 -%}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {%- elif message['role'] == 'assistant' and ('tool_calls' not in message or message['tool_calls'] is none) %}
        {%- if ns.user_last %}
            {{- '<｜Assistant｜>' }}
            {%- if message['prefix'] is defined and message['prefix'] and thinking %}{{ '<think>' }}{% elif thinking %}{{ '</think>' }}{% endif %}
        {%- endif %}
        {%- set ns.user_last = false -%}
        {%- if ns.in_tools %}
            {{- '<｜tool▁outputs▁end｜>' + content + eos_token }}
            {%- set ns.in_tools = false -%}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set content = content.split('</think>', 1)[1] | trim if loop.last else content.split('</think>')[-1] -%}
            {%- endif %}
            {{- content + eos_token }}
        {%- endif %}
    {%- elif message['role'] == 'tool' %}
        {%- set ns.user_last = false -%}
        {%- set ns.in_tools = true -%}
        {%- if ns.first_output %}
            {{- '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + content + '<｜tool▁output▁end｜>' }}
            {%- set ns.first_output = false %}
        {%- else %}
            {{- '\\n<｜tool▁output▁begin｜>' + content + '<｜tool▁output▁end｜>' }}
        {%- endif %}
    {%- elif message['role'] != 'system' %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
{%- endfor -%}
{% if ns.in_tools %}
    {{- '<｜tool▁outputs▁end｜>' }}
{% endif %}
{% if add_generation_prompt and (ns.user_last or ns.in_tools) %}
    {{- '<｜Assistant｜>' }}
    {%- if thinking %}{{ '<think>\\n' }}{% endif %}
{% endif %}
"""

# The older form: words instead of tokens, index arithmetic, no namespace.
PLAIN_TEMPLATE = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{{ messages[0]['content'] + '\\n\\n' }}{% else %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells the weather of a \"city\"; é, 中, <b>&'",
           "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "default": 1.5, "big": 1e22, "small": 1e-7}},
                          "required": ["city"], "additionalProperties": False, "examples": [], "x": {}, "n": None, "neg": -3, "f": 100.0}}}

CONVERSATIONS = [
    {"messages": [user("Hi")]},
    {"messages": [user("Hi")], "add_generation_prompt": False},
    {"messages": [user("")]},
    {"messages": []},
    {"messages": [system("Be brief."), user("Hi")]},
    {"messages": [system("  Be brief.\n"), user("Hi"), system("Be kind.")]},
    {"messages": [user("Hi"), assistant("Hello!"), user("How are you?")]},
    {"messages": [user("1"), assistant("2"), user("3"), assistant("4")]},
    {"messages": [user("1"), assistant("2"), user("3"), assistant("4")], "add_generation_prompt": False},
    {"messages": [user("q"), assistant("<think>hmm</think> a"), user("r"), assistant("<think>x</think>\n b </think> c")]},
    {"messages": [user("q")], "variables": {"thinking": True}},
    {"messages": [user("q"), assistant("a", prefix=True)], "variables": {"thinking": True}},
    {"messages": [user("q"), assistant("a")], "variables": {"thinking": True}},
    {"messages": [user("q"), assistant("a", prefix=True)], "variables": {"thinking": False}},
    {"messages": [user("Weather?")], "tools": [WEATHER]},
    {"messages": [system("S"), user("Weather?")], "tools": [WEATHER, WEATHER]},
    {"messages": [user("Weather?")], "tools": []},
    {"messages": [user("Weather?"), assistant(None, tool_calls=[call("weather", {"city": "Berlin"})])]},
    {"messages": [user("Weather?"), assistant("Wait.", tool_calls=[call("weather", "{\"city\": \"Berlin\"}"), call("weather", {"city": "Köln", "list": [1, 2.0, True, None]})]),
                  tool("12 degrees"), tool("13 degrees")]},
    {"messages": [user("Weather?"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": {}}}]), tool("ok"), assistant("Done."), user("Thanks")], "tools": [WEATHER]},
    {"messages": [user("x"), assistant(None, tool_calls=[call("a", {})]), tool("1"), assistant(None, tool_calls=[call("b", {})]), tool("2"), user("y")]},
    {"messages": [user("x"), assistant("y", tool_calls=None)]},
    {"messages": [user("emoji 😀, {{ not a tag }}, {% nor this %}, <｜end▁of▁sentence｜>, \\n \n\n end  ")]},
    {"messages": [user("tabs\tand\r\nnewlines\u2028")]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [user("x"), {"role": "assistant"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"content": "no role"}]},
    {"messages": ["text"]},
    {"messages": [user("x"), assistant(None, tool_calls=[{}])]},
    {"messages": [user("x"), assistant("a", tool_calls=[])]},
    {"messages": [user("x"), assistant(5)]},
    {"messages": [system("only rules")]},
]

PLAIN_CONVERSATIONS = [
    {"messages": [user("Hi")]}, {"messages": [system("S"), user("Hi")]}, {"messages": [user("a"), assistant("b"), user("c")]},
    {"messages": [user("a"), user("b")]}, {"messages": [assistant("a")]}, {"messages": []}, {"messages": [system("S")], "add_generation_prompt": False},
    {"messages": [user("é中😀"), assistant("\n\n")], "add_generation_prompt": False},
]

MESSAGES = [system("sys"), user("one two"), assistant("  three  "), user("né 中😀")]

# Each is rendered over MESSAGES and these variables.
VARIABLES = {"n": 7, "f": 2.5, "s": "Hello, World", "e": "", "l": [1, "two", 3.0, None, True], "d": {"a": 1, "b": {"c": [1, 2]}, "items": 3},
             "t": True, "z": None, "words": "  a  b c ", "u": "né 中😀", "nested": [[1, 2], [3, 4]], "neg": -7}

SNIPPETS = [
    # white space
    "a\n{% if t %}\nb\n{% endif %}\nc\n", "a\n  {% if t %}\n  b\n  {% endif %}\nc", "a {%- if t %} b {%- endif %} c", "a {% if t -%} b {% endif -%} c",
    "a\n\n{%- if t -%}\n\nb\n\n{%- endif -%}\n\nc", "  {% set x = 1 %}  \n  y", "  {%+ if t %}x{% endif %}", "x{% if t +%}\ny{% endif %}", "{{ s }}\n{{ s }}\n\n", "{{- s }} {{ s -}}  \n x",
    "a\n   {# note #}\nb", "a {#- note -#} b", "{# a\nb #}\nc", "a{# x #}\n\nb", "  {{ s }}", "\t{% set x = 1 %}\t\nz", "x  {% set q = 1 %}\ny", "\n{% set q = 1 %}\n\ny", "a\r\nb\r{% if t %}\r\nc{% endif %}\r\n",
    "{#-#}x", "{#--#} x", "{% if t %}{% endif %}\n", "line\n\n", "\n", "", "{{ '' }}\n{% if t %}\n{% endif %}\n", "\u00a0{%- if t %}x{% endif %}", "a\n \u2003{% if t %}x{% endif %}", "a{%- set q = 1 -%}\n\n\n b",
    # literals
    "{{ 'a' 'b' \"c\" }}", "{{ 'it''s' }}", "{{ \"q\\\"q\" }} {{ 'q\\'q' }}", "{{ 'a\\nb\\tc\\\\d' }}", "{{ '\\x41\\u00e9\\U0001f600' }}", "{{ '\\d\\w' }}", "{{ 1 }} {{ 1.5 }} {{ -3 }} {{ 0.1 }} {{ 100.0 }} {{ 0.00001 }}",
    "{{ true }} {{ False }} {{ none }} {{ None }}", "{{ [1, 2,] | length }} {{ (1, 2) | length }} {{ {'a': 1, 'b': 2,} | length }} {{ [] | length }} {{ {} | length }}", "{{ ('a') }} {{ ('a',) | length }} {{ () | length }}",
    "{{ {'a': {'b': [1, {'c': 'x'}]}}['a']['b'][1]['c'] }}", "{{ 'ä中😀' }}",
    # operators
    "{{ 1 + 2 * 3 - 4 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 3 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 6 / 3 }}", "{{ 2.5 + 1 }} {{ 2.5 * 2 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }}", "{{ 'a' + 'b' }} {{ 'a' ~ 1 ~ none ~ 2.0 ~ true }} {{ 'ab' * 3 }}",
    "{{ ([1] + [2, 3]) | length }}", "{{ 1 < 2 }} {{ 2 <= 2 }} {{ 3 > 4 }} {{ 3 >= 4 }} {{ 1 == 1.0 }} {{ 1 != 2 }} {{ true == 1 }} {{ '1' == 1 }}", "{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 1 == 1 != 2 }}", "{{ 'a' < 'b' }} {{ 'é' > 'z' }}",
    "{{ 'ell' in s }} {{ 'x' not in s }} {{ 1 in l }} {{ 'a' in d }} {{ 'q' in d }} {{ none in l }} {{ '' in s }}", "{{ not t }} {{ not not t }} {{ not e }} {{ t and n }} {{ e or 'x' }} {{ z or e or 0 }} {{ t and e and n }}", "{{ not 1 == 2 }} {{ not 'a' in s }}",
    "{{ 'y' if t else 'n' }} {{ 'y' if e else 'n' }} {{ 'y' if e }}|{{ 'a' if e else 'b' if z else 'c' }}", "{{ -n }} {{ - n + 1 }} {{ -(2 + 3) }}", "{{ [1, 2] == [1, 2] }} {{ {'a': 1} == {'a': 1.0} }} {{ [1] == (1,) or true }}", "{{ 'a' ~ 'b' + 'c' }}", "{{ 1 + 2 ~ 3 }}",
    "{{ 10 - 2 - 3 }} {{ 100 // 10 // 2 }} {{ 2 * 3 % 4 }}", "{{ undefined_name == other_undefined }} {{ undefined_name == none }} {{ undefined_name == '' }}",
    # access
    "{{ d.a }} {{ d['a'] }} {{ d.b.c[1] }} {{ d['b']['c'][-1] }} {{ d['items'] }}", "{{ l[0] }} {{ l[-1] }} {{ l[1] }} {{ s[0] }} {{ s[-1] }} {{ u[1] }} {{ u[-1] }}", "{{ l[9] }}|{{ d.missing }}|{{ s[99] }}|{{ z.x }}|{{ n.x }}|{{ d['x'] }}|{{ s.x }}|",
    "{{ s[1:] }} {{ s[:3] }} {{ s[1:4] }} {{ s[-3:] }} {{ s[:-3] }} {{ s[::2] }} {{ s[::-1] }} {{ s[5:1] }}|{{ s[100:] }}|{{ s[-100:2] }} {{ s[4:0:-2] }} {{ s[:] }}", "{{ l[1:] | length }} {{ l[::-1][0] }} {{ (l[:2] + l[3:]) | length }} {{ l[-2:] | length }}", "{{ u[1:4] }} {{ u[::-1] }}",
    "{{ messages[0].role }} {{ messages[-1]['content'] }} {{ messages[1:][0]['content'] }} {{ messages | length }}", "{{ messages[0]['role'] ~ messages[0].content }}", "{{ (d.b).c[0] }} {{ d['b'].c[0] }} {{ d.get('a') }} {{ d.get('q') }} {{ d.get('q', 'dflt') }}", "{{ nested[1][0] + nested[0][1] }}",
    # filters
    "{{ words | trim }}|{{ words | trim | length }}|{{ 'xxaxx' | trim('x') }}|{{ 5 | trim }}", "{{ s | length }} {{ u | length }} {{ l | count }} {{ d | length }} {{ undefined_name | length }}", "{{ s | upper }} {{ s | lower }}", "{{ s | replace('l', 'L') }} {{ s | replace('l', 'L', 1) }}",
    "{{ undefined_name | default('x') }} {{ z | default('x') }} {{ e | default('x', true) }} {{ e | d('y', boolean=true) }} {{ undefined_name | default }}|", "{{ l | first }} {{ l | last }} {{ s | first }} {{ [] | first }}|", "{{ ['a', 'b', 1] | join(', ') }} {{ 'abc' | join('-') }} {{ [] | join }}|", "{{ 'abc' | list | length }} {{ d | list | join(',') }}",
    "{{ 5 | string + 'x' }} {{ '12' | int + 1 }} {{ 'x' | int }} {{ 'x' | int(9) }} {{ 3.9 | int }}", "{{ 'a' + 'b' | upper }} {{ ('a' + 'b') | upper }} {{ -3 | string | length }}", "{{ s | safe }}", "{% for k, v in d.b | items %}{{ k }}{% endfor %}",
    "{{ l | tojson }} {{ d | tojson }} {{ s | tojson }} {{ u | tojson }} {{ z | tojson }} {{ f | tojson }} {{ t | tojson }}", "{{ '\"\\\\/\\n\\t\\r' | tojson }} {{ '\\x00\\x1f\\x7f' | tojson }} {{ '<script>&\\'' | tojson }}", "{{ d | tojson(indent=2) }}", "{{ [] | tojson(indent=2) }} {{ [[], {}] | tojson(indent=1) }}", "{{ {'z': 1, 'a': [1.0, 1000.0, 0.5]} | tojson }}",
    # tests
    "{{ n is defined }} {{ q is defined }} {{ q is undefined }} {{ q is not defined }} {{ z is defined }}", "{{ z is none }} {{ n is none }} {{ z is not none }} {{ q is none }}", "{{ s is string }} {{ n is string }} {{ l is string }} {{ q is string }}", "{{ d is mapping }} {{ l is mapping }}", "{{ l is iterable }} {{ s is iterable }} {{ d is iterable }} {{ n is iterable }}", "{{ l is sequence }} {{ s is sequence }} {{ n is sequence }}",
    "{{ n is number }} {{ t is number }} {{ s is number }} {{ n is integer }} {{ f is integer }} {{ t is integer }} {{ f is float }} {{ t is boolean }} {{ n is boolean }}", "{{ t is true }} {{ t is false }} {{ 1 is true }}", "{{ n is odd }} {{ n is even }} {{ 4 is even }}", "{{ 1 is eq 1 }} {{ 1 is equalto(2) }} {{ 'a' is in 'abc' }} {{ 5 is in [1, 2] }}", "{{ d.a is defined and d.a is not none }} {{ d.x is defined or d.a is defined }}", "{{ not n is defined }} {{ n is not string and t }}", "{{ d.x.y is defined }}",
    # methods
    "{{ s.split(',')[1] }} {{ s.split('l') | length }} {{ 'a,b,c'.split(',', 1)[1] }} {{ 'abc'.split('x') | first }} {{ ''.split(',') | length }}", "{{ words.split() | join('|') }} {{ ''.split() | length }} {{ ' a b  c '.split(none, 1) | join('|') }} {{ ' x\\ny\\tz '.split() | length }}", "{{ 'a.b.c'.rsplit('.', 1)[0] }} {{ 'abc'.rsplit('.', 1)[0] }} {{ 'a.b.c'.rsplit('.') | length }}",
    "{{ words.strip() }}|{{ words.lstrip() }}|{{ words.rstrip() }}|{{ 'xyaxy'.strip('xy') }}|{{ 'xxa'.lstrip('x') }}|{{ '\\n a\\n\\n'.rstrip('\\n') }}|", "{{ s.startswith('He') }} {{ s.endswith('ld') }} {{ s.startswith('x') }} {{ s.endswith('') }} {{ s.startswith(('x', 'H')) }}", "{{ s.upper() }} {{ s.lower() }} {{ s.replace('o', '0') }} {{ s.replace('o', '0', 1) }}", "{{ s.find('l') }} {{ s.find('zz') }} {{ u.find('中') }} {{ s.count('l') }}", "{{ '-'.join(['a', 'b']) }}",
    "{{ d.keys() | list | join(',') }} {% for v in d.b.values() %}{{ v | length }}{% endfor %}", "{% for k, v in d.b.items() %}{{ k }}={{ v | tojson }}{% endfor %}", "{% for k, v in {'x': 1, 'y': 2}.items() %}{{ loop.index }}{{ k }}{{ v }};{% endfor %}", "{{ 'a</think>b</think>c'.split('</think>')[-1] }} {{ 'a</think>b</think>c'.split('</think>', 1)[1] }} {{ ('x' + ' y ').strip().split(' ')[0] }}", "{{ s.split(sep='o') | length }} {{ 'a b c'.split(' ', maxsplit=1) | length }}",
    # statements
    "{% for m in messages %}{{ loop.index0 }}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }} {{ m.role }};{% endfor %}", "{% for x in [] %}a{% else %}none{% endfor %}", "{% for x in l if x %}{{ loop.index }}{{ x }} {% endfor %}", "{% for x in [1, 2, 3] if x > 5 %}{{ x }}{% else %}empty{% endfor %}", "{% for a, b in nested %}{{ a }}-{{ b }} {% endfor %}", "{% for (a, b) in nested %}{{ a * b }} {% endfor %}", "{% for c in 'né中' %}[{{ c }}]{% endfor %}", "{% for k in d %}{{ k }}{% endfor %}",
    "{% for x in undefined_name %}a{% else %}b{% endfor %}", "{% for x in range(3) %}{{ x }}{% endfor %} {{ range(2, 10, 3) | join(',') }} {{ range(5, 0, -2) | join(',') }} {{ range(0) | length }}", "{% for i in range(3) %}{% for j in range(2) %}{{ i }}{{ j }}{{ loop.last }} {% endfor %}{{ loop.index }};{% endfor %}", "{% for x in range(9) %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %}", "{% for x in [1, 2, 3] %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }} {% endfor %}",
    "{% if n > 5 %}big{% elif n > 3 %}mid{% else %}small{% endif %}", "{% if e %}a{% elif z %}b{% elif 0 %}c{% else %}d{% endif %}", "{% if t %}{% if e %}x{% else %}y{% endif %}{% endif %}", "{% if l %}l{% endif %}{% if d %}d{% endif %}{% if q %}q{% endif %}{% if 0.0 %}0{% endif %}", "{% set x = 1 %}{% if t %}{% set x = 2 %}{% endif %}{{ x }}", "{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }} {% endfor %}{{ x }}",
    "{% set ns = namespace(x=1, y='a') %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% set ns.z = i %}{% endfor %}{{ ns.x }}{{ ns.y }}{{ ns.z }}{{ ns.q }}|", "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns.a.a == ns }}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set a, b = nested[0] %}{{ b }}{{ a }}", "{% set x %}hello {{ n }}{% endset %}[{{ x }}]{{ x | length }}", "{% set x = 'a' if t else 'b' %}{{ x }}", "{% set x = 1, 2 %}{{ x | length }}", "{% for i in [1] %}{% set inner = 5 %}{% endfor %}{{ inner is defined }}", "{% for i in [1, 2] %}{% if inner is defined %}D{% endif %}{% set inner = i %}{% endfor %}",
    "{% for m in messages %}{% set content = m.content %}{% if content.startswith(' ') %}{% set content = content.strip() %}{% endif %}[{{ content }}]{% endfor %}", "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{{ m.role[0] }}{% endfor %}", "{{ dict(a=1, b='x') | tojson }}", "{% set s = s ~ '!' %}{{ s }}", "{% for s in ['x'] %}{{ s }}{% endfor %}{{ s }}", "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ tools is none }}{{ add_generation_prompt }}",
    "{% for x in l %}{{ x }}{% if not loop.last %}, {% endif %}{% endfor %}", "{% set q = namespace(l=[]) %}{% for x in [1, 2] %}{% set q.l = q.l + [x * 2] %}{% endfor %}{{ q.l | tojson }}", "{%- set x = 1 -%}{%- if x -%}y{%- endif -%}", "{% if (n == 7) != (1 % 2 == 0) %}x{% endif %}", "{{ messages | tojson }}", "{% for m in messages[::-1] %}{{ m.role }} {% endfor %}", "{% for m in messages %}{% set k = loop.index0 %}{% for c in m.content[:2] %}{{ k }}{{ loop.index0 }} {% endfor %}{% endfor %}",
    # what must fail at render
    "{{ raise_exception('stop') }}", "{{ q.x }}", "{{ q['x'] }}", "{{ q + 'a' }}", "{{ 'a' + q }}", "{{ 'a' + 1 }}", "{{ 1 + 'a' }}", "{{ 'a' + none }}", "{{ 'x' in none }}", "{{ 1 in 'abc' }}", "{{ none < 1 }}", "{{ 'a' < 1 }}", "{{ 1 / 0 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}", "{% for x in 5 %}{% endfor %}", "{% for x in none %}{% endfor %}", "{% for a, b in [1] %}{% endfor %}", "{% for a, b in [[1, 2, 3]] %}{% endfor %}",
    "{{ none | length }}", "{{ 5 | length }}", "{{ n.strip() }}", "{{ z.split(',') }}", "{{ q.strip() }}", "{% set s.x = 1 %}", "{{ q | tojson }}", "{{ l[::0] }}", "{{ n[1:] }}", "{{ 'a'.split('') }}", "{{ -s }}", "{{ ''.join([1]) }}" if False else "{{ none + 1 }}", "{{ q() }}" if False else "{{ [1] + 'a' }}", "{{ range(1000000) | length }}", "{{ 'a'.startswith(1) }}", "{{ s.find(1) }}",
]

# Refused at load by us, whatever jinja2 says; the second is a part of our message.
REFUSED = [
    ("{% macro f() %}{% endmacro %}", "macro"), ("{% include 'x' %}", "include"), ("{% import 'x' as y %}", "import"), ("{% extends 'x' %}", "extends"), ("{% block a %}{% endblock %}", "block"), ("{% raw %}{{ x }}{% endraw %}", "raw"), ("{% with a = 1 %}{% endwith %}", "with"), ("{% call f() %}{% endcall %}", "call"), ("{% filter upper %}{% endfilter %}", "filter"), ("{% do x %}", "do"), ("{% generation %}{% endgeneration %}", "generation"),
    ("{{ x | groupby('a') }}", "groupby"), ("a\n\n{{ x | sort }}", "line 3"), ("{{ x is divisibleby 3 }}", "divisibleby"), ("{{ x.pop() }}", "pop"), ("{{ x.format(1) }}", "format"), ("{{ strftime_now('%d') }}", "strftime_now"), ("{{ f(1) }}", "f()"), ("{{ x[0](1) }}", "call"), ("{{ 2 ** 3 }}", "**"), ("{{ x | tojson(sort_keys=true) }}", "sort_keys"), ("{% for x in y recursive %}{% endfor %}", "recursive"), ("{{ x.items }}", "items"), ("{{ f(*x) }}", "unpacking"),
    ("{{ 0x10 }}", "0x"), ("{{ '\\N{DASH}' }}", "\\N"),
    ("{{ x", "never closed"), ("{% if x %}", "endif"), ("{% for x in y %}", "endfor"), ("{{ }}", "expression"), ("{{ a b }}", "}}"), ("{% if %}{% endif %}", "expression"), ("{% endif %}", "without its beginning"), ("{% for in x %}{% endfor %}", "\"in\""), ("{{ 'abc }}", "never closed"), ("{# abc", "never closed"), ("{{ (1 }}", "unexpected"), ("{{ [1, }}", "unexpected"), ("{{ a ! b }}", "unexpected character"), ("{% set x %}", "endset"), ("{% set %}", "name"), ("{% %}", "name"), ("{% break %}", "outside a loop"), ("{{ a | }}", "name"), ("{{ a.1x }}", "not supported"), ("{{ {'a' 1} }}", "\":\""), ("{% set true = 1 %}", "assign"), ("{% for loop in x %}{% endfor %}", "assign"), ("{{ x | trim(1, 2, 3) }}", "number of arguments"), ("{{ x | replace('a') }}", "number of arguments"), ("{% if x %}{% else %}{% else %}{% endif %}", "without its beginning"), ("{{ " + "(" * 100 + "1" + ")" * 100 + " }}", "nested deeper"), ("{% if x %}" * 100 + "{% endif %}" * 100, "nested deeper"), ("{{ " + "1+" * 1000 + "1 }}", "deeper"), ("{{ not " * 1 + "not " * 200 + "x }}", "nested deeper"), ("{{ 99999999999999999999 }}", "integer"),
]


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def render(source, case, tokens):
    try:
        template = environment().from_string(source)
        variables = {"add_generation_prompt": True, "tools": None, "documents": None, **tokens}
        variables.update({k: v for k, v in case.items() if k != "variables"})
        variables.update(case.get("variables", {}))
        return {"expected": template.render(**variables)}
    except (jinja2.exceptions.TemplateError, TypeError, ZeroDivisionError, ValueError, AttributeError, OverflowError) as error:
        return {"error": str(error)}


def groups(config):
    tokens = {"bos_token": config["bos_token"]["content"], "eos_token": config["eos_token"]["content"], "pad_token": config["pad_token"]}
    for name, source, conversations in (("default", None, CONVERSATIONS), ("plain", PLAIN_TEMPLATE, PLAIN_CONVERSATIONS)):
        group = {"name": name, **({"template": source} if source else {})}
        yield {**group, "cases": [{**c, **render(source or TEMPLATE, c, tokens)} for c in conversations]}
    shared = {"messages": MESSAGES, "variables": VARIABLES}
    yield {"name": "snippets", **shared, "cases": [{"template": s, **render(s, shared, tokens)} for s in SNIPPETS]}
    yield {"name": "refused", "cases": [{"template": s, "contains": part} for s, part in REFUSED]}
