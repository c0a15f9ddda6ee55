"""Templates that use one thing each of what chat templates are written for."""

SMALL = {
  "blocks": "  {% if true %}\n  x\n  {% endif %}\n\n{# gone #}\n y {%- if 1 %} z {% endif -%} \n w\n",
  "loop": (
    "{% for m in messages %}{% if loop.first %}first {% elif loop.last %}last {% endif %}"
    "{{ loop.index0 }}/{{ loop.length }} {{ loop.previtem.role if loop.previtem }}"
    " {{ m.role }} {{ loop.revindex }}\n{% endfor %}"
  ),
  "loop over a filter": (
    "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ loop.length }}"
    "{{ loop.last }}{{ m.content | trim }}{% else %}none{% endfor %}"
  ),
  "loop with a condition": (
    "{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }}{% endfor %}"
  ),
  "nested loops": (
    "{% for m in messages recursive %}{{ m.role if m.role else m }}{% if m.role %}"
    "{{ loop(['a', 'b']) }}{% endif %}{% endfor %}"
  ),
  "break and continue": (
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}"
    "{% endif %}{{ i }}{% endfor %}"
  ),
  "tables": (
    "{% for key, value in messages[2].tool_calls[0].function.arguments.items() %}"
    "{{ key }}={{ value | tojson }};{% endfor %}{% for k in messages[0] %}{{ k }},{% endfor %}"
    "{{ messages[0] | dictsort }}{{ dict(a=1, **{'b': 2}) }}{{ dict(messages[0]) | length }}"
  ),
  "json": (
    "{{ tools | tojson }}\n{{ tools[0] | tojson(indent=2) }}\n{{ 'é<&>' | tojson }}"
    "{{ {'b': 1, 'a': none} | tojson(sort_keys=true, separators=(',', ':')) }}"
    "{{ 'é' | tojson(ensure_ascii=true) }}"
  ),
  "texts": (
    "{{ 'a' ~ 1 ~ none ~ true }}{{ 'ab' * 3 }}{{ 'x' + 'y' }}{{ '%s-%03d' % ('q', 7) }}"
    "{{ '{} {x}'.format(1, x=2) }}{{ 'a,b'.split(',') }}{{ ' q '.strip() }}{{ 'abc'[1:] }}"
    "{{ 'abc'[::-1] }}{{ 'aXbX' | replace('X', '--') }}{{ ['a', 'b'] | join('|') }}"
    "{{ 'a\\nb' | indent(3, true) }}{{ 'q' | center(5) }}{{ 'A'.lower() | upper | capitalize }}"
    "{{ 'x'.startswith('x') }}{{ 'ab' in 'cab' }}{{ 'a-b'.partition('-') }}{{ 'z'.rjust(4, '.') }}"
  ),
  "lists": (
    "{{ messages[1:] | length }}{{ messages[-1].role }}{{ ([1, 2] + [3]) | sum }}"
    "{{ messages | map(attribute='role') | list }}{{ [3, 1, 2] | sort | first }}"
    "{{ range(3) | list }}{{ [1, 2, 3] | batch(2) | list }}{{ [[1, 2], [3]] | last }}"
    "{{ [1, 2, 3] | reject('equalto', 2) | list }}{{ [1] | length == 1 }}{{ ['a'] * 2 }}"
  ),
  "names": (
    "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.text = ns.text ~ m.role[0] %}{% endfor %}{{ ns.n }}{{ ns.text }}"
    "{% set block %}in {{ ns.n }}{% endset %}[{{ block }}]"
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}"
  ),
  "macros": (
    "{% macro say(m, mark='*') -%}\n{{ mark }}{{ m.content }}{{ caller() if caller }}\n"
    "{%- endmacro %}{{ say(messages[1]) }}{{ say(messages[0], mark='#') }}"
    "{% call say(messages[0]) %}!{% endcall %}{% filter upper %}abc{% endfilter %}"
  ),
  "tests": (
    "{{ tools is iterable }}{{ tools is none }}{{ documents is none }}{{ documents is defined }}"
    "{{ nothing is defined }}{{ 'a' is string }}{{ messages[0] is mapping }}{{ 3 is divisibleby 3 }}"
    "{{ messages[2].content is defined }}{{ nothing | default('d') }}{{ none | default('e', true) }}"
    "{{ messages[0].nothing }}{{ messages[0]['items'] is defined }}"
  ),
  "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %},{% endfor %}",
  "numbers": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ -7 % 3 }}{{ 3.0 | int }}{{ '5' | int + 1 }}{{ 2.5 | round }}",
  "refusal": "{{ raise_exception('no') }}",
  "surroundings": "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ date_string }}",
}
